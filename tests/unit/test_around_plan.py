"""Costs around a plan, against whole-model autograd and sums written from the definition."""

import pytest
import torch
from tiny_models import random_model
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.errors import LwquantError
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.prepare import OpenModel
from lwquant.quantizers import rtn
from lwquant.recipe import Recipe
from lwquant.remeasure import remeasured
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.around_plan import around_plan, shares
from lwquant.sensitivity.information import Information
from lwquant.types import BitPlan, SensitivityReport

SCHEMES = tuple(QuantScheme(bits, 32) for bits in (2, 3, 4, 16))
QUIET = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer, heldout_text):
    ids = tiny_tokenizer(heldout_text[:6000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 6 * 48]).view(6, 48)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_costs_are_those_of_autograd_through_the_whole_quantized_model(kind, tmp_path):
    random_model(kind, tmp_path)
    decoder = Decoder.open(open_checkpoint(tmp_path))
    tokens = torch.randint(0, decoder.vocab_size, (3, 16), generator=torch.Generator())
    plan = {spec.name: SCHEMES[i % 3] for i, spec in enumerate(decoder.linears)}
    costs = around_plan(decoder, tokens, SCHEMES, rtn, plan).costs

    float_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    flip = kind == "gpt2"  # Conv1D stores (in_features, out_features)
    weights, changes, inputs, gradients = {}, {}, {}, {}
    for spec in decoder.linears:
        module = model.get_submodule(spec.name)
        weight = module.weight.detach().clone()
        weight = weight.T if flip else weight
        changes[spec] = {
            s: rtn(weight, None, s).dequantize() - weight if not s.is_float else 0 * weight
            for s in SCHEMES
        }
        rounded = weight + changes[spec][plan[spec.name]]
        module.weight.data = (rounded.T if flip else rounded).contiguous()
        weights[spec] = module.weight

        def record(_, args, output, spec=spec):
            windows = inputs.setdefault(spec, [])
            place = len(windows)  # gradients come in another order
            windows.append(args[0].detach().flatten(0, 1))
            output.register_hook(lambda g: gradients.update({(spec, place): g.flatten(0, 1)}))

        module.register_forward_hook(record)
    drawn = 0
    for window in tokens:
        log_probs = model(window[None]).logits[0].log_softmax(-1)
        generator = torch.Generator().manual_seed(int(window.sum()))
        y = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        drawn = drawn + log_probs.gather(1, y).sum()
    drawn.backward()
    squares = {
        spec: torch.cat([gradients[spec, place] for place in range(3)]).square()
        for spec in decoder.linears
    }
    hessians = {spec: torch.cat(inputs[spec]) for spec in decoder.linears}
    model.zero_grad()
    with torch.no_grad():
        target = float_model(tokens).logits.log_softmax(-1)
    predicted = model(tokens).logits.log_softmax(-1)
    ((target.exp() * (target - predicted)).sum() / tokens.numel()).backward()

    # The statistics of a block are taken with its own linears not rounded yet, so compare the
    # first-order part exactly and the second-order part where the inputs are the block's own.
    for row, spec in enumerate(decoder.linears):
        if spec.input_group != 0:
            continue
        slope = weights[spec].grad.T if flip else weights[spec].grad
        x = hessians[spec]
        own = {}
        current = changes[spec][plan[spec.name]]

        def energy(change, spec=spec, x=x):
            by_token, by_output = squares[spec].sum(1, keepdim=True), squares[spec].sum(0)
            factored = by_token * by_output / by_output.sum()
            return 0.5 * ((x @ change.T).square() * factored).sum(1).mean().item()

        for scheme in SCHEMES:
            step = changes[spec][scheme] - current
            alone = (slope * step).sum().item() + energy(step)
            own[scheme] = 0.5 * alone + 0.5 * energy(changes[spec][scheme])
        expected = [max(0.0, own[s] - own[SCHEMES[-1]]) for s in SCHEMES]
        torch.testing.assert_close(costs[row].tolist(), expected, rtol=2e-3, atol=2e-7)


