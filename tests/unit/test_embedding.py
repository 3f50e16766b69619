"""Embedding and head rounded to a few bits: what they compute, how they are stored and loaded.

The oracle reads the stored words by hand, without the kernels' layout.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lwquant
from lwquant import ops
from lwquant.errors import CheckpointError, LwquantError, UnsupportedModelError
from lwquant.export.card import model_card
from lwquant.export.format import tensors_of
from lwquant.export.record import read_run
from lwquant.inspection import inspect_folder
from lwquant.model.embeddings import find_embeddings
from lwquant.model.structure import set_weight
from lwquant.nn.embedding import QuantizedEmbedding, TiedHead, fill_table
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.packed import compile_kernels, set_activation_bits
from lwquant.prepare import open_model, prepare_tokens
from lwquant.progress import silent
from lwquant.quantizers.rtn import rtn
from lwquant.recipe import EMBEDDING_BITS
from lwquant.scheme import QuantScheme
from lwquant.stages import merged

TOKENS = torch.arange(3, 49).view(2, 23)
TEXTS = ["the cat sat on the mat and looked at the dog. " * 400]
FAST = {
    "n_samples": 4,
    "seq_len": 32,
    "held_out": 4,
    "sensitivity_samples": 2,
    "quantizer": "gptq",
    "correction": "none",
    "group_size": 32,
    "activation_bits": 16,
    "calibration": TEXTS,
    "progress": silent,
}


def scheme_of(bits: int) -> QuantScheme:
    return QuantScheme(bits, 64, symmetric=True, scale_bits=8)


def value_of(words: Tensor, scales: Tensor, bits: int, row: int, column: int) -> float:
    """One weight of a stored table: codes lie bit after bit, a group's scale is a byte."""
    stream = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words[row]))
    code = stream >> bits * column & (1 << bits) - 1
    first, byte = int(scales[row, 0]), int(scales[row, 1 + column // 64])
    pattern = (first << 10) + (byte << 6)  # of a float16 with four bits of mantissa
    scale = torch.tensor([pattern], dtype=torch.int16).view(torch.float16).item()
    return (code - 2 ** (bits - 1)) * scale


def dense(folder, name: str, bits: int, shape: torch.Size) -> Tensor:
    tensors = load_file(folder / "model.safetensors")
    words, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    assert len(words) == shape[0]
    rows = [[value_of(words, scales, bits, r, c) for c in range(shape[1])] for r in range(shape[0])]
    return torch.tensor(rows)


def table_of(weight: Tensor, bits: int, **settings) -> QuantizedEmbedding:
    table = QuantizedEmbedding(*weight.shape, scheme_of(bits), **settings)
    fill_table(table, rtn(weight, None, scheme_of(bits)))
    return table


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("bits", EMBEDDING_BITS[:-1])
def test_rows_are_looked_up_and_unpacked(bits, width):
    weight = torch.randn(50, width, generator=torch.Generator().manual_seed(bits))
    quantized = rtn(weight, None, scheme_of(bits))
    table = table_of(weight, bits)
    stored = dict(tensors_of("t", quantized))
    ids = torch.tensor([[3, 49, 0], [7, 7, 21]])
    got = table(ids)
    assert got.shape == (2, 3, width) and got.dtype == torch.float32
    for at, row in ((slice(0, 1), 3), (slice(1, 2), 49)):
        wanted = [
            value_of(stored["t.qweight"], stored["t.scales"], bits, row, c) for c in range(width)
        ]
        assert torch.equal(got[0, at][0], torch.tensor(wanted))
    assert torch.equal(got, quantized.dequantize()[ids])
    largest = weight.abs().max()  # a scale is rounded by a thirty-second at most
    assert (got - weight[ids]).abs().max() <= 1.04 * largest / (2**bits - 2) + largest / 32
    assert table(ids[:0]).shape == (0, 3, width) and table(ids[0, 0]).shape == (width,)
    for outside in (-1, 50):
        with pytest.raises((IndexError, RuntimeError)):
            table(torch.tensor([outside]))


def test_rows_have_the_modules_dtype_and_factor():
    weight = torch.randn(50, 64)
    plain, scaled = table_of(weight, 8), table_of(weight, 8, factor=8.1)
    ids = torch.arange(50)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        plain.to(dtype), scaled.to(dtype)
        assert plain.qweight.dtype == torch.int32 and plain.scales.dtype == torch.uint8
        wanted = plain(ids)
        assert wanted.dtype == dtype
        assert torch.equal(wanted, rtn(weight, None, scheme_of(8)).dequantize().to(dtype))
        # Rounded to the dtype before they are multiplied, as Gemma does.
        assert torch.equal(scaled(ids), wanted * torch.tensor(8.1, dtype=dtype))


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(8, 64, scale_bits=8),
        QuantScheme(8, 64, symmetric=True),
        QuantScheme(4, 64, symmetric=True, scale_bits=8, codebook="nf4"),
        QuantScheme(16),
    ],
    ids=lambda scheme: scheme.label,
)
def test_schemes_that_no_table_has_are_refused(scheme):
    with pytest.raises(ValueError, match="an embedding table cannot have scheme"):
        QuantizedEmbedding(10, 64, scheme)


