"""A checkpoint goes in, a smaller model that transformers loads comes out."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, random_model
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    LwquantError,
    OutputError,
    PlanError,
    UnsupportedModelError,
)
from lwquant.export.folder import verify
from lwquant.held_out import measure_plan
from lwquant.inspection import inspect_folder
from lwquant.nn.linear import QuantizedLinear
from lwquant.recipe import Recipe
from lwquant.rounding import rounding_of
from lwquant.scheme import QuantScheme
from lwquant.streams import first_half

SMALL = Recipe(n_samples=12, seq_len=96, held_out=6, sensitivity_samples=8, group_size=32)
QUIET = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, heldout_text):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(heldout_text[:16000])
    return str(path)


@pytest.fixture(scope="module")
def test_text(tmp_path_factory, heldout_text):
    path = tmp_path_factory.mktemp("text") / "test.txt"
    path.write_text(heldout_text[16000:])
    return path


@pytest.fixture(scope="module")
def made(tiny_folder, calibration, tmp_path_factory):
    """One run at 3.6 bits, shared by the tests that only look at it."""
    output = tmp_path_factory.mktemp("made") / "out"
    return lwquant.quantize(
        tiny_folder, bpw=3.6, output=output, recipe=SMALL, calibration=calibration, **QUIET
    )


def quantized(folder, output, calibration, **arguments):
    recipe = arguments.pop("recipe", SMALL)
    return lwquant.quantize(
        folder, output=output, recipe=recipe, calibration=calibration, **QUIET, **arguments
    )


def test_the_budget_is_kept_and_counts_every_stored_bit(made):
    assert made.bpw <= 3.6 and made.bpw > 3.5
    tensors = load_file(made.folder / "model.safetensors")
    packed = [t for n, t in tensors.items() if n.endswith((".qweight", ".scales", ".zeros"))]
    stored = sum(t.numel() * t.element_size() * 8 for t in packed)
    weights = sum(
        t.numel()
        for n, t in load_file(made_from(made) / "model.safetensors").items()
        if n.endswith("_proj.weight")
    )
    assert stored / weights == pytest.approx(made.bpw, abs=1e-9)


def made_from(result) -> Path:
    return Path(json.loads((result.folder / "lwquant.json").read_text())["base_model"])


def test_the_result_loads_generates_and_is_complete(made, tiny_tokenizer):
    verify(made.folder)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    prompt = tiny_tokenizer("The function", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 5
    assert (made.folder / "tokenizer.json").exists()


def test_perplexity_and_kl_on_other_text_are_small_and_fall_with_bits(
    made, tiny_folder, calibration, test_text, tmp_path
):
    coarse = quantized(tiny_folder, tmp_path / "2", calibration, bpw=2.7)
    results = [
        lwquant.evaluate(
            folder, text=test_text, reference=tiny_folder, seq_len=96, windows=8, cache=None
        )
        for folder in (coarse.folder, made.folder)
    ]
    assert results[0].kl_divergence > 2 * results[1].kl_divergence > 0
    assert results[1].kl_divergence < 0.15
    assert results[1].perplexity < 1.15 * results[1].reference_perplexity
    assert math.isclose(results[1].bpw, made.bpw)


def test_the_kl_seen_while_quantizing_is_the_kl_of_the_saved_model(
    made, tiny_folder, calibration, tiny_tokenizer, integer_kernels
):
    from lwquant.prepare import open_model, prepare_tokens

    opened = open_model(tiny_folder)
    held_out = prepare_tokens(opened, replace(SMALL, sources=(calibration,))).held_out
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def kl() -> float:
        with torch.no_grad():
            p = original(held_out).logits[:, :-1].log_softmax(-1)
            q = model(held_out).logits[:, :-1].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    chosen = {name: layer.activation_bits for name, layer in linears.items()}
    assert chosen == {
        name: linear.activation_bits
        for name, linear in inspect_folder(made.folder).linears.items()
        if linear.activation_bits is not None
    }
    assert 8 in chosen.values()
    config = model.config.quantization_config.to_dict()
    narrow = {name for name, layer in linears.items() if layer.int8_weights}
    assert narrow == set(config["int8_weights"]) and narrow
    said = inspect_folder(made.folder).linears
    assert {name: linear.int8_weights for name, linear in said.items() if linear.int8_weights} == (
        dict.fromkeys(narrow, True)
    )
    with_eight = kl()
    lwquant.set_activation_bits(model, 16)
    assert kl() == pytest.approx(made.held_out.kl_divergence, rel=1e-3)
    assert with_eight != kl() and with_eight == pytest.approx(kl(), rel=0.05)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_user_may_choose_the_width_of_activations(tiny_folder, calibration, tmp_path, bits):
    made = quantized(tiny_folder, tmp_path / "out", calibration, bpw=4, activation_bits=bits)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    found = {m.activation_bits for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert found == {bits}
    with pytest.raises(lwquant.LwquantError, match="activation_bits=4 is not 8, 16, or 0"):
        quantized(tiny_folder, tmp_path / "no", calibration, bpw=4, activation_bits=4)
    with pytest.raises(ValueError, match="activation bits 4 are not one of"):
        lwquant.set_activation_bits(model, 4)


def test_tuned_scales_are_saved_noted_and_bring_the_model_closer(
    tiny_folder, calibration, tmp_path
):
    from lwquant.prepare import open_model, prepare_tokens

    settings = {"bits": (2, 3), "allocator": "uniform", "quantizer": "gptq", "tune": 48}
    settings |= {"fine_zeros": (), "activation_bits": 16}
    recipe = replace(SMALL, sources=(calibration,), **settings)
    tuned = quantized(tiny_folder, tmp_path / "out", calibration, bpw=2.8, recipe=recipe)
    assert "scales tuned together on 48 further windows" in inspect_notes(tuned.folder)
    opened = open_model(tiny_folder)
    windows = prepare_tokens(opened, recipe)
    rows = [
        {tuple(row) for row in part.tolist()}
        for part in (windows.calibration.tokens, windows.tuning, windows.held_out)
    ]
    assert len(rows[1]) == 48 and not rows[0] & rows[1] and not rows[1] & rows[2]
    rounding = rounding_of(recipe.quantizer, recipe.correction)
    plain = measure_plan(
        opened.decoder, tuned.plan, rounding, windows.calibration.tokens, windows.held_out
    )
    assert tuned.held_out.kl_divergence < 0.97 * plain.kl_divergence
    model = AutoModelForCausalLM.from_pretrained(tuned.folder)
    with torch.no_grad():
        found = model(windows.held_out).logits[:, :-1].log_softmax(-1)
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        wanted = original(windows.held_out).logits[:, :-1].log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert kl == pytest.approx(tuned.held_out.kl_divergence, rel=1e-3)


def test_learned_rounding_is_saved_noted_and_brings_the_model_closer(
    tiny_folder, calibration, tmp_path
):
    from lwquant.prepare import open_model, prepare_tokens

    recipe = replace(
        SMALL,
        sources=(calibration,),
        bits=(3, 4),
        allocator="uniform",
        quantizer="gptq",
        n_samples=24,
        polish=60,
        activation_bits=16,
    )
    learned = quantized(tiny_folder, tmp_path / "out", calibration, bpw=3.6, recipe=recipe)
    assert "rounding learned block by block, 60 steps each" in inspect_notes(learned.folder)
    opened = open_model(tiny_folder)
    windows = prepare_tokens(opened, recipe)
    plain = measure_plan(
        opened.decoder,
        learned.plan,
        rounding_of(recipe.quantizer, recipe.correction),
        windows.calibration.tokens,
        windows.held_out,
    )
    assert learned.held_out.kl_divergence < 0.95 * plain.kl_divergence
    model = AutoModelForCausalLM.from_pretrained(learned.folder)
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        found = model(windows.held_out).logits[:, :-1].log_softmax(-1)
        wanted = original(windows.held_out).logits[:, :-1].log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert kl == pytest.approx(learned.held_out.kl_divergence, rel=1e-3)


def test_the_bnb_recipe_mixes_nf4_with_int8_rows_and_the_result_runs(
    tiny_folder, calibration, tmp_path
):
    settings = {"n_samples": 12, "seq_len": 96, "held_out": 6, "sensitivity_samples": 8}
    result = quantized(
        tiny_folder, tmp_path / "out", calibration, bpw=5.5, recipe="bnb", **settings
    )
    assert {s.label for s in result.plan.schemes.values()} >= {"nf4-g64", "8b-row-sym"}
    assert result.bpw <= 5.5 and result.held_out.kl_divergence < 0.05
    tensors = load_file(result.folder / "model.safetensors")
    names = [n for n in tensors if n.endswith((".qweight", ".scales", ".zeros"))]
    assert not any(n.endswith(".zeros") for n in names)
    packed = AutoModelForCausalLM.from_pretrained(result.folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    n_weights = stored = 0
    with torch.no_grad():
        for name, scheme in result.plan.schemes.items():
            weight = plain.get_submodule(name).weight
            n_weights += weight.numel()
            if scheme.is_float:
                stored += 16 * weight.numel()
                continue
            stored += sum(8 * tensors[n].nbytes for n in names if n.startswith(name + "."))
            weight.copy_(packed.get_submodule(name).dequantize())
        assert stored / n_weights == pytest.approx(result.bpw, abs=1e-9)
        tokens = torch.randint(512, (2, 48))
        got, wanted = packed(tokens).logits, plain(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    found = json.loads((result.folder / "lwquant.json").read_text())
    assert found["quantizer"] == {"name": "bnb"}
    assert {entry["codebook"] for entry in found["linears"].values()} == {"nf4", ""}
    records = inspect_folder(result.folder).linears
    assert all(records[n].scheme.codebook == s.codebook for n, s in result.plan.schemes.items())
    # The plan that was written is one that can be read, and refused by what has no such codes.
    plan = {"plan": result.folder / "plan.json"}
    again = quantized(
        tiny_folder, tmp_path / "again", calibration, recipe="bnb", **plan, **settings
    )
    assert again.plan.schemes == result.plan.schemes and again.bpw == result.bpw
    for wrong, message in (({"quantizer": "hqq"}, "nf4-g64 has no"), ({"polish": 5}, "polish=5")):
        recipe = replace(SMALL, **wrong)
        with pytest.raises(LwquantError, match=message):
            quantized(tiny_folder, tmp_path / "no", calibration, recipe=recipe, **plan)
    with pytest.raises(LwquantError, match="nf4-g64 has no even steps"):
        report = result.folder / "sensitivity.json"
        recipe = replace(SMALL, quantizer="hqq")
        quantized(tiny_folder, tmp_path / "no", calibration, bpw=5, recipe=recipe, report=report)
    assert not (tmp_path / "no").exists()


def test_gptq_with_a_codebook_and_tuned_scales_comes_closer_than_bnb(
    tiny_folder, calibration, tmp_path
):
    recipe = replace(
        SMALL,
        sources=(calibration,),
        bits=(4, 16),
        codebook="nf4",
        quantizer="gptq",
        allocator="uniform",
        tune=24,
    )
    plain = replace(recipe, quantizer="bnb", correction="none", tune=0)
    runs = [
        quantized(tiny_folder, tmp_path / name, calibration, bpw=4.33, recipe=chosen)
        for name, chosen in (("gptq", recipe), ("bnb", plain))
    ]
    assert runs[0].bpw == runs[1].bpw
    assert {s.label for s in runs[0].plan.schemes.values()} == {"nf4-g32-s8"}
    assert runs[0].held_out.kl_divergence < 0.7 * runs[1].held_out.kl_divergence


def inspect_notes(folder):
    return json.loads((folder / "lwquant.json").read_text())["notes"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_goes_through_the_whole_pipeline(kind, tmp_path, calibration):
    folder = random_model(kind, tmp_path / "model")
    recipe = replace(SMALL, n_samples=3, seq_len=24, held_out=2, sensitivity_samples=2)
    result = quantized(folder, tmp_path / "out", calibration, bpw=6.5, recipe=recipe)
    assert result.bpw <= 6.5
    widths = {scheme.bits for scheme in result.plan.schemes.values()}
    assert len(widths) > 1
    tokens = torch.randint(512, (2, 24))
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(result.folder)(tokens).logits
        wanted = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    error = (got - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
    assert error < 0.1


def test_guided_hessians_are_used_and_noted(tiny_folder, calibration, tmp_path):
    made = [
        quantized(
            tiny_folder, tmp_path / str(guided), calibration, bpw=3.0, allocator="uniform", **given
        )
        for guided, given in ((0, {}), (2, {"guided": 2}))
    ]
    expected = "calibration tokens weighted by gradients, in 2 row groups"
    assert [expected in inspect_notes(one.folder) for one in made] == [False, True]
    codes = [
        load_file(one.folder / "model.safetensors")["model.layers.1.mlp.down_proj.qweight"]
        for one in made
    ]
    assert not torch.equal(*codes)


def test_weighted_tokens_and_shifted_windows_are_used_and_noted(
    tiny_folder, calibration, tmp_path, monkeypatch
):
    halved = []

    def spy(n_samples, seq_len, copies):
        halved.append((n_samples, copies))
        return first_half(n_samples, seq_len, copies)

    monkeypatch.setattr("lwquant.streams.first_half", spy)
    weighted = {"token_importance": {"name": "attention_concentration", "skip_first": True}}
    runs = {"plain": {}, "weighted": weighted, "expanded": {"expand": 2}}
    made = {
        name: quantized(
            tiny_folder, tmp_path / name, calibration, bpw=3.0, allocator="uniform", **settings
        )
        for name, settings in runs.items()
    }
    notes = {name: inspect_notes(one.folder) for name, one in made.items()}
    expected = "calibration tokens weighted by attention_concentration (skip_first True, floor 0.1)"
    assert expected in notes["weighted"] and expected not in notes["plain"]
    assert "each calibration window used 2 times, shifted around" in notes["expanded"]
    assert halved == [(2 * SMALL.n_samples, 2)]
    codes = {
        name: load_file(one.folder / "model.safetensors")["model.layers.1.mlp.down_proj.qweight"]
        for name, one in made.items()
    }
    assert not torch.equal(codes["weighted"], codes["plain"])
    assert not torch.equal(codes["expanded"], codes["plain"])


@pytest.mark.parametrize("correction", ["none", "qep", "gptaq"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_quantizers_and_corrections_compose(
    quantizer, correction, tiny_folder, calibration, tmp_path
):
    plan = {name: QuantScheme(3, 32) for name in names_of(tiny_folder)}
    plan = lwquant.BitPlan(plan, 0.0)
    arguments = {"plan": plan, "quantizer": quantizer, "correction": correction}
    if (quantizer, correction) == ("rtn", "gptaq"):
        with pytest.raises(LwquantError, match="gptq"):
            quantized(tiny_folder, tmp_path / "out", calibration, **arguments)
        return
    got = quantized(tiny_folder, tmp_path / "out", calibration, **arguments)
    assert 0 < got.held_out.kl_divergence < (0.5 if quantizer == "rtn" else 0.3)


def names_of(folder):
    return [
        n.removesuffix(".weight")
        for n in load_file(folder / "model.safetensors")
        if n.endswith("_proj.weight")
    ]


def test_gptq_beats_rounding_and_the_mixed_plan_beats_uniform(tiny_folder, calibration, tmp_path):
    uniform = lwquant.BitPlan({n: QuantScheme(3, 32) for n in names_of(tiny_folder)}, 0.0)

    def kl(name, **arguments):
        result = quantized(tiny_folder, tmp_path / name, calibration, **arguments)
        return result.held_out.kl_divergence, result.bpw

    rtn, _ = kl("rtn", plan=uniform, quantizer="rtn", correction="none")
    gptq, _ = kl("gptq", plan=uniform, correction="none")
    even, _ = kl("even", bpw=3.6, allocator="uniform")
    mixed, mixed_bpw = kl("mixed", bpw=3.6)
    assert gptq < 0.9 * rtn
    assert mixed < 0.95 * even and mixed_bpw <= 3.6


def test_every_stage_can_be_edited_and_fed_back(made, tiny_folder, calibration, tmp_path):
    plan = json.loads((made.folder / "plan.json").read_text())
    name = next(n for n, entry in plan["linears"].items() if entry["bits"] < 8)
    plan["linears"][name]["bits"] = 8
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    got = quantized(tiny_folder, tmp_path / "out", calibration, plan=tmp_path / "plan.json")
    assert got.plan.schemes[name].bits == 8 and got.bpw > made.bpw
    again = quantized(
        tiny_folder,
        tmp_path / "two",
        calibration,
        report=made.folder / "sensitivity.json",
        bpw=3.6,
    )
    assert again.plan.schemes == made.plan.schemes


def test_the_same_seed_gives_the_same_bytes(made, tiny_folder, calibration, tmp_path):
    again = quantized(tiny_folder, tmp_path / "again", calibration, bpw=3.6)
    first = (made.folder / "model.safetensors").read_bytes()
    assert (again.folder / "model.safetensors").read_bytes() == first


def test_a_size_budget_bounds_the_weight_files(tiny_folder, calibration, tmp_path):
    result = quantized(tiny_folder, tmp_path / "out", calibration, size="0.5MB")
    files = result.folder.glob("*.safetensors")
    assert 0.45e6 < result.size_bytes == sum(path.stat().st_size for path in files) <= 0.5e6
    with pytest.raises(BudgetError, match="below the floor.*MB"):
        quantized(tiny_folder, tmp_path / "none", calibration, size="10kB")


def test_a_kl_limit_finds_the_smallest_model_that_keeps_it(tiny_folder, calibration, tmp_path):
    strict = quantized(tiny_folder, tmp_path / "a", calibration, max_kl=0.02)
    loose = quantized(tiny_folder, tmp_path / "b", calibration, max_kl=0.2)
    assert strict.held_out.kl_divergence <= 0.02 and loose.held_out.kl_divergence <= 0.2
    assert loose.bpw < strict.bpw - 0.3
    assert loose.held_out.kl_divergence > 0.1  # not far below the limit: smaller was possible


def test_tied_and_pinned_linears_are_obeyed(tiny_folder, calibration, tmp_path):
    pin = "model.layers.2.mlp.down_proj"
    recipe = replace(SMALL, tie_fused=True, pins={pin: 8})
    plan = quantized(tiny_folder, tmp_path / "out", calibration, bpw=4.0, recipe=recipe).plan
    assert plan.schemes[pin].bits == 8
    for block in range(4):
        roles = [f"model.layers.{block}.self_attn.{r}_proj" for r in "qkv"]
        assert len({plan.schemes[name] for name in roles}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bpw": 1.0}, BudgetError, r"below the floor.*reaches 2\.\d+ to 16"),
        ({"bpw": 17}, BudgetError, "above the ceiling"),
        ({}, BudgetError, "exactly one"),
        ({"bpw": 3, "size": "1MB"}, BudgetError, "exactly one"),
        ({"bpw": -1}, BudgetError, "above 0"),
        ({"bpw": 3.5, "metric": "magic"}, LwquantError, "unknown metric 'magic'"),
        ({"bpw": 3.5, "allocator": "best"}, LwquantError, "unknown allocator"),
        ({"bpw": 3.5, "seq_len": 100_000}, CalibrationError, "100000"),
        ({"size": "lots"}, BudgetError, "lots"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(
    arguments, error, message, tiny_folder, calibration, tmp_path
):
    with pytest.raises(error, match=message):
        quantized(tiny_folder, tmp_path / "out", calibration, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_the_model_is_even_looked_for(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty"):
        lwquant.quantize(tmp_path / "no-model", bpw=3, output=tmp_path / "out", **QUIET)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_nan_weights_and_foreign_architectures_are_refused_early(tmp_path, calibration):
    folder = random_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight"):
        quantized(folder, tmp_path / "out", calibration, bpw=4)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        quantized(folder, tmp_path / "out", calibration, bpw=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update({"model.layers.9.x": {"bits": 3}}), "no linear 'model.layers.9.x'"),
        (lambda e: e.pop("model.layers.0.mlp.up_proj"), "up_proj' is missing"),
        (lambda e: e["model.layers.0.mlp.up_proj"].update(bits=11), "bits=11"),
        (lambda e: e["model.layers.0.mlp.up_proj"].pop("bits"), "up_proj"),
        (lambda e: e.update({"model.layers.0.mlp.up_proj": 3}), "up_proj"),
    ],
)
def test_an_edited_plan_with_mistakes_is_refused(
    edit, message, made, tiny_folder, calibration, tmp_path
):
    plan = json.loads((made.folder / "plan.json").read_text())
    edit(plan["linears"])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=message):
        quantized(tiny_folder, tmp_path / "out", calibration, plan=tmp_path / "plan.json")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_nothing_that_looks_whole(tiny_folder, calibration, tmp_path):
    script = (
        "import lwquant, sys, time\n"
        "def slow(stage, *_):\n"
        "    print(stage, flush=True)\n"
        "    if stage == 'quantize': time.sleep(60)\n"
        f"lwquant.quantize({str(tiny_folder)!r}, bpw=4, output={str(tmp_path / 'out')!r},\n"
        f"    calibration={calibration!r}, metric='outlier_count', n_samples=8, seq_len=64,\n"
        "    group_size=32, progress=slow)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("quantize"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".out.partial") for path in tmp_path.iterdir())
