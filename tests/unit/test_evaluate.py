"""evaluate() on the tiny trained model, float and quantized, beside transformers in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import KINDS, TINY_FOLDER, adding_bos, random_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lwquant.errors import CalibrationError, CheckpointError
from lwquant.evaluation.evaluate import Evaluation, evaluate
from lwquant.evaluation.subject import PackedModel, open_subject
from lwquant.evaluation.windows import evenly_spread_windows, strided_windows
from lwquant.export.save import ModelWriter
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.decoder import Decoder
from lwquant.progress import silent
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import plan_bpw

TEXT = TINY_FOLDER / "heldout.txt"
SCHEME = QuantScheme(3, 64)
SMALL = {"text": TEXT, "seq_len": 64, "windows": 4, "cache": None}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The tiny model in 3 bits, rounded to nearest."""
    folder = tmp_path_factory.mktemp("packed")
    source = Checkpoint.open(TINY_FOLDER)
    decoder = Decoder.open(source)
    writer = ModelWriter(folder, source, decoder.linears, decoder.model, decoder.key_of)
    for spec in decoder.linears:
        key = decoder.key_of(f"{spec.name}.weight")
        writer.linear(spec, rtn(source.read(key), None, SCHEME))
    schemes = {spec.name: SCHEME for spec in decoder.linears}
    writer.finish(schemes, plan_bpw(schemes, decoder.linears), TINY_FOLDER)
    return folder


@pytest.fixture
def windows(tiny_tokenizer, heldout_text) -> Tensor:
    ids = tiny_tokenizer(heldout_text, add_special_tokens=False, verbose=False).input_ids
    return evenly_spread_windows(torch.tensor(ids), SMALL["seq_len"], SMALL["windows"])


@torch.no_grad()
def log_probs(model, windows: Tensor) -> Tensor:
    """(n_predicted, vocab) float64."""
    rows = [model(input_ids=window[None]).logits[0, :-1] for window in windows]
    return torch.cat(rows).double().log_softmax(-1)


def perplexity(log_p: Tensor, windows: Tensor) -> float:
    return math.exp(-log_p.gather(1, windows[:, 1:].reshape(-1, 1)).mean())


def test_a_float_model_has_the_perplexity_that_transformers_gives_it_in_float64(windows):
    found = evaluate(TINY_FOLDER, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER).double()
    assert found.perplexity == pytest.approx(perplexity(log_probs(model, windows), windows), 1e-5)
    assert found.tokens == 4 * 63
    assert (found.kl_divergence, found.reference_perplexity, found.top1_agreement) == (None,) * 3


@pytest.mark.parametrize("stride", [None, 48])
def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(
    tiny_tokenizer, heldout_text, tmp_path, stride
):
    folder = tmp_path / "bos"
    shutil.copytree(TINY_FOLDER, folder)
    adding_bos(tiny_tokenizer).save_pretrained(folder)
    found = evaluate(folder, **SMALL, stride=stride)
    ids = tiny_tokenizer(heldout_text, add_special_tokens=False, verbose=False).input_ids
    bos, tokens = torch.tensor([tiny_tokenizer.bos_token_id]), torch.tensor(ids)
    counted = None
    if stride is None:
        windows = evenly_spread_windows(tokens, SMALL["seq_len"], SMALL["windows"], bos)
    else:
        windows, counted = strided_windows(tokens, SMALL["seq_len"], stride, bos)
    log_p = log_probs(AutoModelForCausalLM.from_pretrained(folder), windows)
    losses = -log_p.gather(1, windows[:, 1:].reshape(-1, 1))[:, 0]
    if counted is not None:
        losses = losses[counted.flatten()]
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), 1e-4)


def test_models_whose_texts_begin_differently_are_not_compared(tiny_tokenizer, tmp_path):
    folder = tmp_path / "bos"
    shutil.copytree(TINY_FOLDER, folder)
    adding_bos(tiny_tokenizer).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="tokenizers give different tokens"):
        evaluate(folder, reference=TINY_FOLDER, **SMALL)


def test_the_trained_model_is_far_better_than_token_counts_on_text_it_has_not_seen():
    found = evaluate(TINY_FOLDER, text=TEXT, seq_len=256, windows=8, cache=None)
    assert found.perplexity < 30  # token counts of its training text: 194