@pytest.mark.parametrize("n_tokens", [1, 3, 70])
def test_a_tied_head_multiplies_by_the_table(n_tokens):
    weight = torch.randn(50, 96)
    bias = nn.Parameter(torch.randn(50))
    table = table_of(weight, 8)
    x = torch.randn(2, n_tokens, 96)
    for own in (None, bias):
        head = TiedHead(table, own)
        wanted = x @ rtn(weight, None, scheme_of(8)).dequantize().T + (0 if own is None else own)
        torch.testing.assert_close(head(x), wanted, rtol=1e-4, atol=1e-3)
        assert {*head.state_dict()} == ({"bias"} if own is not None else set())


def test_a_tied_head_follows_its_table():
    model = nn.ModuleDict({"table": table_of(torch.randn(50, 64), 8)})
    model["head"] = TiedHead(model["table"])
    x = torch.randn(3, 64)
    before = model["head"](x)
    other = table_of(torch.randn(50, 64), 8)
    twin = copy.deepcopy(model)
    model.load_state_dict({f"table.{name}": t for name, t in other.state_dict().items()})
    assert torch.equal(model["head"](x), TiedHead(other)(x))
    assert torch.equal(twin["head"](x), before)
    model["table"].qweight = twin["table"].qweight
    model["table"].scales = twin["table"].scales
    assert torch.equal(model["head"](x), before)
    set_activation_bits(model, 8)
    assert not torch.equal(model["head"](x), before)
    set_activation_bits(model, 16)
    narrow = model["head"](x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), before, rtol=0.02, atol=0.05)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        table = table_of(torch.randn(50, 64), 8)
        head, ids = TiedHead(table), torch.arange(5)
        first = head(table(ids))
        assert torch.equal(head(table(ids)), first)


def test_lookup_and_head_compile_without_a_break():
    table = table_of(torch.randn(50, 64), 8)
    model = nn.Sequential(table, TiedHead(table))
    compile_kernels(model)
    ids = torch.arange(12).view(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids), model(ids))


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    """The folder of a tiny model of a kind with embedding and head in so many bits."""
    made = {}

    def make(kind: str, bits: int = 8):
        if (kind, bits) not in made:
            root = tmp_path_factory.mktemp(f"{kind}-{bits}")
            source = tiny_models.random_model(kind, root / "source")
            made[kind, bits] = lwquant.quantize(
                source, bpw=6, output=root / "out", embedding_bits=bits, **FAST
            )
        return made[kind, bits]

    return make


