"""GGUF input: a tiny llama written here comes back as transformers reads it."""

import importlib.util
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lwquant.errors import CheckpointError
from lwquant.export.save import ModelWriter
from lwquant.model.checkpoint import open_checkpoint, resolve
from lwquant.model.decoder import Decoder
from lwquant.model.gguf import GgufCheckpoint
from lwquant.prepare import OpenModel
from lwquant.quantizers import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import plan_bpw

HIDDEN, INNER, VOCAB = 64, 96, 32
LINEARS = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (HIDDEN // 2, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (HIDDEN // 2, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}
needs_gguf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="needs lwquant[gguf]",
)


def write_tiny(
    path: Path, *, tied: bool = True, packed: bool = False, embedding: str = "F32", scale: float = 1
) -> dict[str, np.ndarray]:
    """One llama block of two heads; returns the linears' weights under their GGUF names."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    rng = np.random.default_rng(0)
    linears = {name: rng.normal(size=s).astype(np.float32) for name, (_, s) in LINEARS.items()}
    for name, weight in linears.items():
        stored = f"blk.0.{name}.weight"
        if packed:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(stored, weight)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    linears["token_embd"] = (rng.normal(size=(VOCAB, HIDDEN)) * scale).astype(np.float32)
    kind = gguf.GGMLQuantizationType[embedding]
    writer.add_tensor(
        "token_embd.weight", gguf.quants.quantize(linears["token_embd"], kind), raw_dtype=kind
    )
    if not tied:
        linears["output"] = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        writer.add_tensor("output.weight", linears["output"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return linears


@needs_gguf
@pytest.mark.parametrize("packed", [False, True])
def test_a_gguf_is_read_under_the_names_of_transformers(packed, tmp_path):
    linears = write_tiny(tmp_path / "tiny.gguf", packed=packed)
    checkpoint = open_checkpoint(resolve(tmp_path / "tiny.gguf"))
    linear_names = [f"model.layers.0.{name}.weight" for name, _ in LINEARS.values()]
    norms = [f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")]
    others = ["model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(checkpoint.names()) == sorted([*linear_names, *norms, *others])
    assert checkpoint.size_bytes == (tmp_path / "tiny.gguf").stat().st_size
    for name, (role, shape) in LINEARS.items():
        got = checkpoint.read(f"model.layers.0.{role}.weight")
        assert got.dtype == checkpoint.dtype(f"model.layers.0.{role}.weight") == torch.float32
        assert tuple(got.shape) == checkpoint.shape(f"model.layers.0.{role}.weight") == shape
        if name not in ("attn_q", "attn_k"):  # llama.cpp orders their rows in another way
            step = np.abs(linears[name]).max() / 127 if packed else 0
            assert np.abs(got.numpy() - linears[name]).max() <= step
    checkpoint.check_finite()


@needs_gguf
@pytest.mark.parametrize(
    ("embedding", "scale", "carried"),
    [
        ("F32", 1, torch.float32),
        ("BF16", 1, torch.bfloat16),
        ("F16", 1, torch.float16),
        ("Q8_0", 1, torch.float16),
        ("Q8_0", 1e5, torch.float32),  # float16 would overflow
    ],
)
def test_what_stays_is_carried_in_the_floats_of_the_file(embedding, scale, carried, tmp_path):
    write_tiny(tmp_path / "tiny.gguf", embedding=embedding, scale=scale)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.carried_dtype("model.embed_tokens.weight") == carried
    assert checkpoint.carried_dtype("model.norm.weight") == torch.float32


@needs_gguf
@pytest.mark.parametrize(("packed", "bits"), [(False, 32), (True, 8.5)])
def test_the_original_bits_are_those_of_the_file(packed, bits, tmp_path):
    write_tiny(tmp_path / "tiny.gguf", packed=packed)
    n_weights = sum(math.prod(shape) for _, shape in LINEARS.values())
    assert open_checkpoint(tmp_path / "tiny.gguf").file_bytes(()) * 8 / n_weights == bits


@needs_gguf
def test_a_quantized_gguf_is_no_larger_than_its_size_budget_and_the_file(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", packed=True, embedding="Q8_0")
    opened = OpenModel("tiny", tmp_path, *_decoded(tmp_path / "tiny.gguf"), tokenizer=None)
    schemes = {spec.name: QuantScheme(4, 32) for spec in opened.decoder.linears}
    bpw = plan_bpw(schemes, opened.decoder.linears)
    decoder = opened.decoder
    writer = ModelWriter(tmp_path, opened.source, decoder.linears, decoder.model, decoder.key_of)
    for spec in decoder.linears:
        weight = opened.source.read(decoder.key_of(f"{spec.name}.weight"))
        writer.linear(spec, rtn(weight, None, schemes[spec.name]))
    size = writer.finish(schemes, bpw, tmp_path)
    predicted = opened.other_bytes + bpw * opened.n_weights / 8
    assert size <= predicted < size + 2500  # the bound of the headers is not tight
    assert opened.original_bpw == 8.5
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, opened.source.read("model.embed_tokens.weight").half())


def _decoded(path: Path) -> tuple[GgufCheckpoint, Decoder]:
    source = GgufCheckpoint.open(path)
    return source, Decoder.open(source)


@needs_gguf
def test_the_config_of_a_gguf_is_that_of_a_plain_model(tmp_path):
    write_tiny(tmp_path / "tiny.gguf")
    config = open_checkpoint(tmp_path / "tiny.gguf").config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["model_type"], config["dtype"]) == ("llama", "float32")
    assert (config["hidden_size"], config["num_key_value_heads"]) == (HIDDEN, 1)
    assert config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert json.loads(json.dumps(config)) == config


@needs_gguf
def test_a_head_of_its_own_is_kept(tmp_path):
    linears = write_tiny(tmp_path / "tiny.gguf", tied=False)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert np.array_equal(checkpoint.read("lm_head.weight").numpy(), linears["output"])
    assert checkpoint.config["tie_word_embeddings"] is False


@needs_gguf
def test_changing_a_tensor_in_place_leaves_the_checkpoint_alone(tmp_path):
    write_tiny(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    before = checkpoint.fingerprint()
    checkpoint.read("model.norm.weight").zero_()
    assert bool((checkpoint.read("model.norm.weight") == 1).all())
    assert checkpoint.fingerprint() == before


@needs_gguf
def test_the_fingerprint_follows_the_values(tmp_path):
    write_tiny(tmp_path / "a.gguf")
    write_tiny(tmp_path / "b.gguf", packed=True)
    first, second = (open_checkpoint(tmp_path / f"{name}.gguf") for name in "ab")
    assert first.fingerprint() != second.fingerprint()


def test_nan_is_refused_with_the_tensor_and_the_count(tmp_path):
    tensors = {"w": torch.tensor([1.0, torch.nan, torch.inf])}
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf", {}, 0, 0, torch.float16, tensors)
    for attempt in (checkpoint.check_finite, lambda: checkpoint.read("w")):
        with pytest.raises(
            CheckpointError, match=r"tiny.gguf: tensor 'w' holds 2 NaN or Inf among 3"
        ):
            attempt()
    with pytest.raises(CheckpointError, match="holds no tensor 'v'"):
        checkpoint.shape("v")


@needs_gguf
def test_a_missing_gguf_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.gguf: cannot be read: No such file"):
        open_checkpoint(tmp_path / "none.gguf")


@needs_gguf
def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="is not GGUF: it starts with b'PK"):
        open_checkpoint(tmp_path / "fake.gguf")


@needs_gguf
def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    write_tiny(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes().replace(b"llama", b"lamma")
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="transformers cannot load this GGUF"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_without_the_extras_the_error_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'lwquant\[gguf\]'"):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_tiny(path)
    return path.read_bytes()


@needs_gguf
@settings(max_examples=60, deadline=None, database=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_proper_prefix_of_a_gguf_is_refused(whole, share):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=r"tiny.gguf: (truncated or damaged|is not GGUF)"):
            open_checkpoint(path)
