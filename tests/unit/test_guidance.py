"""Token weights from gradients against whole-model autograd, and the walk that uses them."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from tiny_models import random_model
from transformers import AutoModelForCausalLM

from lwquant.capture.row_groups import row_groups
from lwquant.corrections import CORRECTIONS, error_propagation
from lwquant.errors import LwquantError
from lwquant.guidance import guidance, normalized
from lwquant.held_out import quantize_with
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.quantizers import QUANTIZERS, gptq, rtn
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.sequential import quantize_blocks
from lwquant.streams import Streams
from lwquant.types import BitPlan, QuantizedWeight, join_rows

SCHEME = QuantScheme(3, 32)
EVEN_STEPS = {name: one for name, one in QUANTIZERS.items() if name != "bnb"}
N, SEQ_LEN, GROUPS = 3, 24, 3
TOKENS = torch.randint(512, (N + 1, SEQ_LEN), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("lwquant.streams.TOKENS_PER_RUN", 2 * SEQ_LEN)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return random_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def decoder(folder):
    return Decoder.open(open_checkpoint(folder))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gradients(model, names, window, seed):
    """d Σ log p(drawn) / dy of each named linear in float64, (seq_len, out_features)."""
    caught, handles = {}, []
    for name in names:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: caught.update({name: out})
            )
        )
    logits = model(window[None]).logits[0]
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(seed + int(window.sum()))
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    chosen = logits.log_softmax(-1).gather(1, drawn).sum()
    found = torch.autograd.grad(chosen, [caught[name] for name in names])
    return {name: one[0].double() for name, one in zip(names, found, strict=True)}


def weights_by_autograd(model, decoder, tokens, n_groups, seed=0):
    names = [spec.name for spec in decoder.linears]
    model = deepcopy(model)
    model.requires_grad_(True)  # so that the first block's linears have gradients too
    each = [gradients(model, names, window, seed) for window in tokens]
    weights = {}
    for name in names:
        squares = torch.stack([one[name] for one in each]).square()
        out_features = squares.shape[2]
        bounds = [k * out_features // n_groups for k in range(n_groups + 1)]
        means = [squares[..., a:b].mean(2) for a, b in pairwise(bounds)]
        weights[name] = torch.stack([mean / mean.mean() for mean in means], dim=2)
    return weights


@pytest.mark.parametrize("n_groups", [1, GROUPS])
def test_weights_are_the_mean_squared_gradients_of_each_group_of_rows(decoder, model, n_groups):
    found = guidance(decoder, TOKENS, n_groups, seed=3)
    wanted = weights_by_autograd(model, decoder, TOKENS, n_groups, seed=3)
    assert found.keys() == wanted.keys()
    for name, own in found.items():
        assert own.shape == (N + 1, SEQ_LEN, n_groups)
        torch.testing.assert_close(own.double(), wanted[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.mean((0, 1)), torch.ones(n_groups))
        assert own.amax((0, 1)).min() > 1.5  # far from all the same
    one, other = (own[..., 0] for own in list(found.values())[:2])
    assert (one - other).abs().max() > 0.1  # each linear has its own


@torch.no_grad()
def inputs_of(model, name):
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, a: caught.append(a[0]))
    model(TOKENS[:N])
    handle.remove()
    return caught[0].flatten(0, 1).double()


@torch.no_grad()
def outputs_around(model, block, name):
    """The residual stream before the linear adds to it: what the block puts out without it."""
    caught = []
    quiet = model.get_submodule(name).register_forward_hook(lambda _, args, out: out * 0)
    handle = model.get_submodule(block).register_forward_hook(
        lambda _, args, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    model(TOKENS[:N])
    quiet.remove(), handle.remove()
    return caught[0].flatten(0, 1).double()


@pytest.mark.parametrize("records", ["owed", "all"])
def test_each_group_of_rows_has_the_statistics_of_its_own_weights(decoder, model, records):
    weights = weights_by_autograd(model, decoder, TOKENS[:N], GROUPS)
    given = {name: own.float() for name, own in weights.items()}
    seen = []

    def spy(weight, stats, scheme):
        seen.append((weight, stats))
        return rtn(weight, stats, scheme)

    streams = Streams.start(decoder, TOKENS, n_calibration=N)
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    schemes[decoder.linears[1].name] = QuantScheme(16)
    changed, with_owed = deepcopy(model), 0
    results = list(quantize_blocks(decoder, streams, schemes, spy, records=records, guidance=given))
    for result in results:
        name = result.spec.name
        module = changed.get_submodule(name)
        if isinstance(result.weight, QuantizedWeight):
            inputs, floats = inputs_of(changed, name), inputs_of(model, name)
            weight = get_weight(model.get_submodule(name)).double()
            for group, rows in enumerate(row_groups(result.spec.out_features, GROUPS)):
                target, stats = seen.pop(0)
                torch.testing.assert_close(target.double(), weight[rows])
                weighted = weights[name][..., group].reshape(-1, 1) * inputs
                scale = (inputs * weighted).sum().item()
                assert (stats.hessian - inputs.T @ weighted).abs().max() < 1e-5 * scale
                assert (inputs.T @ inputs - stats.hessian).abs().max() > 1e-3 * scale
                if stats.drift is not None:
                    drift = (floats - inputs).T @ weighted
                    assert (stats.drift - drift).abs().max() < 1e-5 * scale
                if stats.owed is not None and name.endswith(("down_proj", "mlp.c_proj")):
                    block = name.rsplit(".", 2)[0]
                    owed = outputs_around(model, block, name) - outputs_around(changed, block, name)
                    owed = (owed + (floats - inputs) @ weight.T)[:, rows]
                    missed = (stats.owed - owed.T @ weighted).norm()
                    assert missed < 1e-3 * (owed.norm() * weighted.norm() + 1e-6)
                    with_owed += 1
                assert (stats.drift is None) == (records == "owed" and stats.owed is not None)
            with torch.no_grad():
                set_weight(module, result.weight.dequantize())
    assert not seen and with_owed == decoder.n_blocks * GROUPS
    with torch.no_grad():
        base = changed.model if hasattr(changed, "model") else changed.transformer
        norm = base.norm if hasattr(base, "norm") else base.ln_f
        torch.testing.assert_close(
            norm(streams.quantized), base(TOKENS).last_hidden_state, rtol=1e-3, atol=1e-3
        )


def walked(decoder, quantizer, correction=None, scheme=SCHEME, **settings):
    streams = Streams.start(decoder, TOKENS, n_calibration=N)
    schemes = {spec.name: scheme for spec in decoder.linears}
    results = quantize_blocks(decoder, streams, schemes, quantizer, correction, **settings)
    return [result.weight for result in results]


@pytest.mark.parametrize(("n_groups", "correction"), [(1, error_propagation), (4, None)])
def test_equal_gradients_change_nothing(decoder, n_groups, correction):
    equal = {spec.name: torch.ones(N, SEQ_LEN, n_groups) for spec in decoder.linears}
    plain = walked(decoder, gptq, correction)
    same = walked(decoder, gptq, correction, guidance=equal)
    for one, other in zip(plain, same, strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
        assert torch.equal(one.zeros, other.zeros)


@pytest.mark.parametrize("correction", [None, *CORRECTIONS.values()], ids=["none", *CORRECTIONS])
@pytest.mark.parametrize("quantizer", EVEN_STEPS.values(), ids=EVEN_STEPS)
@pytest.mark.parametrize("n_groups", [1, GROUPS])
def test_every_quantizer_and_correction_rounds_each_group_of_rows_by_itself(
    decoder, quantizer, correction, n_groups
):
    pieces = []

    def spy(weight, stats, scheme):
        pieces.append(quantizer(weight, stats, scheme))
        return pieces[-1]

    given = guidance(decoder, TOKENS[:N], n_groups)
    results = walked(decoder, spy, correction, guidance=given)
    assert len(pieces) == n_groups * len(results)
    plain = walked(decoder, quantizer, correction)
    for number, result in enumerate(results):
        own = pieces[number * n_groups : (number + 1) * n_groups]
        assert torch.equal(result.codes, torch.cat([piece.codes for piece in own]))
        assert torch.equal(result.dequantize(), torch.cat([piece.dequantize() for piece in own]))
        assert result.codes.shape == plain[number].codes.shape
    uses_data = quantizer in (gptq, QUANTIZERS["quantease"]) or correction is not None
    moved = any(
        not torch.equal(one.codes, other.codes) for one, other in zip(results, plain, strict=True)
    )
    assert moved == uses_data


def test_a_recipe_weighs_the_calibration_windows_alone(decoder):
    recipe = Recipe(guided=2, quantizer="gptq", correction="none", scale_bits=16, group_size=32)
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    plan = BitPlan(schemes, 3.5)
    streams = Streams.start(decoder, TOKENS, n_calibration=N)
    done = list(quantize_with(decoder, streams, plan, recipe.rounding()))
    wanted = walked(decoder, gptq, guidance=guidance(decoder, TOKENS[:N], 2))
    for one, other in zip(done, wanted, strict=True):
        assert torch.equal(one.weight.codes, other.codes)


def test_more_groups_than_rows_are_refused_with_the_linear(decoder):
    with pytest.raises(LwquantError, match=f"{decoder.linears[0].name}: guided=999"):
        guidance(decoder, TOKENS, 999)


def test_a_group_without_any_gradient_counts_all_tokens_alike():
    squares = torch.rand(2, 3, 2)
    squares[..., 1] = 0
    scaled = normalized(squares)
    assert torch.equal(scaled[..., 1], torch.ones(2, 3))
    torch.testing.assert_close(scaled[..., 0], squares[..., 0] / squares[..., 0].mean())


def test_joined_rows_keep_their_order_and_say_each_thing_once():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 32, generator=generator)
    parts = [rtn(weight[rows], None, SCHEME) for rows in row_groups(7, 2)]
    noted = [
        QuantizedWeight(p.scheme, p.codes, p.scales, p.zeros, (note, "both"))
        for p, note in zip(parts, ("a", "b"), strict=True)
    ]
    joined = join_rows(noted)
    assert torch.equal(joined.dequantize(), rtn(weight, None, SCHEME).dequantize())
    assert joined.notes == ("a", "both", "b")
