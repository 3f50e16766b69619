"""The walk over the blocks against whole transformers models, quantized linear by linear."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import random_model
from transformers import AutoModelForCausalLM

from lwquant.capture.tokens import shifted_around
from lwquant.corrections import error_propagation
from lwquant.errors import RoundingError
from lwquant.importance import TokenWeighting, attention_concentration, positions
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.quantizers import gptq, rtn
from lwquant.scheme import QuantScheme
from lwquant.sequential import quantize_blocks
from lwquant.streams import Streams
from lwquant.types import QuantizedWeight

SCHEME = QuantScheme(3, 32)
N = 3  # of 6 windows, in chunks of two


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("lwquant.streams.TOKENS_PER_RUN", 80)


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
    streams = Streams.start(decoder, tokens, n_calibration=N)
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


@pytest.mark.parametrize("records", ["owed", "all"])
@pytest.mark.parametrize("correction", [None, error_propagation])
def test_statistics_are_those_of_the_model_as_quantized_so_far(
    decoder, model, tokens, correction, records
):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    results, seen, _ = walk(decoder, tokens, schemes, correction=correction, records=records)
    assert [r.spec for r in results] == sorted(
        decoder.linears, key=lambda s: (s.block, s.input_group)
    )
    changed = deepcopy(model)
    for result, stats in zip(results, seen, strict=True):
        inputs, floats = (run(m, tokens[:N], result.spec.name) for m in (changed, model))
        scale = inputs.square().sum().item()
        hessian, drift = inputs.T @ inputs, (floats - inputs).T @ inputs
        assert (stats.hessian - hessian).abs().max() < 1e-5 * scale
        stream = residual_stream(result.spec.name)
        assert (stats.drift is None) == (records == "owed" and stream is not None)
        if stats.drift is not None:
            assert (stats.drift - drift).abs().max() < 1e-5 * scale
        assert stats.n_tokens == N * 40
        # Half of each chunk's tokens: one window of the first two, half of the third.
        first = torch.cat([inputs[:40], inputs[80:100]])
        assert (stats.half.hessian - first.T @ first).abs().max() < 1e-5 * scale
        assert stats.half.n_tokens == 60 and stats.rest().n_tokens == 60
        assert (stats.owed is None) == (stream is None)
        if stream is not None:
            weight = model.get_submodule(result.spec.name).weight.detach().double()
            owed = run(model, tokens[:N], stream) - run(changed, tokens[:N], stream)
            owed = owed + (floats - inputs) @ weight.T
            missed = (stats.owed - owed.T @ inputs).norm()
            assert missed < 1e-3 * (owed.norm() * inputs.norm() + 1e-6)
            assert (owed.T @ inputs).norm() >= 0.03 * owed.norm() * inputs.norm()
        put(changed, result)
    assert (drift.norm() / hessian.norm()) > 0.01  # far above the tolerance


@torch.no_grad()
def around(model, tokens, block, name):
    """What the block puts out besides the linear's own output, (tokens, hidden)."""
    caught = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: caught.update(
                {path: out[0] if isinstance(out, tuple) else out}
            )
        )
        for path in (block, name)
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return (caught[block] - caught[name]).flatten(0, 1).double()


