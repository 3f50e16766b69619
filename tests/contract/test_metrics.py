"""The laws of every sensitivity metric, and an oracle for each."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from oracles import kl_per_token, proxy_loss
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import gptq, rtn
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.sensitivity import METRICS, fisher, measured_kl, output_error
from lwquant.sensitivity.augmented_hessian import augmented_hessian
from lwquant.sensitivity.delta_loss import delta_loss
from lwquant.sensitivity.embedding_delta import embedding_delta, layer_input_modification
from lwquant.sensitivity.outlier_count import outlier_count, share_beyond_one
from lwquant.types import LayerStats

SCHEMES = (QuantScheme(2, 32), QuantScheme(3, 32), QuantScheme(4, 32), QuantScheme(16))
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    return Decoder.open(open_checkpoint(tiny_folder))


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer, heldout_text):
    ids = tiny_tokenizer(heldout_text[:6000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 8 * 48]).view(8, 48)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def measurements(decoder, tokens):
    return {name: metric(decoder, tokens, SCHEMES, rtn) for name, metric in METRICS.items()}


@pytest.mark.parametrize("name", METRICS)
def test_costs_are_finite_not_negative_and_zero_for_16_bits(name, measurements, decoder):
    costs = measurements[name].costs
    assert costs.shape == (len(decoder.linears), len(SCHEMES)) and costs.dtype == torch.float64
    assert costs.isfinite().all() and (costs >= 0).all()
    assert not costs[:, -1].any() and costs[:, :-1].all()


@pytest.mark.parametrize("name", METRICS)
def test_costs_fall_with_bits(name, measurements):
    costs = measurements[name].costs
    falls = (costs[:, 1:] < costs[:, :-1]).double().mean()
    # Measured ones may tie within noise for single linears, never on the whole.
    assert falls == 1 or name in ("measured_kl", "delta_loss")
    assert falls > 0.9
    totals = costs.sum(0)
    assert (totals[1:] < totals[:-1]).all()


@every_metric
def test_a_menu_of_16_bits_alone_costs_nothing(metric, decoder, tokens):
    costs = metric(decoder, tokens[:2], (QuantScheme(16),), rtn).costs
    assert costs.shape == (len(decoder.linears), 1) and not costs.any()


@every_metric
def test_the_order_of_the_samples_does_not_matter(metric, decoder, tokens, measurements):
    name = next(name for name, entry in METRICS.items() if entry is metric)
    shuffled = metric(decoder, tokens[torch.randperm(len(tokens))], SCHEMES, rtn).costs
    torch.testing.assert_close(shuffled, measurements[name].costs, rtol=2e-3, atol=1e-9)


@every_metric
def test_a_zero_weight_costs_nothing(metric, tiny_folder, tokens):
    broken = Decoder.open(open_checkpoint(tiny_folder))
    silent = broken.linears[3].name
    read = broken._read

    def zeroed(name, shape):
        tensor = read(name, shape)
        return torch.zeros_like(tensor) if name == f"{silent}.weight" else tensor

    broken._read = zeroed
    costs = metric(broken, tokens[:2], SCHEMES, rtn).costs
    assert not costs[3].any() and costs[7:, 0].all()


def test_embedding_delta_is_minus_the_cosine_of_block_input_and_output(decoder, tokens, model):
    states = model(tokens, output_hidden_states=True).hidden_states
    blocks = [*pairwise(states[:-1])]  # the last state comes after the norm
    scores = embedding_delta(decoder, tokens, SCHEMES).scores
    for (before, after), score in zip(blocks, scores, strict=False):
        each = [
            -(a @ b) / (a.norm() * b.norm())
            for a, b in zip(
                before.flatten(0, 1).double(), after.flatten(0, 1).double(), strict=True
            )
        ]
        assert score == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)
    same = torch.randn(2, 5, 8)
    assert layer_input_modification(same, same) == pytest.approx(-1)
    assert layer_input_modification(same, -same, flatten=True) == pytest.approx(1)
    before, after = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    flat = -torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    assert layer_input_modification(before, after, flatten=True) == pytest.approx(flat.item(), 1e-4)
    tail = layer_input_modification(before[:, 1:], after[:, 1:])
    assert layer_input_modification(before, after, skip_first=True) == pytest.approx(tail)


def test_outlier_count_is_the_share_of_weights_one_deviation_above_the_mean(decoder, model):
    values = torch.tensor([0.0] * 8 + [1.0, 5.0])  # mean .6, deviation 1.5: only 5 is beyond
    assert share_beyond_one(values) == pytest.approx(0.1)
    assert share_beyond_one(-values) == 0 and share_beyond_one(-values, True) == pytest.approx(0.1)
    assert share_beyond_one(torch.ones(5)) == 0
    scores = outlier_count(decoder, None, SCHEMES).scores
    layer = model.model.layers[1]
    matrices = [m.weight.flatten() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    pooled = torch.cat(matrices).double()
    wanted = ((pooled - pooled.mean()) / pooled.std(correction=0) > 1).double().mean()
    assert scores[1] == pytest.approx(-wanted.item(), abs=1e-6)
    apart = outlier_count(decoder, None, SCHEMES, pooled=False, two_sided=True).scores
    shares = [((m - m.mean()).abs() > m.std(correction=0)).double().mean() for m in matrices]
    assert apart[1] == pytest.approx(-torch.stack(shares).mean().item(), abs=1e-4)


def _inputs(model, tokens, name):
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, a: caught.append(a[0]))
    model(tokens)
    handle.remove()
    return caught[0].flatten(0, -2).double()


@torch.no_grad()
def test_hessian_and_output_error_match_their_definitions(decoder, tokens, model, measurements):
    for row in (0, 3, 6, 13):
        spec = decoder.linears[row]
        x = _inputs(model, tokens, spec.name)
        weight = model.get_submodule(spec.name).weight
        stats = LayerStats((x.T @ x).float(), None, len(x))
        for column, scheme in enumerate(SCHEMES[:-1]):
            rounded = rtn(weight, None, scheme).dequantize()
            trace = (x**2).sum() / len(x) / x.shape[1]
            wanted = trace * (rounded - weight).double().square().sum()
            assert measurements["hessian"].costs[row, column] == pytest.approx(wanted.item(), 1e-3)
            errors = (x @ (rounded - weight).double().T).square().sum()
            energy = (x @ weight.double().T).square().sum()
            got = measurements["output_error"].costs[row, column]
            assert got == pytest.approx((errors / energy).item(), rel=1e-3)
        assert proxy_loss(weight, rounded, stats.hessian) == pytest.approx(errors.item(), 1e-3)
    chosen = output_error(decoder, tokens, SCHEMES, gptq).costs
    assert (chosen[:, :3].sum(0) < measurements["output_error"].costs[:, :3].sum(0)).all()


@torch.no_grad()
def test_measured_kl_is_the_kl_of_the_model_with_one_linear_replaced(decoder, tokens, model):
    costs = measured_kl(decoder, tokens, SCHEMES, rtn, positions=1).costs
    reference = model(tokens).logits.flatten(0, 1)
    for row in (0, 6, 20, 27):
        changed = deepcopy(model)
        module = changed.get_submodule(decoder.linears[row].name)
        module.weight.copy_(rtn(module.weight, None, SCHEMES[0]).dequantize())
        wanted = kl_per_token(reference, changed(tokens).logits.flatten(0, 1))
        assert costs[row, 0] == pytest.approx(wanted, rel=5e-3)


def test_noise_of_known_size_gives_costs_in_proportion_to_the_squared_error(decoder, tokens):
    costs = measured_kl(decoder, tokens[:2], SCHEMES, rtn, perturbation="noise").costs
    spec = decoder.linears[5]
    with decoder.loaded(spec.block) as block:
        weight = block.get_submodule(decoder.local_name(spec)).weight.clone()
    errors = [(rtn(weight, None, s).dequantize() - weight).square().sum() for s in SCHEMES[:3]]
    ratios = costs[5, :3] / costs[5, 0]
    wanted = torch.stack(errors).double() / errors[0].double()
    torch.testing.assert_close(ratios, wanted, rtol=1e-4, atol=0)


def test_fisher_is_half_the_mean_of_squared_gradients_times_squared_output_changes(
    decoder, tokens, model
):
    costs = fisher(decoder, tokens, SCHEMES, rtn, seed=7).costs
    for row in (3, 6, 17):
        name = decoder.linears[row].name
        module = model.get_submodule(name)
        change = rtn(module.weight.detach(), None, SCHEMES[1]).dequantize() - module.weight.detach()
        squares, moves = [], []
        for sample in tokens:
            caught = []
            handle = module.register_forward_hook(
                lambda _, args, out, c=caught: c.extend((args, out))
            )
            logits = model(sample[None]).logits[0]
            handle.remove()
            (inputs,), output = caught
            generator = torch.Generator().manual_seed(7 + int(sample.sum()))
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            chosen = logits.log_softmax(-1).gather(1, drawn).sum()
            (gradient,) = torch.autograd.grad(chosen, [output])
            squares.append(gradient[0].double().square())
            moves.append((inputs[0].detach().double() @ change.T.double()).square())
        of_tokens, moved = torch.cat(squares), torch.cat(moves)  # (n_tokens, out_features)
        by_token, by_output = of_tokens.sum(1, keepdim=True), of_tokens.sum(0)
        factored = by_token * by_output / by_output.sum()
        wanted = (factored * moved).sum(1).mean() / 2
        assert costs[row, 1] == pytest.approx(wanted.item(), rel=1e-2)
        in_full = (of_tokens * moved).sum(1).mean() / 2
        assert costs[row, 1] == pytest.approx(in_full.item(), rel=0.3)


def test_fisher_predicts_the_measured_kl_of_small_changes(decoder, tokens):
    """Summed over the linears, where the sampling noise of single ones averages out."""
    fine = (QuantScheme(6, 32),)
    predicted = fisher(decoder, tokens, fine, rtn).costs.sum()
    measured = measured_kl(decoder, tokens, fine, rtn, positions=1).costs.sum()
    assert 0.5 < predicted / measured < 2


@pytest.mark.parametrize("labels", ["text", "sampled"])
def test_delta_loss_is_the_slope_of_each_window_s_loss_along_the_change(
    labels, decoder, tokens, model
):
    costs = delta_loss(decoder, tokens, SCHEMES, rtn, labels=labels, seed=7).costs

    targets = []
    for window in tokens:
        generator = torch.Generator().manual_seed(7 + int(window.sum()))
        with torch.no_grad():
            probabilities = model(window[None]).logits[0].softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        targets.append(window[1:, None] if labels == "text" else drawn)

    def loss(window, target):
        log_probs = changed(window[None]).logits[0].log_softmax(-1)
        return -log_probs[: len(target)].gather(1, target).sum()

    for row in (0, 6, 18):
        changed = deepcopy(model).double()
        module = changed.get_submodule(decoder.linears[row].name)
        weight = module.weight.detach().clone()
        change = rtn(weight.float(), None, SCHEMES[1]).dequantize().double() - weight
        slopes = []
        with torch.no_grad():  # central differences
            for window, target in zip(tokens, targets, strict=True):
                ends = []
                for step in (0.02, -0.02):
                    module.weight.copy_(weight + step * change)
                    ends.append(loss(window, target))
                slopes.append((ends[0] - ends[1]) / 0.04)
        wanted = torch.stack(slopes).abs().sum() / tokens.numel()
        assert costs[row, 1] == pytest.approx(wanted.item(), rel=5e-3)


def test_augmented_costs_are_the_own_term_and_half_of_each_pair_term(decoder, tokens, model):
    few = tokens[:3]
    costs = augmented_hessian(decoder, few, SCHEMES, rtn).costs
    least = fisher(decoder, few, SCHEMES, rtn).costs / 2
    with torch.no_grad():
        p = model(few).logits.flatten(0, 1).double().softmax(-1)
    for column in (0, 2):
        slopes = []  # of the logits, along each linear's change, by central differences
        for spec in decoder.linears:
            module = model.get_submodule(spec.name)
            weight = module.weight.detach().clone()
            change = rtn(weight, None, SCHEMES[column]).dequantize() - weight
            ends = []
            with torch.no_grad():
                for step in (0.03, -0.03):
                    module.weight.copy_(weight + step * change)
                    ends.append(model(few).logits.flatten(0, 1).double())
                module.weight.copy_(weight)
            slopes.append((ends[0] - ends[1]) / 0.06)
        moves = torch.stack(slopes)  # (n_linears, n_tokens, vocab)
        centred = moves - (p * moves).sum(-1, keepdim=True)
        pairs = torch.einsum("ltv,mtv,tv->lm", centred, centred, p) / p.shape[0]
        own = pairs.diagonal() / 2
        shares = own + (pairs.sum(1) - pairs.diagonal()) / 2
        wanted = torch.maximum(shares, least[:, column])
        torch.testing.assert_close(
            costs[:, column], wanted, rtol=0.03, atol=0.003 * wanted.max().item()
        )
        assert (shares > least[:, column]).double().mean() > 0.7
        assert ((shares - own).abs() > 0.05 * own).double().mean() > 0.5  # the pairs do count


def test_augmented_costs_guide_the_search_for_the_smallest_plan_under_a_kl(
    tiny_folder, heldout_text, tmp_path
):
    result = lwquant.quantize(
        tiny_folder,
        max_kl=0.2,
        output=tmp_path / "out",
        recipe=Recipe(n_samples=4, seq_len=32, held_out=4, group_size=32, bits=(2, 3, 4, 16)),
        calibration=[heldout_text[:4000]],
        metric="augmented_hessian",
        quantizer="rtn",
        correction="none",
        progress=lambda *_: None,
    )
    assert result.report.metric["name"] == "augmented_hessian"
    assert result.held_out.kl_divergence <= 0.2 and result.bpw < 5