def test_shares_split_each_pair_term_evenly_and_add_up():
    """Two scalar linears with KL = ½a·e² + ½b·f² + c·e·f: every term is known."""
    a, b, c = 3.0, 5.0, 2.0
    e, f = 0.4, -0.3  # the changes in the model
    menu = torch.tensor([0.4, 0.1, -0.2])

    def information(slope):
        found = Information()
        found.add(torch.ones(1, 1), torch.tensor([[slope]]).sqrt())
        return found

    got = shares(
        menu.view(3, 1, 1),
        torch.tensor([[e]]),
        torch.tensor([[a * e + c * f]]),
        information(a),
    )
    expected = [0.5 * a * x * x + 0.5 * c * x * f for x in menu.tolist()]
    torch.testing.assert_close(got.tolist(), expected)
    other = shares(
        torch.tensor([[[f]]]),
        torch.tensor([[f]]),
        torch.tensor([[b * f + c * e]]),
        information(b),
    )
    total = 0.5 * a * e * e + 0.5 * b * f * f + c * e * f
    assert got[0] + other[0] == pytest.approx(total)


def test_costs_are_finite_not_negative_and_zero_for_16_bits(tiny_folder, tokens):
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    plan = {spec.name: SCHEMES[0] for spec in decoder.linears}
    costs = around_plan(decoder, tokens, SCHEMES, rtn, plan).costs
    assert costs.shape == (len(decoder.linears), len(SCHEMES)) and costs.dtype == torch.float64
    assert costs.isfinite().all() and (costs >= 0).all() and not costs[:, -1].any()
    assert (costs.sum(0).diff() < 0).all()
    shuffled = around_plan(decoder, tokens.flip(0), SCHEMES, rtn, plan).costs
    torch.testing.assert_close(shuffled, costs, rtol=2e-3, atol=1e-6)


def test_each_round_measures_around_the_plan_of_the_mean_costs(tiny_folder, monkeypatch):
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    opened = OpenModel("tiny", tiny_folder, decoder.source, decoder, None)
    blank = torch.zeros(len(decoder.linears), len(SCHEMES), dtype=torch.float64)
    report = SensitivityReport(decoder.linears, SCHEMES, blank, {"name": "old"}, scores=(1.0,))
    seen = []

    def fake(decoder, tokens, schemes, quantizer, plan, *, progress):
        seen.append(plan)
        return type("M", (), {"costs": blank + float(len(seen))})()

    def plan_of(report):
        level = report.costs.mean().item()
        return BitPlan({spec.name: level for spec in decoder.linears}, 3.0)

    monkeypatch.setattr("lwquant.remeasure.around_plan", fake)
    start = BitPlan({spec.name: 0.0 for spec in decoder.linears}, 3.0)
    made = remeasured(opened, report, start, plan_of, rtn, None, 3, lambda *_: None)
    assert [next(iter(plan.values())) for plan in seen] == [0.0, 1.0, 1.5]
    assert (made.costs == 2.0).all() and made.scores is None
    assert made.metric == {"name": "around_plan", "rounds": 3}


def test_the_plan_taken_is_the_one_whose_model_is_closest(tiny_folder, heldout_text, tmp_path):
    recipe = Recipe(n_samples=8, seq_len=64, held_out=6, group_size=32, remeasure=2)
    result = lwquant.quantize(
        tiny_folder,
        bpw=3.3,
        output=tmp_path / "out",
        recipe=recipe.changed(quantizer="rtn", correction="none"),
        calibration=[heldout_text[:12000]],
        **QUIET,
    )
    (note,) = [n for n in result.plan.notes if n.startswith("held-out KL of candidate plans")]
    values = [float(word.rstrip(",")) for word in note.split() if word[0] == "0"]
    assert len(values) == 3 and values[0] == min(values)
    assert result.held_out.kl_divergence == pytest.approx(values[0], abs=6e-5)
    assert result.bpw <= 3.3
    if "costs measured around the plan" in note.split("(taken)")[0]:
        assert result.report.metric == {"name": "around_plan", "rounds": 2}


def test_what_cannot_remeasure_refuses(tiny_folder, tmp_path):
    recipe = Recipe(remeasure=1)
    with pytest.raises(LwquantError, match="remeasure=1 needs a budget in bpw or size"):
        lwquant.quantize(tiny_folder, max_kl=0.1, output=tmp_path / "a", recipe=recipe)
    with pytest.raises(LwquantError, match="remeasure=1 is for one budget"):
        lwquant.sweep(tiny_folder, bpw=[3], output=tmp_path / "b", recipe=recipe)
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    costs = torch.zeros(len(decoder.linears), len(SCHEMES))
    report = SensitivityReport(decoder.linears, SCHEMES, costs, {})
    with pytest.raises(LwquantError, match="remeasure=1 needs the model"):
        lwquant.plan(report, bpw=3.0, recipe=recipe)
    with pytest.raises(LwquantError, match="remeasure=-1 must be at least 0"):
        Recipe(remeasure=-1)
