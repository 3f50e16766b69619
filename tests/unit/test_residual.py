"""Which linears write into the residual stream: toy blocks of every wiring, and real ones."""

import pytest
import torch
from tiny_models import KINDS, random_model
from torch import nn

from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.model.residual import residual_writers

# Which projections' outputs are added to the residual stream as they are, and where to read it.
WRITERS = {
    "llama": {"o_proj": "input", "down_proj": "output"},
    "qwen2": {"o_proj": "input", "down_proj": "output"},
    "qwen3": {"o_proj": "input", "down_proj": "output"},
    "mistral": {"o_proj": "input", "down_proj": "output"},
    "phi3": {"o_proj": "input", "down_proj": "output"},
    "gpt2": {"attn.c_proj": "input", "mlp.c_proj": "output"},
    "opt": {"out_proj": "input", "fc2": "output"},
    "gpt_neox": {"attention.dense": "output", "dense_4h_to_h": "output"},  # side by side
    "gemma3": {},  # norms in between
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_writers_of_every_architecture_are_found(kind, tmp_path):
    decoder = Decoder.open(open_checkpoint(random_model(kind, tmp_path)))
    hidden = decoder.embed(torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0)))
    with decoder.loaded(0) as block:
        found = residual_writers(block, hidden, lambda: decoder.run(0, block, hidden))
    wanted = {
        decoder.local_name(spec): where
        for spec in decoder.block_linears(0)
        for end, where in WRITERS[kind].items()
        if spec.name.endswith(end)
    }
    assert found == wanted


class Block(nn.Module):
    """hidden -> norm -> first -> second, whose output `join` brings together with hidden."""

    def __init__(self, join):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.join = join

    def forward(self, hidden):
        return self.join(self, hidden, self.second(self.first(self.norm(hidden)).relu()))


def added_in_place(block, hidden, output):
    output += hidden
    return output


JOINS = {
    "added": (lambda block, hidden, output: hidden + output, "output"),
    "added in place": (added_in_place, "output"),
    "read by a norm": (lambda b, hidden, output: hidden + b.last(hidden + output), "input"),
    "scaled": (lambda block, hidden, output: hidden + 0.22 * output, None),
    "normed": (lambda block, hidden, output: hidden + block.last(output), None),
    # The norm after the sum reads the stream, so that it can be told there.
    "normed after": (lambda block, hidden, output: block.last(hidden + output), "input"),
    "gated": (lambda block, hidden, output: hidden + output * hidden, None),
}


@pytest.mark.parametrize("wiring", JOINS)
def test_only_what_is_added_as_it_is_counts(wiring):
    join, where = JOINS[wiring]
    block, hidden = Block(join), torch.randn(2, 5, 8)
    found = residual_writers(block, hidden, lambda: block(hidden))
    assert found == ({} if where is None else {"second": where})


def test_a_zero_weight_is_not_listed():
    block, hidden = Block(JOINS["added"][0]), torch.randn(2, 5, 8)
    nn.init.zeros_(block.second.weight)
    nn.init.zeros_(block.second.bias)
    assert residual_writers(block, hidden, lambda: block(hidden)) == {}


def test_no_hook_stays_behind():
    def fail(block, hidden, output):
        raise RuntimeError("stopped")

    for join in (JOINS["added"][0], fail):
        block, hidden = Block(join), torch.randn(2, 5, 8)
        try:
            residual_writers(block, hidden, lambda block=block, hidden=hidden: block(hidden))
        except RuntimeError:
            assert join is fail
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
