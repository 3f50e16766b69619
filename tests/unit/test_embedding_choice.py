"""How many bits embedding and head get within a size, or under a limit on the KL.

The oracles run whole models of transformers and try every width.
"""

from __future__ import annotations

import re

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lwquant
from lwquant import embedding_choice
from lwquant.embedding_choice import NARROWER, STATISTICS, WINDOWS, with_best_embeddings
from lwquant.errors import BudgetError, UnsupportedModelError
from lwquant.export.record import read_run
from lwquant.model.embeddings import find_embeddings
from lwquant.nn.embedding import QuantizedEmbedding
from lwquant.nn.linear import QuantizedLinear
from lwquant.prepare import Windows, open_model, prepare_tokens
from lwquant.progress import silent
from lwquant.quantizers.rtn import rtn
from lwquant.recipe import load_recipe
from lwquant.rounded_embeddings import embedding_scheme, head_stats, round_embeddings
from lwquant.sensitivity import KL_METRICS, METRICS
from lwquant.sensitivity.report import read_report
from lwquant.stages import plan_report, problem_for

SETTINGS = {
    "n_samples": 12,
    "seq_len": 48,
    "held_out": 4,
    "sensitivity_samples": 4,
    "quantizer": "gptq",
    "correction": "none",
    "group_size": 32,
    "activation_bits": 16,
}
RECIPE = load_recipe("default").changed(**SETTINGS)


@pytest.fixture(scope="module")
def english(heldout_text) -> dict:
    return {"calibration": [heldout_text], "progress": silent, **SETTINGS}


@pytest.fixture(scope="module")
def report(tiny_folder, english):
    return lwquant.measure_model(tiny_folder, **english)


@pytest.fixture(scope="module")
def drawn(tiny_folder, heldout_text) -> Windows:
    return prepare_tokens(open_model(tiny_folder), RECIPE, [heldout_text], silent)


@pytest.fixture(scope="module")
def windows(drawn) -> Tensor:
    return drawn.calibration.tokens