@pytest.mark.parametrize(
    ("kind", "blocks", "ends"),
    [
        ("gpt_neox", "gpt_neox.layers", ("attention.dense", "dense_4h_to_h")),  # side by side
        ("gpt2", "transformer.h", ("mlp.c_proj",)),  # Conv1D
    ],
)
def test_the_residual_of_other_wirings_is_the_rest_of_the_blocks_output(
    kind, blocks, ends, tmp_path
):
    folder = random_model(kind, tmp_path)
    decoder = Decoder.open(open_checkpoint(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(512, (6, 40), generator=torch.Generator().manual_seed(0))
    schemes = {spec.name: QuantScheme(2, 32) for spec in decoder.linears}
    results, seen, _ = walk(decoder, tokens, schemes, records="owed")
    changed = deepcopy(model)
    checked = 0
    for result, stats in zip(results, seen, strict=True):
        name, block = result.spec.name, f"{blocks}.{result.spec.block}"
        if name.endswith(ends):
            inputs, floats = (run(m, tokens[:N], name) for m in (changed, model))
            weight = get_weight(model.get_submodule(name)).double()
            owed = around(model, tokens[:N], block, name) - around(changed, tokens[:N], block, name)
            owed = owed + (floats - inputs) @ weight.T
            missed = (stats.owed - owed.T @ inputs).norm()
            assert missed < (1e-5 + 2e-3 * owed.norm()) * inputs.norm()
            checked += 1
        weight = result.weight.dequantize()
        with torch.no_grad():
            set_weight(changed.get_submodule(name), weight)
    assert checked == decoder.n_blocks * len(ends)


def test_repairing_the_residual_stream_lowers_the_error_on_other_text(
    decoder, tiny_tokenizer, heldout_text, monkeypatch
):
    monkeypatch.setattr("lwquant.streams.TOKENS_PER_RUN", 2048)
    ids = tiny_tokenizer(heldout_text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 110 * 64]).view(110, 64)
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    errors = []
    for correction in (None, partial(error_propagation, repair_residual=False), error_propagation):
        streams = Streams.start(decoder, windows, n_calibration=90)
        for _ in quantize_blocks(decoder, streams, schemes, rtn, correction):
            pass
        errors.append((streams.quantized[90:] - streams.floating[90:]).square().sum().item())
    assert errors[2] < 0.95 * errors[1] < 0.95 * 0.95 * errors[0]


def test_both_streams_end_as_the_outputs_of_the_two_models(decoder, model, tokens):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    schemes[decoder.linears[4].name] = QuantScheme(16)
    for records, first in (("all", 0), ("owed", 0), ("inputs", N)):
        results, seen, streams = walk(decoder, tokens, schemes, records=records)
        assert len(seen) == len(results) - 1
        assert {s.drift is None for s in seen} == {
            "all": {False},
            "owed": {False, True},
            "inputs": {True},
        }[records]
        changed = deepcopy(model)
        for result in results:
            put(changed, result)
        torch.testing.assert_close(streams.quantized, run(changed, tokens), rtol=1e-4, atol=1e-4)
        floating = run(model, tokens)
        torch.testing.assert_close(streams.floating[first:], floating[first:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(streams.quantized[N:], floating[N:], atol=1e-2)


def test_a_linear_of_16_bits_keeps_its_weight_and_needs_no_statistics(decoder, model, tokens):
    schemes = {spec.name: QuantScheme(16) for spec in decoder.linears}
    results, seen, streams = walk(decoder, tokens, schemes)
    assert not seen
    assert torch.equal(streams.quantized[N:], streams.floating[N:])  # held-out: same weights
    for result in results:
        assert torch.equal(result.weight, model.get_submodule(result.spec.name).weight)


@pytest.mark.parametrize("correction", [None, error_propagation])
def test_token_weights_enter_all_sums_of_a_block_alike(decoder, model, tokens, correction):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    weighting = TokenWeighting(attention_concentration, 0.05)
    results, seen, _ = walk(decoder, tokens, schemes, correction=correction, weighting=weighting)
    changed = deepcopy(model)
    changed.set_attn_implementation("eager")
    block, weights = -1, torch.empty(0)
    for result, stats in zip(results, seen, strict=True):
        if result.spec.block != block:  # before any linear of the block is changed
            block = result.spec.block
            with torch.no_grad():
                attention = changed(tokens[:N], output_attentions=True).attentions[block].double()
            got = attention.sum((1, 2))  # (N, 40)
            low, high = got.amin(1, keepdim=True), got.amax(1, keepdim=True)
            shares = 0.05 + 0.95 * (got - low) / (high - low)
            weights = (shares / shares.mean(1, keepdim=True)).flatten()[:, None]
        inputs, floats = (run(m, tokens[:N], result.spec.name) for m in (changed, model))
        scale = (inputs.square() * weights).sum().item()
        hessian, drift = inputs.T @ (weights * inputs), (floats - inputs).T @ (weights * inputs)
        assert (stats.hessian - hessian).abs().max() < 1e-5 * scale
        assert (inputs.T @ inputs - hessian).abs().max() > 1e-3 * scale  # weights matter
        if correction is not None:
            assert (stats.drift - drift).abs().max() < 1e-5 * scale
            half = torch.cat([torch.arange(40), torch.arange(80, 100)])
            first = inputs[half].T @ (weights[half] * inputs[half])
            assert (stats.half.hessian - first).abs().max() < 1e-5 * scale
        stream = residual_stream(result.spec.name)
        if correction is not None and stream is not None:
            weight = model.get_submodule(result.spec.name).weight.detach().double()
            owed = run(model, tokens[:N], stream) - run(changed, tokens[:N], stream)
            owed = owed + (floats - inputs) @ weight.T
            missed = (stats.owed - owed.T @ (weights * inputs)).norm()
            assert missed < 1e-3 * (owed.norm() * (weights * inputs).norm() + 1e-6)
        put(changed, result)


def test_shifted_copies_of_a_window_stay_in_its_half(decoder, model, tokens):
    every = shifted_around(tokens[:3], 2)
    streams = Streams.start(decoder, torch.cat([every, tokens[3:]]), n_calibration=6, copies=2)
    schemes, seen = {spec.name: SCHEME for spec in decoder.linears}, []

    def spy(weight, stats, scheme):
        seen.append(stats)
        return rtn(weight, stats, scheme)

    first = next(quantize_blocks(decoder, streams, schemes, spy, records="owed")).spec
    inputs = run(model, every, first.name)
    half = inputs.view(6, 40, -1)[[0, 2, 3, 5]].flatten(0, 1)  # windows 0 and 2, both times
    scale = inputs.square().sum().item()
    assert seen[0].half.n_tokens == 160 and seen[0].n_tokens == 240
    assert (seen[0].half.hessian - half.T @ half).abs().max() < 1e-5 * scale
    assert (seen[0].hessian - inputs.T @ inputs).abs().max() < 1e-5 * scale


def test_a_setting_that_no_importance_takes_is_named_with_the_block(decoder, tokens):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    weighting = TokenWeighting(partial(positions, first=2.0))
    with pytest.raises(RoundingError, match=r"tokens of block 0: first=2\.0"):
        walk(decoder, tokens, schemes, weighting=weighting)


@pytest.mark.parametrize("records", ["inputs", "owed", "all"])
def test_after_learned_rounding_the_streams_are_those_of_what_is_returned(
    decoder, model, tokens, records
):
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    schemes[decoder.linears[4].name] = QuantScheme(16)
    plain, _, _ = walk(decoder, tokens, schemes, records=records)
    results, _, streams = walk(decoder, tokens, schemes, records=records, polish=12)
    changed = deepcopy(model)
    for result in results:
        put(changed, result)
    torch.testing.assert_close(streams.quantized, run(changed, tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streams.floating, run(model, tokens), rtol=1e-4, atol=1e-4)
    assert [r.spec for r in results] == [r.spec for r in plain]
    moved = 0
    for result, before in zip(results, plain, strict=True):
        if isinstance(result.weight, QuantizedWeight):
            moved += not torch.equal(result.weight.dequantize(), before.weight.dequantize())
        else:
            assert torch.equal(result.weight, before.weight)
    assert moved > 0


def test_nothing_of_a_block_is_given_out_before_its_rounding_is_learned(
    decoder, tokens, monkeypatch
):
    learned = []

    def spy(run, linears, inputs, wanted, *, steps):
        assert len(inputs) == len(wanted) == N and steps == 5
        learned.append(set(linears))
        return {name: replace(one.start, notes=("learned",)) for name, one in linears.items()}

    monkeypatch.setattr("lwquant.sequential.tune_block", spy)
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    streams = Streams.start(decoder, tokens, n_calibration=N)
    for result in quantize_blocks(decoder, streams, schemes, rtn, polish=5):
        assert len(learned) == result.spec.block + 1 and result.spec.name in learned[-1]
        assert result.weight.notes == ("learned",)


def test_learned_rounding_lowers_the_error_on_other_text(decoder, tiny_tokenizer, heldout_text):
    ids = tiny_tokenizer(heldout_text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 220 * 64]).view(220, 64)
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    errors = []
    for polish in (0, 40):
        streams = Streams.start(decoder, windows, n_calibration=160)
        for _ in quantize_blocks(decoder, streams, schemes, gptq, error_propagation, polish=polish):
            pass
        errors.append((streams.quantized[160:] - streams.floating[160:]).square().sum().item())
    assert errors[1] < 0.95 * errors[0]
