"""The walk over the blocks against whole transformers models, quantized linear by linear."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lwquant.corrections import error_propagation
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import rtn
from lwquant.sequential import Streams, quantize_blocks
from lwquant.types import QuantizedWeight, QuantScheme

SCHEME = QuantScheme(3, 32)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("lwquant.sequential.TOKENS_PER_RUN", 80)


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    return Decoder.open(open_checkpoint(tiny_folder))


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer, heldout_text):
    ids = tiny_tokenizer(heldout_text[:3000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 6 * 40]).view(6, 40)


def walk(decoder, tokens, schemes, **settings):
    """Every result in order, the statistics its quantizer was given, and the final streams."""
    streams = Streams.start(decoder, tokens, n_calibration=4)
    seen = []

    def spy(weight, stats, scheme):
        seen.append(stats)
        return rtn(weight, stats, scheme)

    results = list(quantize_blocks(decoder, streams, schemes, spy, **settings))
    return results, seen, streams


@torch.no_grad()
def run(model, tokens, name=None):
    """Input of module `name`, (tokens, in_features), or the last block's output."""
    caught = []
    if name is None:
        last = model.model.layers[-1]
        handle = last.register_forward_hook(lambda _, args, out: caught.append(out))
    else:
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(tokens)
    handle.remove()
    return caught[0] if name is None else caught[0].flatten(0, 1).double()


def residual_stream(name):
    """The module of a Llama block that reads what the linear's output is added to."""
    block = name.rsplit(".", 2)[0]
    if name.endswith("o_proj"):
        return f"{block}.input_layernorm"
    return f"{block}.post_attention_layernorm" if name.endswith("down_proj") else None


@torch.no_grad()
def put(model, result):
    rounded = result.weight
    model.get_submodule(result.spec.name).weight.copy_(
        rounded.dequantize() if isinstance(rounded, QuantizedWeight) else rounded
    )


@pytest.mark.parametrize("correction", [None, error_propagation])
def test_statistics_are_those_of_the_model_as_quantized_so_far(decoder, model, tokens, correction):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    results, seen, _ = walk(decoder, tokens, schemes, correction=correction, needs_drift=True)
    assert [r.spec for r in results] == sorted(
        decoder.linears, key=lambda s: (s.block, s.input_group)
    )
    changed = deepcopy(model)
    for result, stats in zip(results, seen, strict=True):
        inputs, floats = (run(m, tokens[:4], result.spec.name) for m in (changed, model))
        scale = inputs.square().sum().item()
        hessian, drift = inputs.T @ inputs, (floats - inputs).T @ inputs
        assert (stats.hessian - hessian).abs().max() < 1e-5 * scale
        assert (stats.drift - drift).abs().max() < 1e-5 * scale
        assert stats.n_tokens == 4 * 40
        stream = residual_stream(result.spec.name)
        assert (stats.residual is None) == (stream is None)
        if stream is not None:
            owed = run(model, tokens[:4], stream) - run(changed, tokens[:4], stream)
            missed = (stats.residual - owed.T @ inputs).norm()
            assert missed < 1e-3 * (owed.norm() * inputs.norm() + 1e-6)
            assert (owed.T @ inputs).norm() >= 0.03 * owed.norm() * inputs.norm()
        put(changed, result)
    assert (drift.norm() / hessian.norm()) > 0.01  # far above the tolerance


def test_both_streams_end_as_the_outputs_of_the_two_models(decoder, model, tokens):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    schemes[decoder.linears[4].name] = QuantScheme(16)
    for needs_drift, first in ((True, 0), (False, 4)):
        results, seen, streams = walk(decoder, tokens, schemes, needs_drift=needs_drift)
        assert len(seen) == len(results) - 1 and all((s.drift is None) != needs_drift for s in seen)
        changed = deepcopy(model)
        for result in results:
            put(changed, result)
        torch.testing.assert_close(streams.quantized, run(changed, tokens), rtol=1e-4, atol=1e-4)
        floating = run(model, tokens)
        torch.testing.assert_close(streams.floating[first:], floating[first:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(streams.quantized[4:], floating[4:], atol=1e-2)


def test_a_linear_of_16_bits_keeps_its_weight_and_needs_no_statistics(decoder, model, tokens):
    schemes = {spec.name: QuantScheme(16) for spec in decoder.linears}
    results, seen, streams = walk(decoder, tokens, schemes)
    assert not seen
    assert torch.equal(streams.quantized[4:], streams.floating[4:])  # held-out: same weights
    for result in results:
        assert torch.equal(result.weight, model.get_submodule(result.spec.name).weight)