def logits_of(model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(row[None]).logits[0] for row in tokens])


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over the predicted tokens of logits (n, seq, vocab)."""
    p, q = p[:, :-1].double().log_softmax(-1), q[:, :-1].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_head_statistics_are_of_what_the_head_reads(kind, tmp_path):
    folder = tiny_models.random_model(kind, tmp_path / "source")
    decoder = open_model(folder).decoder
    tokens = torch.arange(60).view(3, 20)
    found = head_stats(decoder, decoder.last_hidden(tokens))
    model = AutoModelForCausalLM.from_pretrained(folder)
    read = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    logits_of(model, tokens)
    inputs = torch.cat(read).flatten(0, 1).double()
    wanted = torch.einsum("ti,tj->ij", inputs, inputs)
    assert found.n_tokens == 60
    torch.testing.assert_close(found.hessian.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_head_errs_less_on_what_it_reads_and_a_mere_table_is_rounded(kind, tmp_path):
    folder = tiny_models.random_model(kind, tmp_path / "source")
    decoder = open_model(folder).decoder
    stats = head_stats(decoder, decoder.last_hidden(torch.arange(480).view(4, 120)))
    rounded = round_embeddings(decoder, 4, stats)
    nearest = {
        name: rtn(decoder.model.get_parameter(f"{name}.weight"), None, rounded.scheme, search=True)
        for name in rounded.places.names
    }

    def error(weight: Tensor, name: str) -> float:
        change = (weight - decoder.model.get_parameter(f"{name}.weight")).double()
        return torch.trace(change @ stats.hessian.double() @ change.T).item()

    modules, places = rounded.modules, rounded.places
    table = modules[places.table](torch.arange(512))
    if places.tied:
        assert {*modules} == {places.table, places.head} and len(nearest) == 1
        assert error(table, places.table) < 0.8 * error(
            nearest[places.table].dequantize(), places.table
        )
    else:
        assert torch.equal(table, nearest[places.table].dequantize())
        head = modules[places.head].dequantize()
        assert error(head, places.head) < 0.8 * error(
            nearest[places.head].dequantize(), places.head
        )


def own_kl(folder, bits: int, windows: Tensor) -> float:
    """What rounding embedding and head costs, by whole models of transformers."""
    if bits == 16:
        return 0.0
    decoder = open_model(folder).decoder
    stats = head_stats(decoder, decoder.last_hidden(windows[:STATISTICS]))
    modules = round_embeddings(decoder, bits, stats).modules
    original, changed = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    places = find_embeddings(changed)
    changed.config.tie_word_embeddings = False
    table = modules[places.table](torch.arange(original.config.vocab_size))
    head = table if places.tied else modules[places.head].dequantize()
    changed.get_submodule(places.table).weight = torch.nn.Parameter(table)
    changed.get_submodule(places.head).weight = torch.nn.Parameter(head)
    last = windows[-WINDOWS:]
    return kl(logits_of(original, last), logits_of(changed, last))


def bytes_beside(folder, bits: int) -> int:
    """Of all but the linears, from what is stored."""
    opened = open_model(folder)
    decoder = opened.decoder
    places = find_embeddings(decoder.model)
    shapes = [decoder.model.get_parameter(f"{name}.weight").shape for name in places.names]
    if bits == 16:
        return opened.other_bytes
    scheme = embedding_scheme(bits)
    float_bytes = sum(4 * rows * columns for rows, columns in shapes)
    packed = sum(
        4 * rows * -(-columns * bits // 32) + rows * scheme.row_scales(columns)
        for rows, columns in shapes
    )
    return opened.other_bytes - float_bytes + packed


@pytest.mark.parametrize("share", [0.14, 0.18, 0.25, 0.5])
def test_within_a_size_the_bits_of_least_predicted_kl_are_taken(
    share, tiny_folder, english, report, drawn, windows, tmp_path
):
    opened = open_model(tiny_folder)
    whole = opened.source.size_bytes
    limit = int(share * whole)
    made = lwquant.quantize(
        tiny_folder, size=limit, output=tmp_path / "out", report=report, **english
    )
    assert made.size_bytes <= limit
    predicted = {}
    for bits in (16, *NARROWER):
        left = 8 * (limit - bytes_beside(tiny_folder, bits)) / opened.n_weights
        ceiling = problem_for(report, RECIPE).bounds()[1] / opened.n_weights
        try:
            plan = plan_report(report, min(left - 0.002 * left, ceiling), recipe=RECIPE)
        except BudgetError:
            continue
        predicted[bits] = own_kl(tiny_folder, bits, windows) + sum(plan.costs.values())
    best = min(predicted, key=predicted.get)
    run = read_run(made.folder)
    chosen = run.embedding_bits or 16
    assert chosen == best or predicted[chosen] < 1.02 * predicted[best]
    words = "as they are" if chosen == 16 else f"in {chosen} bits"
    (note,) = [note for note in run.notes if note.startswith("embedding and head")]
    assert note in made.notes and note.startswith(f"embedding and head {words}: predicted KL ")
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    packed = isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert packed == (chosen != 16)
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    measured = kl(*(logits_of(m, drawn.held_out) for m in (original, model)))
    assert made.held_out.kl_divergence == pytest.approx(measured, rel=0.02)


def test_fewer_bits_are_taken_within_less(tiny_folder, english, report, tmp_path):
    whole = open_model(tiny_folder).source.size_bytes
    found = []
    for share in (0.14, 0.2, 0.4):
        made = lwquant.quantize(
            tiny_folder,
            size=int(share * whole),
            output=tmp_path / f"{share}",
            report=report,
            **english,
        )
        found.append(read_run(made.folder).embedding_bits or 16)
    assert found == sorted(found) and found[0] < found[-1]


def test_a_limit_on_the_kl_is_kept_with_fewer_bytes(tiny_folder, english, report, tmp_path):
    made = {
        bits: lwquant.quantize(
            tiny_folder,
            max_kl=0.1,
            output=tmp_path / f"{bits}",
            report=report,
            embedding_bits=bits,
            **english,
        )
        for bits in (0, 16)
    }
    for result in made.values():
        assert result.held_out.kl_divergence <= 0.1
    assert made[0].size_bytes < 0.8 * made[16].size_bytes
    assert read_run(made[16].folder).embedding_bits is None
    bits = read_run(made[0].folder).embedding_bits
    assert bits in NARROWER
    start = f"embedding and head in {bits} bits: predicted "
    (note,) = [note for note in made[0].notes if note.startswith(start)]
    assert "MB as they are" in note


def test_the_fewest_bytes_are_predicted_from_what_rounding_leaves(tiny_folder, report, windows):
    limit = 0.04
    opened = open_model(tiny_folder)
    chosen = with_best_embeddings(opened, report, RECIPE, windows, max_kl=limit)
    steps = torch.linspace(2.6, 8, 200).tolist()
    plans = [plan_report(report, bpw, recipe=RECIPE) for bpw in steps]
    needed = {}
    for bits in (16, *NARROWER):
        own = own_kl(tiny_folder, bits, windows)
        for bpw, plan in zip(steps, plans, strict=True):
            if own + sum(plan.costs.values()) <= limit:
                needed[bits] = (bytes_beside(tiny_folder, bits) + bpw * opened.n_weights / 8) / 1e6
                break
    assert own > 0.1 * limit
    best = min(needed, key=needed.get)
    (note,) = chosen.notes
    assert chosen.embedding_bits == best
    shown = {int(bits): float(size) for size, bits in re.findall(r"([\d.]+) MB in (\d) bits", note)}
    shown[best] = float(re.search(r": predicted ([\d.]+) MB", note)[1])
    for bits, size in shown.items():
        assert size == pytest.approx(needed[bits], rel=0.008)


@pytest.mark.parametrize("budget", [{"bpw": 4}, {"plan": "made"}])
def test_budgets_of_the_linears_leave_them_as_they_are(
    budget, tiny_folder, english, report, tmp_path
):
    if "plan" in budget:
        budget = {"plan": plan_report(report, 4, recipe=RECIPE)}
    made = lwquant.quantize(
        tiny_folder, **budget, output=tmp_path / "out", report=report, **english
    )
    assert read_run(made.folder).embedding_bits is None
    assert not any("embedding" in note for note in made.notes)


def test_costs_that_are_no_kl_are_not_compared_with_one(tiny_folder, english, tmp_path):
    opened = open_model(tiny_folder)
    limit = opened.other_bytes + 4 * opened.n_weights // 8
    made = lwquant.quantize(
        tiny_folder, size=limit, output=tmp_path / "out", metric="output_error", **english
    )
    assert read_run(made.folder).embedding_bits is None
    assert any("costs by output_error cannot be compared" in note for note in made.notes)


def test_models_that_cannot_have_them_rounded_are_left_and_it_is_said(
    tiny_folder, english, report, tmp_path, monkeypatch
):
    opened = open_model(tiny_folder)
    limit = opened.other_bytes + 4 * opened.n_weights // 8

    def refuse(*_):
        raise UnsupportedModelError("no such head")

    for module in (embedding_choice, lwquant.prepare, lwquant.rounded_embeddings):
        monkeypatch.setattr(module, "find_embeddings", refuse)
    made = lwquant.quantize(
        tiny_folder, size=limit, output=tmp_path / "out", report=report, **english
    )
    assert read_run(made.folder).embedding_bits is None and made.size_bytes <= limit
    assert "embedding and head stay as they are: no such head" in made.notes
    with pytest.raises(BudgetError, match="below the floor"):
        lwquant.quantize(
            tiny_folder, size=opened.other_bytes, output=tmp_path / "no", report=report, **english
        )
    with pytest.raises(UnsupportedModelError, match="no such head"):
        lwquant.quantize(
            tiny_folder, bpw=4, output=tmp_path / "no", report=report, embedding_bits=8, **english
        )


def test_impossible_sizes_are_refused_before_anything_is_measured(tiny_folder, english, tmp_path):
    opened = open_model(tiny_folder)

    def nothing(*_, **__):
        raise AssertionError("something was measured")

    settings = {**english, "metric": nothing, "output": tmp_path / "no"}
    least = opened.other_bytes_with(4)
    with pytest.raises(BudgetError, match=r"embeddings and head in 4 bits, norms\) takes 0.0 MB"):
        lwquant.quantize(tiny_folder, size=least, **settings)
    with pytest.raises(BudgetError, match="is below the floor: this menu"):
        lwquant.quantize(tiny_folder, size=least + opened.n_weights // 4, **settings)
    with pytest.raises(BudgetError, match="is above the ceiling"):
        lwquant.quantize(tiny_folder, size="1GB", **settings)
    with pytest.raises(BudgetError, match="in 16 bits, norms"):
        lwquant.quantize(tiny_folder, size=least * 2, embedding_bits=16, **settings)
    with pytest.raises(AssertionError, match="something was measured"):
        lwquant.quantize(tiny_folder, size=least + opened.n_weights // 2, **settings)


def test_a_size_that_only_embeddings_can_fill(tmp_path, english):
    """Linears at 16 bits and a rounded embedding may be less than was asked for."""
    folder = tiny_models.random_model("llama", tmp_path / "source")
    opened = open_model(folder)
    limit = opened.other_bytes_with(8) + 2 * opened.n_weights + 40_000
    assert limit < opened.other_bytes + opened.n_weights
    made = lwquant.quantize(folder, size=limit, output=tmp_path / "out", **english)
    run = read_run(made.folder)
    assert run.embedding_bits == 8 and made.bpw == 16 and made.size_bytes <= limit
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    inner = [m for m in model.model.modules() if isinstance(m, QuantizedLinear)]
    assert not inner


def test_the_metrics_that_are_kl_are_listed():
    assert {*METRICS} >= KL_METRICS
    assert {*METRICS} - KL_METRICS >= {"output_error", "hessian", "relevance", "delta_loss"}


def test_a_report_may_come_from_a_file(tiny_folder, english, report, tmp_path):
    first = lwquant.quantize(
        tiny_folder, bpw=4, output=tmp_path / "first", report=report, **english
    )
    known = first.folder / "sensitivity.json"
    assert read_report(known).metric["name"] in KL_METRICS
    limit = open_model(tiny_folder).source.size_bytes // 5
    made = lwquant.quantize(
        tiny_folder, size=limit, output=tmp_path / "out", report=known, **english
    )
    assert read_run(made.folder).embedding_bits in NARROWER
