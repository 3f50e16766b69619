"""Submodules that end in a linear, and blocks run without them."""

import pytest
import torch
from tiny_models import KINDS, random_model
from torch import nn

from lwquant.capture.record import catching_inputs
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.model.replay import Replay, endings

# The outermost submodule that ends in a linear. OPT's projections stand in the block itself.
LLAMAS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3")
ENDINGS = {
    **{kind: {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"} for kind in LLAMAS},
    "gpt2": {"attn.c_proj": "attn", "mlp.c_proj": "mlp"},
    "gpt_neox": {"attention.dense": "attention", "mlp.dense_4h_to_h": "mlp"},
    "opt": {"self_attn.out_proj": "self_attn"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_gives_the_same_without_what_is_known(kind, tmp_path):
    decoder = Decoder.open(open_checkpoint(random_model(kind, tmp_path)))
    tokens = torch.randint(512, (4, 12), generator=torch.Generator().manual_seed(0))
    hidden = decoder.embed(tokens)
    parts = [hidden[:2], hidden[2:]]
    with decoder.loaded(0) as block, torch.no_grad():
        names = [decoder.local_name(spec) for spec in decoder.block_linears(0)]
        linears = {name: block.get_submodule(name) for name in names}
        found = endings(block, linears, lambda: decoder.run(0, block, parts[0]))
        paths = {module: path for path, module in block.named_modules()}
        assert {name: paths[one.module] for name, one in found.items()} == ENDINGS[kind]
        first = next(iter(found))
        caught = [catch(decoder, block, linears[first], part) for part in parts]
        replay = Replay()
        replay.add(found[first], caught)
        linears[first].weight.mul_(1.5)  # a quantizer changes it after its inputs were recorded
        wanted = [decoder.run(0, block, part) for part in parts]
        watched = next(m for m in linears.values() if m is not linears[first])
        for number, part in enumerate(parts):
            with replay.chunk(number), catching_inputs({0: watched}) as ran:
                got = decoder.run(0, block, part)
            torch.testing.assert_close(got, wanted[number])
            assert not ran  # the first linear, of the module that is skipped
        with catching_inputs({0: watched}) as ran:
            torch.testing.assert_close(decoder.run(0, block, parts[0]), wanted[0])
        assert ran


def catch(decoder, block, module, part):
    with catching_inputs({0: module}, stop=True) as caught:
        decoder.run(0, block, part)
    return caught[0]


class Inner(nn.Module):
    """first -> second, then what `after` makes of the output."""

    def __init__(self, after):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.after = after

    def forward(self, hidden):
        return self.after(self.second(self.first(hidden).relu()), hidden)


class Outer(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.inner = Inner(after)

    def forward(self, hidden):
        output = self.inner(hidden)
        return hidden + (output[0] if isinstance(output, tuple) else output)


AFTER = {
    "alone": (lambda output, hidden: output, True),
    "first of a tuple": (lambda output, hidden: (output, None), True),
    "beside another result": (lambda output, hidden: (output, hidden), False),
    "changed": (lambda output, hidden: output * 2, False),
    "changed in place": (lambda output, hidden: output.add_(hidden), False),
}


@pytest.mark.parametrize("case", AFTER)
def test_only_a_module_that_hands_on_the_output_itself_ends_in_the_linear(case):
    after, wanted = AFTER[case]
    block, hidden = Outer(after), torch.randn(2, 3, 8)
    linears = {name: block.get_submodule(name) for name in ("inner.first", "inner.second")}
    found = endings(block, linears, lambda: block(hidden))
    assert {name: one.module for name, one in found.items()} == (
        {"inner.second": block.inner} if wanted else {}
    )
    assert not any(module._forward_hooks for module in block.modules())
