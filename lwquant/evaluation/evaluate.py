"""What a model is worth on a text: perplexity, and how far it is from its reference."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwquant.capture.tokens import opening, tokenize
from lwquant.errors import CalibrationError, CheckpointError
from lwquant.evaluation.measure import compare
from lwquant.evaluation.reference import CACHE_FOLDER
from lwquant.evaluation.subject import FloatModel, Subject, open_subject
from lwquant.evaluation.windows import evenly_spread_windows, strided_windows
from lwquant.export.folder import write_manifest
from lwquant.export.record import EVALUATION_FILE, EvaluationRecord
from lwquant.matmul import fast_float32
from lwquant.model.checkpoint import resolve
from lwquant.progress import Progress, silent


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; what needs a reference is None without one."""

    perplexity: float
    reference_perplexity: float | None
    kl_divergence: float | None  # KL(reference || model), nats per token
    top1_agreement: float | None  # share of tokens, 0 to 1
    tokens: int  # predicted
    bpw: float | None  # stored bits per weight of the linears, None for formats of others
    size_bytes: int  # of the weight files
    seq_len: int
    windows: int
    text: str

    def to_json(self) -> str:
        """One object with the fields above as keys, in this order.

        A number beyond every float is null: JSON has no infinity.
        """
        finite = {k: None if v == math.inf else v for k, v in asdict(self).items()}
        return json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)


def evaluate(
    model: str | Path,
    *,
    text: str | Path,
    reference: str | Path | None = None,
    seq_len: int = 512,
    windows: int = 16,
    stride: int | None = None,
    device: str = "cpu",
    cache: str | Path | None = CACHE_FOLDER,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model on a text file.

    Args:
        model: folder, .gguf file or hub id; float models are computed in float32, quantized ones
            in their stored dtype from their packed weights.
        text: path of a UTF-8 text file. It is tokenized whole; each window begins with what the
            tokenizer puts before a text, if anything.
        reference: the float model to compare with, usually the original; same tokenizer.
        windows: windows of `seq_len` tokens, evenly spread over the text.
        stride: predict every token of the text instead, by windows this far apart.
        cache: folder for the predictions of float models (see reference.py), None for no caching.

    Raises CalibrationError for an empty or too short text, or windows longer than the model's
    positions; CheckpointError for models that cannot be read or do not belong together.
    """
    content = read_text(Path(text))
    subject = open_subject(model, device)
    tokens = tokenize(content, subject.tokenizer)
    before = opening(subject.tokenizer)
    if stride is None:
        tested, counted = evenly_spread_windows(tokens, seq_len, windows, before), None
    else:
        tested, counted = strided_windows(tokens, seq_len, stride, before)
    _check_fits(subject, tokens, seq_len, str(model))
    folder = None if cache is None else Path(cache)

    original = None
    if reference is not None:
        original = _open_reference(reference, subject, device)
        names = f"reference {reference} and model {model}"
        _check_same_tokens(original, subject, tokens, content, names)
    with fast_float32():
        mine = subject.predictions(tested, folder, progress)
        other = mine if original is subject else None
        if original is not None and other is None:
            other = original.predictions(tested, folder, progress)
        found = compare(mine, tested, reference=other, counted=counted, progress=progress)
    return Evaluation(
        perplexity=found.perplexity,
        reference_perplexity=found.reference_perplexity,
        kl_divergence=found.kl_divergence,
        top1_agreement=found.top1_agreement,
        tokens=found.tokens,
        bpw=subject.bpw,
        size_bytes=subject.size_bytes,
        seq_len=seq_len,
        windows=len(tested),
        text=str(text),
    )


def read_text(path: Path) -> str:
    """The whole text file; CalibrationError where it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"text file {path}: {error}") from error
    if not text.strip():
        raise CalibrationError(f"text file {path} is empty")
    return text


def _open_reference(reference: str | Path, subject: Subject, device: str) -> Subject:
    """The reference; the subject itself where it is the same float model."""
    path = resolve(reference)
    if isinstance(subject, FloatModel) and path == subject.path:
        return subject
    opened = open_subject(path, device)
    if not isinstance(opened, FloatModel):
        raise CheckpointError(f"reference {reference}: is quantized; give the float model")
    return opened


def _check_fits(subject: Subject, tokens: Tensor, seq_len: int, name: str) -> None:
    positions: Any = getattr(subject.config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise CalibrationError(f"seq_len={seq_len} exceeds the {positions} positions of {name}")
    if int(tokens.max()) >= subject.config.vocab_size:
        raise CheckpointError(
            f"{name}: its tokenizer gives token {int(tokens.max())}, "
            f"the model knows {subject.config.vocab_size}"
        )


def _check_same_tokens(
    reference: Subject, subject: Subject, tokens: Tensor, text: str, names: str
) -> None:
    """The text and the logits must mean the same to both models."""
    theirs, ours = reference.config.vocab_size, subject.config.vocab_size
    if theirs != ours:
        raise CheckpointError(f"{names}: vocabularies of {theirs} and {ours} cannot be compared")
    other = reference.tokenizer
    if other is subject.tokenizer:
        return
    same_opening = torch.equal(opening(other), opening(subject.tokenizer))
    if not (same_opening and torch.equal(tokenize(text, other), tokens)):
        raise CheckpointError(f"{names}: their tokenizers give different tokens for the same text")


def save_evaluation(folder: Path, measured: Evaluation) -> None:
    """Keep an evaluation in a result folder, where the model card finds it; verify() it first.

    Raises OutputError where a number is not finite.
    """
    known = {field.name for field in fields(EvaluationRecord)}
    values = {key: value for key, value in asdict(measured).items() if key in known}
    record = EvaluationRecord(**{**values, "text": Path(measured.text).name})
    (folder / EVALUATION_FILE).write_text(record.to_json(), encoding="utf-8")
    write_manifest(folder)
