"""Whole folders in the format of another engine, and the one engine that runs here in tests."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hub_server import hub_server, use_hub
from safetensors.torch import load_file
from tiny_models import random_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lwquant
from lwquant.cli import app
from lwquant.errors import LwquantError, OutputError
from lwquant.export.card import model_card
from lwquant.export.dialects import DIALECTS
from lwquant.export.folder import verify, write_manifest
from lwquant.export.record import EVALUATION_FILE, read_evaluation, read_run

SMALL = lwquant.Recipe(
    n_samples=4, seq_len=64, held_out=1, sensitivity_samples=2, group_size=32, sources=("builtin",)
)
# What all dialects have.
FLOAT = "model.layers.1.mlp.down_proj"
COMMON = replace(SMALL, bits=(2, 3, 4, 8, 16), fine_zeros=())


def quantized(model, folder, recipe, bpw=4.0):
    return lwquant.quantize(model, bpw=bpw, output=folder, recipe=recipe).folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    recipe = replace(COMMON, pins={FLOAT: 16})
    return quantized(llama, tmp_path_factory.mktemp("made") / "out", recipe, 6.0)


@pytest.fixture(scope="module")
def rounded(llama, tmp_path_factory):
    """With embedding and head in six bits."""
    recipe = replace(COMMON, embedding_bits=6)
    return quantized(llama, tmp_path_factory.mktemp("rounded") / "out", recipe)


@pytest.mark.parametrize("to", DIALECTS)
def test_a_folder_is_complete_and_says_what_it_takes(made, tmp_path, to):
    done = lwquant.convert(made, tmp_path / "out", to=to)
    verify(done.path)
    assert done.path == tmp_path / "out"
    config = json.loads((done.path / "config.json").read_text())
    own = json.loads((made / "config.json").read_text())
    for key in own.keys() - {"quantization_config"}:
        assert config[key] == own[key]
    if to == "mlx":  # which looks for it there
        assert config["rope_theta"] == own["rope_parameters"]["rope_theta"]
    tensors = load_file(done.path / "model.safetensors")
    before = load_file(made / "model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight", f"{FLOAT}.weight"):
        assert torch.equal(tensors[name], before[name])
    linears = own["quantization_config"]["linears"]
    model = AutoModelForCausalLM.from_pretrained(made)
    shapes = {name: model.get_submodule(name) for name in linears}
    n_weights = sum(module.in_features * module.out_features for module in shapes.values())
    of_linears = [t for key, t in tensors.items() if key.rpartition(".")[0] in linears]
    assert done.bpw == pytest.approx(8 * sum(t.nbytes for t in of_linears) / n_weights)
    assert done.size_bytes == (done.path / "model.safetensors").stat().st_size
    record, evaluation = read_run(done.path), read_evaluation(done.path)
    assert (record.format, record.bpw, record.size_bytes) == (to, done.bpw, done.size_bytes)
    assert (evaluation.bpw, evaluation.size_bytes) == (done.bpw, done.size_bytes)
    assert evaluation.perplexity == read_evaluation(made).perplexity
    assert any(to in note and "before" in note for note in record.notes)
    assert set(done.notes) <= set(record.notes)
    for name in ("tokenizer.json", "plan.json", "sensitivity.json"):
        assert (done.path / name).read_bytes() == (made / name).read_bytes()


def test_transformers_runs_compressed_tensors_with_the_same_weights(llama, tmp_path):
    pytest.importorskip("compressed_tensors")
    recipe = replace(SMALL, symmetric=True)
    folder = quantized(llama, tmp_path / "own", recipe)
    done = lwquant.convert(folder, tmp_path / "out", to="compressed-tensors")
    own, other = map(AutoModelForCausalLM.from_pretrained, (folder, done.path))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        other(ids)  # unpacks
        lwquant.set_activation_bits(own, 16)
        assert torch.allclose(own(ids).logits, other(ids).logits, atol=2e-3)
    widths = set()
    for name, scheme in own.config.quantization_config.schemes.items():
        widths.add(scheme.bits)
        if not scheme.is_float:
            assert torch.equal(
                own.get_submodule(name).dequantize(), other.get_submodule(name).weight
            )
    assert len(widths) > 2


@pytest.mark.parametrize("to", DIALECTS)
def test_rounded_tables_stay_rounded_where_the_format_can_say_it(rounded, tmp_path, to):
    done = lwquant.convert(rounded, tmp_path / "out", to=to)
    tensors = load_file(done.path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    own = AutoModelForCausalLM.from_pretrained(rounded).model.embed_tokens
    config = json.loads((done.path / "config.json").read_text())
    if DIALECTS[to].rounded_embeddings:
        assert read_run(done.path).embedding_bits == 6
        assert config["quantization"]["model.embed_tokens"] == {"group_size": 64, "bits": 6}
        assert table.shape[1] == own.embedding_dim * 6 // 32
        assert done.bpw < 6  # of the linears: the table's bits would be a fifth more
        assert not any("embedding" in note for note in done.notes)
    else:
        assert read_run(done.path).embedding_bits is None
        every = torch.arange(own.num_embeddings)
        assert torch.equal(table, own(every).to(table.dtype))
        assert any("embedding" in note for note in done.notes)


def test_tables_in_groups_that_the_format_has_not_are_unpacked(tiny_folder, tmp_path):
    """96 inputs in groups of 64."""
    folder = quantized(tiny_folder, tmp_path / "own", replace(COMMON, embedding_bits=8))
    done = lwquant.convert(folder, tmp_path / "out", to="mlx")
    assert any("embedding" in note for note in done.notes)
    assert "model.embed_tokens.scales" not in load_file(done.path / "model.safetensors")


def test_the_card_says_how_the_engine_loads_it(made, tmp_path):
    for to, words in (("mlx", "mlx_lm"), ("gptq", "GPTQModel"), ("compressed-tensors", "'compr")):
        folder = lwquant.convert(made, tmp_path / to, to=to).path
        card = model_card(read_run(folder), None, {}, repo_id="ann/tiny")
        assert words in card and '("ann/tiny")' in card and "import lwquant" not in card
        assert f'"mixed-precision", "{to}"]' in card


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_converted_folder_is_pushed(made, tmp_path, monkeypatch):
    for to in DIALECTS:
        folder = lwquant.convert(made, tmp_path / to, to=to).path
        with hub_server() as hub:
            use_hub(monkeypatch, hub, tmp_path / f"home-{to}")
            options = {"token": hub.token, "endpoint": hub.url}
            assert lwquant.push_to_hub(folder, "ann/tiny", **options).endswith("ann/tiny")
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(OutputError, match=r"config.json: has"):
            lwquant.push_to_hub(folder, "ann/tiny", token="t")


def test_from_a_shell(made, tmp_path):
    command = ["convert", str(made), "--to", "mlx", "--output", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 0
    done = json.loads(shown.stdout)
    assert done["bpw"] == read_run(tmp_path / "out").bpw and done["notes"]
    again = CliRunner().invoke(app, [*command, "--overwrite"])
    assert again.exit_code == 0 and "converted" in again.stdout and "note: MLX" in again.stdout


@pytest.mark.parametrize("to", DIALECTS)
def test_a_recipe_of_that_name_makes_what_the_format_has(llama, tmp_path, to):
    recipe = lwquant.load_recipe(to)
    small = {name: getattr(SMALL, name) for name in ("n_samples", "seq_len", "held_out", "sources")}
    folder = quantized(llama, tmp_path / "own", replace(recipe, **small, group_size=32), 2.9)
    lwquant.convert(folder, tmp_path / "out", to=to)


def refused(folder, output, to, match, kind=LwquantError):
    with pytest.raises(kind, match=match):
        lwquant.convert(folder, output, to=to)
    assert not output.exists() and not [*output.parent.glob(".*partial*")]


def test_what_the_format_does_not_have_is_refused_by_name(llama, made, tmp_path):
    folder = quantized(llama, tmp_path / "own", replace(SMALL, bits=(2, 5)), 3.5)
    output = tmp_path / "out"
    refused(folder, output, "gptq", r"gptq cannot store model.* as 5b-g32-s8: .* 8 bits, not 5")
    refused(folder, output, "compressed-tensors", r"as 2b-g32-s8-z8: zero-points .* more; .*recipe")
    refused(made, output, "awq", r"no format 'awq': compressed-tensors, gptq, mlx")


def test_a_folder_without_quantized_linears_is_refused(llama, tmp_path):
    folder = quantized(llama, tmp_path / "own", replace(SMALL, bits=(16,)), 16)
    refused(folder, tmp_path / "out", "mlx", "own: every linear was left at 16 bits")


def test_transposed_weights_are_refused(tmp_path):
    model = random_model("gpt2", tmp_path / "gpt2")
    folder = quantized(model, tmp_path / "own", COMMON)
    refused(folder, tmp_path / "out", "mlx", r"transformer.h.0.* transposed \(Conv1D\)")


def test_only_a_complete_folder_of_ours_is_taken(made, llama, tmp_path):
    output = tmp_path / "out"
    refused(llama, output, "mlx", "no lwquant_manifest.json", OutputError)
    once = lwquant.convert(made, tmp_path / "once", to="mlx").path
    refused(once, output, "gptq", "once: is not in lwquant's own format", OutputError)
    with pytest.raises(OutputError, match="exists and is not empty"):
        lwquant.convert(made, once, to="mlx")
    assert lwquant.convert(made, once, to="gptq", overwrite=True).path == once
    made_copy = shutil.copytree(made, tmp_path / "copy")
    weights = made_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(made_copy, output, "mlx", "model.safetensors", OutputError)


def test_without_an_evaluation_none_is_made_up(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / EVALUATION_FILE).unlink()
    write_manifest(copy)
    done = lwquant.convert(copy, tmp_path / "out", to="mlx")
    assert read_evaluation(done.path) is None
