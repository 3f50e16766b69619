"""Rotations against dense matrices, the wiring they rely on, and what they must refuse."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import random_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import lwquant
from lwquant.errors import LwquantError, PlanError, TransformError
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.model.rewritten import Edit, Rewrite
from lwquant.prepare import open_model
from lwquant.recipe import Recipe, transform_of
from lwquant.transforms import rotate
from lwquant.transforms.apply import transformed
from lwquant.transforms.hadamard import hadamard_factors, random_rotation
from lwquant.transforms.wiring import block_wirings

SIZES = (1, 2, 12, 20, 28, 36, 60, 64, 96, 576, 768, 896, 960, 1536, 1600, 2048)
QUIET = {"progress": lambda *_: None}


# ---------------------------------------------------------------- matrices


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(size):
    rotation = random_rotation(size, 0)
    matrix = rotation.matrix()
    assert rotation.is_hadamard
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    some = torch.randn(size, 8, dtype=torch.float64)  # M Mᵀ v = v for these only if for all
    torch.testing.assert_close(matrix @ (matrix.T @ some), some)


@given(st.sampled_from(SIZES[:-4]), st.integers(0, 3), st.integers(0, 2**16))
def test_factors_one_by_one_are_the_dense_product(size, n_rows, seed):
    values = torch.randn(2, n_rows, size, generator=torch.Generator().manual_seed(seed))
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(size):
        dense = torch.kron(dense, factor)
    rotation = random_rotation(size, seed)
    wanted = values.double() @ (rotation.signs[:, None] * dense / size**0.5)
    torch.testing.assert_close(rotation.apply(values), wanted)


@pytest.mark.parametrize("size", [7, 92, 172])
def test_a_random_orthogonal_matrix_stands_in_where_no_hadamard_matrix_is_known(size):
    rotation = random_rotation(size, 1)
    assert not rotation.is_hadamard and hadamard_factors(size) is None
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, random_rotation(size, 1).matrix())
    assert not torch.allclose(matrix, random_rotation(size, 2).matrix())


def test_signs_follow_the_seed_and_a_size_below_one_is_refused():
    assert not torch.equal(random_rotation(64, 0).signs, random_rotation(64, 1).signs)
    with pytest.raises(ValueError, match="size=0"):
        random_rotation(0, 0)


# ---------------------------------------------------------------- what is rotated by what


def test_every_tensor_of_a_llama_is_the_product_the_definition_gives(tmp_path):
    folder = random_model("qwen2", tmp_path)  # biases on q, k and v; 4 heads of 16 on 2 of k and v
    old = load_file(folder / "model.safetensors")
    decoder, _ = transformed(Decoder.open(open_checkpoint(folder)), partial(rotate, seed=3))
    turn, head = random_rotation(64, 3).matrix(), random_rotation(16, 3).matrix()
    values, outputs = torch.block_diag(*[head] * 2), torch.block_diag(*[head] * 4)
    wanted = {"model.norm.weight": torch.ones(64)}
    wanted["model.embed_tokens.weight"] = old["model.embed_tokens.weight"].double() @ turn
    gain = torch.diag(old["model.norm.weight"].double())
    wanted["lm_head.weight"] = old["lm_head.weight"].double() @ gain @ turn
    for index in range(2):
        block = {
            key.removeprefix(f"model.layers.{index}."): tensor.double()
            for key, tensor in old.items()
            if key.startswith(f"model.layers.{index}.")
        }
        first = torch.diag(block["input_layernorm.weight"]) @ turn
        second = torch.diag(block["post_attention_layernorm.weight"]) @ turn
        v_bias = values.T @ block["self_attn.v_proj.bias"]
        new = {
            "input_layernorm.weight": torch.ones(64),
            "post_attention_layernorm.weight": torch.ones(64),
            "self_attn.q_proj.weight": block["self_attn.q_proj.weight"] @ first,
            "self_attn.k_proj.weight": block["self_attn.k_proj.weight"] @ first,
            "self_attn.v_proj.weight": values.T @ block["self_attn.v_proj.weight"] @ first,
            "self_attn.q_proj.bias": block["self_attn.q_proj.bias"],
            "self_attn.k_proj.bias": block["self_attn.k_proj.bias"],
            "self_attn.v_proj.bias": v_bias,
            "self_attn.o_proj.weight": turn.T @ block["self_attn.o_proj.weight"] @ outputs,
            "mlp.gate_proj.weight": block["mlp.gate_proj.weight"] @ second,
            "mlp.up_proj.weight": block["mlp.up_proj.weight"] @ second,
            "mlp.down_proj.weight": turn.T @ block["mlp.down_proj.weight"],
        }
        wanted |= {f"model.layers.{index}.{key}": tensor for key, tensor in new.items()}
    assert set(decoder.source.names()) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(decoder.source.read(key), tensor.float(), rtol=0, atol=1e-6)


def test_a_bias_of_what_writes_the_stream_is_rotated_too(tmp_path):
    folder = random_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "attention_bias": True, "mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(changed))
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[key.replace(".weight", ".bias")] = torch.randn(tensors[key].shape[0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = Decoder.open(open_checkpoint(folder))
    after, _ = transformed(before, rotate)
    name = "model.layers.1.mlp.down_proj.bias"
    wanted = random_rotation(64, 0).apply(tensors[name])
    torch.testing.assert_close(after.source.read(name), wanted.float())


def test_fused_and_grouped_heads_are_found_where_they_are(tmp_path):
    for kind, value, first_row, size in (
        ("phi3", "self_attn.qkv_proj", 96, 16),
        ("qwen3", "self_attn.v_proj", 0, 24),
    ):
        folder = random_model(kind, tmp_path / kind)
        for wiring in block_wirings(Decoder.open(open_checkpoint(folder))):
            assert wiring.writers == ("self_attn.o_proj", "mlp.down_proj")
            heads = wiring.heads
            assert (heads.value, heads.first_row, heads.size) == (value, first_row, size)
            assert heads.output == "self_attn.o_proj"


def test_stream_and_heads_can_be_rotated_alone(tmp_path):
    folder = random_model("qwen3", tmp_path)  # tied
    before = Decoder.open(open_checkpoint(folder))
    touched = {}
    for name, settings in (("stream", {"heads": False}), ("heads", {"stream": False})):
        after, notes = transformed(before, partial(rotate, **settings))
        touched[name] = {
            key
            for key in before.source.names()
            if not torch.equal(before.source.read(key), after.source.read(key))
        }
        assert any("stored beside the embedding" in n for n in notes) == (name == "stream")
    linears = {f"self_attn.{role}_proj.weight" for role in "vo"}
    wanted = {f"model.layers.{index}.{name}" for index in range(2) for name in linears}
    assert touched["heads"] == wanted
    assert "model.embed_tokens.weight" in touched["stream"]
    with pytest.raises(TransformError, match="both off"):
        rotate(before, stream=False, heads=False)


def test_a_gain_of_one_plus_the_weight_is_folded_as_such(tmp_path, monkeypatch):
    forward = LlamaRMSNorm.forward

    def with_offset(self, hidden):
        return hidden * 0 + forward(self, hidden) / self.weight * (1 + self.weight)

    monkeypatch.setattr(LlamaRMSNorm, "forward", with_offset)
    decoder = Decoder.open(open_checkpoint(random_model("llama", tmp_path)))
    # Weights of 0 are the neutral ones now, and this stand-in divides by them.
    assert {n.offset for w in block_wirings(decoder) for n in w.norms} == {1.0}
    source = lwquant.model.rewritten.RewrittenSource(decoder.source, rotate(decoder))
    assert not source.read("model.norm.weight").any()


def test_zero_projections_are_no_reason_to_refuse(tmp_path):
    folder = random_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    transformed(Decoder.open(open_checkpoint(folder)), rotate)


def test_a_large_float16_tensor_is_carried_as_float32():
    class Source:
        def read(self, name):
            return torch.full((2, 2), 4e4, dtype=torch.float16)

        def carried_dtype(self, name):
            return torch.float16

    edits = {"large": Edit(columns=(lambda v: 2 * v,)), "small": Edit(columns=(lambda v: v / 2,))}
    source = lwquant.model.rewritten.RewrittenSource(Source(), Rewrite("test", edits))
    assert source.carried_dtype("large") == torch.float32
    assert source.carried_dtype("small") == source.carried_dtype("other") == torch.float16


def test_large_matrices_are_rewritten_in_parts_with_the_same_result(monkeypatch):
    weight = torch.randn(37, 12)
    edit = Edit(columns=(random_rotation(12, 0).apply,))
    whole = edit.apply(weight)
    monkeypatch.setattr("lwquant.model.rewritten.CHUNK_VALUES", 60)
    assert torch.equal(edit.apply(weight), whole)


# ---------------------------------------------------------------- refusals


def _scaled(self, hidden, **settings):
    return hidden + 0.5 * (LlamaDecoderLayer.plain(self, hidden, **settings) - hidden)


class _Centred(nn.Module):
    """A norm that subtracts the mean and has no bias."""

    def forward(self, hidden):
        return nn.functional.layer_norm(hidden, hidden.shape[-1:]) * self.weight


REWIRED = {
    "scaled residual": (LlamaDecoderLayer, _scaled, "not added to the residual stream as it is"),
    "centred norm": (LlamaRMSNorm, _Centred.forward, "may subtract the mean"),
    "elementwise": (LlamaRMSNorm, lambda self, hidden: hidden.tanh() * self.weight, "no RMSNorm"),
}


@pytest.mark.parametrize("case", REWIRED)
def test_other_wirings_are_refused_with_the_reason(case, tmp_path, monkeypatch):
    layer, forward, message = REWIRED[case]
    monkeypatch.setattr(LlamaDecoderLayer, "plain", LlamaDecoderLayer.forward, raising=False)
    monkeypatch.setattr(layer, "forward", forward)
    decoder = Decoder.open(open_checkpoint(random_model("llama", tmp_path)))
    with pytest.raises(TransformError, match=message):
        transformed(decoder, rotate)


def test_a_weight_outside_the_blocks_that_nobody_knows_is_refused(tmp_path):
    decoder = Decoder.open(open_checkpoint(random_model("llama", tmp_path)))
    decoder.model.model.positions = nn.Embedding(8, 64)
    with pytest.raises(TransformError, match="'model.positions.weight' lies outside the blocks"):
        rotate(decoder)


def test_a_rewrite_that_changes_the_logits_is_never_returned(tmp_path):
    decoder = Decoder.open(open_checkpoint(random_model("llama", tmp_path)))

    def wrong(decoder, factor=1.0):
        edits = {"model.norm.weight": Edit(rows=(lambda values: factor * values,))}
        return Rewrite("wrong", edits)

    transformed(decoder, wrong)
    with pytest.raises(TransformError, match="'wrong' changes the logits by 0.0002.*1e-04"):
        transformed(decoder, partial(wrong, factor=1.0002))


# ---------------------------------------------------------------- in a run

SMALL = Recipe(n_samples=4, seq_len=64, held_out=2, sensitivity_samples=2, group_size=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory, heldout_text):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(heldout_text[:8000])
    return path


@pytest.fixture(scope="module")
def made(tiny_folder, text, tmp_path_factory):
    return lwquant.quantize(
        tiny_folder,
        bpw=5,
        output=tmp_path_factory.mktemp("made") / "out",
        recipe=SMALL,
        calibration=str(text),
        transform="rotate",
        **QUIET,
    )


def test_a_rotated_run_saves_a_model_close_to_the_original(made, tiny_folder, text):
    measured = lwquant.evaluate(
        made.folder, text=text, reference=tiny_folder, seq_len=64, windows=4, cache=None
    )
    assert 0 < measured.kl_divergence < 0.05
    again = lwquant.evaluate(tiny_folder, text=text, seq_len=64, windows=4, cache=None)
    assert measured.reference_perplexity == pytest.approx(again.perplexity)


def test_the_run_is_recorded_with_the_bytes_of_the_untied_head(made, tiny_folder):
    record = json.loads((made.folder / "lwquant.json").read_text())
    assert record["transform"] == {"name": "rotate"}
    n_bytes = 4 * 512 * 96
    assert any(f"{n_bytes:,} bytes more" in note for note in record["notes"])
    assert set(made.notes) <= set(record["notes"])
    config = json.loads((made.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tensors = load_file(made.folder / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.float32
    turned = random_rotation(96, 0).apply(
        load_file(tiny_folder / "model.safetensors")["model.embed_tokens.weight"]
    )
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], turned.float())
    sizes = [open_model(tiny_folder, transform=t).other_bytes for t in (None, rotate)]
    assert 0 < sizes[1] - sizes[0] - n_bytes < 200  # and a header entry


def test_a_size_budget_counts_the_untied_head(tiny_folder, text, tmp_path):
    settings = {"size": "0.75MB", "embedding_bits": 16}
    arguments = {"recipe": SMALL, "calibration": str(text), **settings, **QUIET}
    plain = lwquant.quantize(tiny_folder, output=tmp_path / "a", **arguments)
    turned = lwquant.quantize(tiny_folder, output=tmp_path / "b", transform="rotate", **arguments)
    assert turned.size_bytes <= 750_000 and turned.bpw < plain.bpw - 1


def test_a_report_of_the_model_as_it_was_is_refused(made, tiny_folder, text, tmp_path):
    report = made.folder / "sensitivity.json"
    with pytest.raises(PlanError, match=r"with transform \{'name': 'rotate'\}, the run has none"):
        lwquant.quantize(
            tiny_folder,
            bpw=5,
            output=tmp_path / "out",
            recipe=SMALL,
            calibration=str(text),
            report=report,
            **QUIET,
        )


def test_names_and_settings_of_transforms():
    assert transform_of("none") is None and transform_of("rotate") is rotate
    assert transform_of({"name": "rotate", "seed": 2}).keywords == {"seed": 2}
    with pytest.raises(LwquantError, match="unknown transform 'twist'; there are none, rotate"):
        transform_of("twist")