def source_of(result):
    return result.folder.parent / "source"


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_every_architecture_computes_what_is_stored(kind, made_of):
    folder = made_of(kind).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(source_of(made_of(kind)))
    places = find_embeddings(original)
    packed = [m for m in model.modules() if isinstance(m, QuantizedEmbedding | TiedHead)]
    assert len(packed) == (2 if places.tied else 1)
    assert isinstance(model.get_submodule(places.table), QuantizedEmbedding)
    wanted = {*places.names}
    assert {*model.config.quantization_config.to_dict()["embeddings"]} == wanted
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name != places.head:
            set_weight(original.get_submodule(name), module.dequantize())
    for name in places.names:
        weight = original.get_submodule(name).weight
        weight.data = dense(folder, name, 8, weight.shape)
    with torch.no_grad():
        got, expected = model(TOKENS).logits, original(TOKENS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    if not places.tied:
        assert not torch.equal(
            original.get_submodule(places.table).weight, original.get_submodule(places.head).weight
        )


def test_a_rotated_model_has_a_head_of_its_own(tmp_path):
    source = tiny_models.random_model("qwen3", tmp_path / "source")
    made = lwquant.quantize(
        source, bpw=8, output=tmp_path / "out", embedding_bits=8, transform="rotate", **FAST
    )
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    names = {"model.embed_tokens", "lm_head"}
    assert {*model.config.quantization_config.to_dict()["embeddings"]} == names
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        expected = original(TOKENS).logits
        error = (model(TOKENS).logits - expected).norm() / expected.norm()
    assert error < 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_loaded_model_generates_saves_and_can_be_tied_again(kind, made_of, tmp_path):
    folder = made_of(kind).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    longer = model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert longer.shape == (2, 8)
    model.tie_weights()
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
        narrow = again(TOKENS).logits.float()
        torch.testing.assert_close(narrow, model(TOKENS).logits, rtol=0.1, atol=0.2)


def test_what_quantize_shows_is_with_what_is_stored(made_of):
    found = []
    for bits in (4, 8):
        made = made_of("qwen3", bits)
        windows = held_out_windows(made)
        model = AutoModelForCausalLM.from_pretrained(made.folder)
        original = AutoModelForCausalLM.from_pretrained(source_of(made))
        with torch.no_grad():  # one after another: fewer tokens than AMX takes in bf16
            p, q = (
                torch.stack([m(window[None]).logits[0, :-1] for window in windows]).log_softmax(-1)
                for m in (original, model)
            )
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
        assert made.held_out.kl_divergence == pytest.approx(found[-1], rel=1e-3)
    assert found[0] > 2 * found[1]


def held_out_windows(made) -> Tensor:
    settings = {k: v for k, v in FAST.items() if k not in ("calibration", "progress")}
    recipe, _ = merged("default", None, settings)
    return prepare_tokens(open_model(source_of(made)), recipe, TEXTS, silent).held_out


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_size_is_known_beforehand(kind, made_of):
    made = made_of(kind)
    opened = open_model(source_of(made))
    predicted = opened.other_bytes_with(8) + made.bpw * opened.n_weights / 8
    actual = sum(f.stat().st_size for f in made.folder.glob("*.safetensors"))
    assert made.size_bytes == actual <= predicted < actual + 12_000
    assert opened.other_bytes_with(8) < 0.6 * opened.other_bytes


def test_a_size_that_16_bits_do_not_reach(tmp_path):
    source = tiny_models.random_model("llama", tmp_path / "source")
    opened = open_model(source)
    limit = opened.other_bytes_with(8) + 4 * opened.n_weights // 8
    assert limit < opened.other_bytes
    with pytest.raises(lwquant.LwquantError, match="below the floor"):
        lwquant.quantize(source, size=limit, output=tmp_path / "no", embedding_bits=16, **FAST)
    made = lwquant.quantize(source, size=limit, output=tmp_path / "out", embedding_bits=8, **FAST)
    assert made.size_bytes <= limit and made.bpw > 2
    shown = json.loads((made.folder / "lwquant.json").read_text())
    assert shown["embedding_bits"] == 8
    assert "embedding and head in 8 bits" in inspect_folder(made.folder).record.notes
    measured = lwquant.evaluate(
        made.folder, text=write(tmp_path, TEXTS[0]), reference=source, seq_len=32, windows=2
    )
    assert 0 < measured.kl_divergence < 1
    card = model_card(read_run(made.folder), None, {})
    assert "Embedding and head are rounded to 8 bits, norms are unchanged." in card


def write(folder, text: str):
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def edited(made, target, change):
    shutil.copytree(made.folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["embeddings"].pop("lm_head"), r"names \['model.embed_tokens'\], those of"),
        (lambda c: c["embeddings"].update(x=c["embeddings"]["lm_head"]), r"'x'\], those of"),
        (lambda c: c["embeddings"]["lm_head"].update(symmetric=False), "cannot have scheme"),
        (lambda c: c["embeddings"]["lm_head"].update(bits=4), "'lm_head.qweight' is .* needs"),
        (lambda c: c["embeddings"]["lm_head"].update(bits=9), "embeddings 'lm_head'|bits=9"),
        (lambda c: c.update(embeddings=[]), "embeddings is not an object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message, made_of, tmp_path):
    folder = edited(made_of("llama"), tmp_path / "edited", change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind, name", [("llama", "lm_head"), ("qwen3", "model.embed_tokens")])
@pytest.mark.parametrize("leaf", ["qweight", "scales"])
def test_a_missing_tensor_is_named(leaf, kind, name, made_of, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made_of(kind).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{name}.{leaf}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}.{leaf}' is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_models_without_plain_embeddings_and_other_widths_are_refused(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)

    class Doubling(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    embedding = model.get_input_embeddings()
    model.set_input_embeddings(Doubling(*embedding.weight.shape))
    with pytest.raises(UnsupportedModelError, match="what a Doubling does .* must be 16"):
        find_embeddings(model)
    model.set_input_embeddings(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="a Linear and a Linear for embedding and head"):
        find_embeddings(model)
    with pytest.raises(LwquantError, match="embedding_bits=3 is not one of"):
        lwquant.quantize(tiny_folder, bpw=4, output="x", embedding_bits=3)


def test_the_kernels_lay_the_head_out(made_of):
    if not ops.compiled():
        pytest.skip("needs the compiled kernels")
    for kind in ("llama", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(made_of(kind).folder)
        assert model.get_output_embeddings().prepare() is not None