def test_a_packed_model_is_compared_with_its_reference_by_the_definitions(packed, windows):
    found = evaluate(packed, reference=TINY_FOLDER, **SMALL)
    q = log_probs(AutoModelForCausalLM.from_pretrained(packed), windows)
    p = log_probs(AutoModelForCausalLM.from_pretrained(TINY_FOLDER), windows)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert divergence > 0.01
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement)
    assert found.perplexity == pytest.approx(perplexity(q, windows), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(perplexity(p, windows), rel=1e-5)


def test_bits_and_bytes_are_those_of_the_folder(packed, tmp_path):
    small = evaluate(packed, **SMALL)
    assert (
        small.bpw == json.loads((packed / "config.json").read_text())["quantization_config"]["bpw"]
    )
    assert small.size_bytes == sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    assert evaluate(TINY_FOLDER, **SMALL).bpw == 32
    half = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, tmp_path / name)
    found = evaluate(tmp_path, **SMALL)
    assert found.bpw == 16
    assert found.size_bytes == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["float", "packed"])
def test_a_model_is_its_own_equal(name, packed):
    folder = TINY_FOLDER if name == "float" else packed
    found = evaluate(folder, reference=TINY_FOLDER, **SMALL)
    assert (found.kl_divergence == 0) == (name == "float")
    assert (found.top1_agreement == 1) == (name == "float")


def test_a_cached_reference_gives_the_same_numbers(packed, tmp_path):
    settings = {**SMALL, "cache": tmp_path / "cache", "reference": TINY_FOLDER}
    first = evaluate(packed, **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = evaluate(packed, **settings)
    assert first == again == evaluate(packed, **{**settings, "cache": None})


def test_a_stride_predicts_every_token_of_the_text_but_the_first(tmp_path, tiny_tokenizer):
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:1500])
    n_tokens = len(tiny_tokenizer(text.read_text(), add_special_tokens=False).input_ids)
    settings = {"text": text, "seq_len": 64, "cache": None}
    strided = evaluate(TINY_FOLDER, stride=16, **settings)
    assert strided.tokens == n_tokens - 1
    apart = evaluate(TINY_FOLDER, stride=63, **settings)
    assert strided.perplexity < apart.perplexity  # more context for each token


def test_the_json_has_the_promised_keys_first_and_null_for_what_no_number_can_say():
    found = Evaluation(math.inf, None, 0.5, 0.75, 10, 3.5, 99, 64, 4, "a.txt")
    values = json.loads(found.to_json())
    assert list(values)[:7] == [
        "perplexity", "reference_perplexity", "kl_divergence", "top1_agreement",
        "tokens", "bpw", "size_bytes",
    ]  # fmt: skip
    assert values["perplexity"] is None
    assert (values["kl_divergence"], values["size_bytes"], values["text"]) == (0.5, 99, "a.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_models_head_on_a_few_tokens_gives_the_models_own_logits(kind, tmp_path):
    folder = random_model(kind, tmp_path / kind)
    subject = PackedModel(folder, {}, "cpu")
    tokens = torch.randint(512, (2, 24))
    predicted = subject.predictions(tokens, None, silent)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for window, hidden in zip(tokens, predicted.hidden, strict=True):
            expected = model(input_ids=window[None]).logits[0]
            for part in (slice(0, 5), slice(5, 24)):
                logits = predicted.head(hidden[None, part])[0]
                torch.testing.assert_close(logits, expected[part], atol=1e-4, rtol=1e-4)


def test_empty_missing_and_short_texts_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("while True: pass")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("empty.txt", "empty"),
        ("missing.txt", "No such file"),
        ("binary.txt", "decode"),
        ("short.txt", "fewer than the 64 of one window"),
    ):
        with pytest.raises(CalibrationError, match=message):
            evaluate(TINY_FOLDER, **{**SMALL, "text": tmp_path / name})


def test_windows_longer_than_the_models_positions_are_refused():
    with pytest.raises(CalibrationError, match="seq_len=257 exceeds the 256 positions"):
        evaluate(TINY_FOLDER, text=TEXT, seq_len=257)


def test_a_reference_that_is_quantized_itself_is_refused(packed):
    with pytest.raises(CheckpointError, match="is quantized; give the float model"):
        evaluate(TINY_FOLDER, reference=packed, **SMALL)


def test_a_reference_with_another_tokenizer_is_refused(tmp_path):
    other = shutil.copytree(TINY_FOLDER, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(Tokenizer.from_str(json.dumps(tokenizer)).to_str())
    with pytest.raises(CheckpointError, match="different tokens for the same text"):
        evaluate(TINY_FOLDER, reference=other, **SMALL)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER)
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="vocabularies of 520 and 512"):
        evaluate(TINY_FOLDER, reference=tmp_path, **SMALL)


def test_a_model_without_a_usable_tokenizer_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_subject(folder, "cpu")
