"""From what the user names to what the pipeline works on: model, tokens, and budget in bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lwquant.capture.generate import sample_windows
from lwquant.capture.text import SELF, read_source
from lwquant.capture.tokens import (
    Sampler,
    calibration_set,
    opening,
    shifted_around,
    token_hash,
    with_opening,
)
from lwquant.devices import free_memory, usable
from lwquant.errors import BudgetError, CalibrationError, CheckpointError
from lwquant.methods import describe
from lwquant.model.checkpoint import WeightSource, open_checkpoint, resolve
from lwquant.model.decoder import Decoder
from lwquant.model.embeddings import find_embeddings
from lwquant.progress import Progress, silent
from lwquant.recipe import Recipe
from lwquant.rounded_embeddings import RoundedEmbeddings, embedding_scheme
from lwquant.scheme import FLOAT_BITS
from lwquant.transforms import Transform
from lwquant.transforms.apply import transformed
from lwquant.types import CalibrationSet

ARRAYS = ("qweight", "scales", "zeros")  # of each quantized linear
EMBEDDING_ARRAYS = ("qweight", "scales")  # of embedding and head, where they are rounded
OUTLIER_ARRAYS = ("outlier_values", "outlier_columns", "outlier_rows")  # and, if it has outliers
HEADER_BYTES = 110  # most that a safetensors header spends on one tensor, its name aside
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


@dataclass(frozen=True)
class Windows:
    """Different windows of the same texts, each for one purpose."""

    calibration: CalibrationSet
    held_out: Tensor  # (n, seq_len): what quality is measured on
    tuning: Tensor  # (n, seq_len), n perhaps 0: what scales are tuned on; see finetune.py


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint opened for work."""

    name: str  # as the user gave it
    path: Path
    source: WeightSource
    decoder: Decoder
    tokenizer: Any
    transform: Mapping[str, object] | None = None  # what source and decoder went through
    notes: tuple[str, ...] = ()  # what has to be noted of it
    embeddings: RoundedEmbeddings | None = None  # embedding and head, where they are rounded

    @property
    def n_weights(self) -> int:
        """Weights of the quantizable linears."""
        return sum(spec.n_weights for spec in self.decoder.linears)

    @property
    def original_bpw(self) -> float:
        """Bits per weight of those linears in the checkpoint."""
        return self.source.file_bytes(self._linear_keys()) * 8 / self.n_weights

    @property
    def embedding_bits(self) -> int:
        return FLOAT_BITS if self.embeddings is None else self.embeddings.scheme.bits

    @property
    def other_bytes(self) -> int:
        """Bytes of all else in the output: embeddings, head, norms, biases, and file headers."""
        return self.other_bytes_with(self.embedding_bits)

    def other_bytes_with(self, embedding_bits: int) -> int:
        """other_bytes with embedding and head in so many bits; 16 are as they are.

        UnsupportedModelError where they cannot be rounded.
        """
        linears = self._linear_keys()
        total = _header_bytes(linears, ARRAYS)
        others = set(self.source.names()).difference(linears)
        if embedding_bits != FLOAT_BITS:
            places, scheme = find_embeddings(self.decoder.model), embedding_scheme(embedding_bits)
            others.difference_update(map(self.decoder.key_of, places.weights))
            total += _header_bytes(places.names, EMBEDDING_ARRAYS)
            for name in places.names:
                shape = self.decoder.model.get_parameter(f"{name}.weight").shape
                total += scheme.stored_bits(*shape) // 8
        for key in others:
            n_values = math.prod(self.source.shape(key))
            total += n_values * self.source.carried_dtype(key).itemsize + HEADER_BYTES + len(key)
        return total

    def outlier_header_bytes(self) -> int:
        """What file headers spend on the outliers of all linears."""
        return _header_bytes(self._linear_keys(), OUTLIER_ARRAYS)

    def _linear_keys(self) -> list[str]:
        keys = [self.decoder.key_of(f"{spec.name}.weight") for spec in self.decoder.linears]
        return [key for key in keys if key]


def _header_bytes(names: Iterable[str], arrays: Sequence[str]) -> int:
    return sum(len(arrays) * (HEADER_BYTES + len(name)) for name in names)


def open_model(
    model: str | Path,
    device: str = "cpu",
    revision: str | None = None,
    transform: Transform | None = None,
) -> OpenModel:
    """Open and check a checkpoint; all its weights are read once, so that NaN is found early.

    Args:
        transform: source and decoder are those of the transformed model.

    Raises CheckpointError, UnsupportedModelError, TransformError, and LwquantError for a device
    that cannot be used.
    """
    where = usable(device)
    path = resolve(model, revision)
    source = open_checkpoint(path)
    decoder = Decoder.open(source, where)
    source.check_finite()
    folder, gguf = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no usable tokenizer: {error}") from error
    settings: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()
    if transform is not None:
        decoder, notes = transformed(decoder, transform)
        settings = describe(transform)
    return OpenModel(str(model), path, decoder.source, decoder, tokenizer, settings, notes)


def prepare_tokens(
    opened: OpenModel,
    recipe: Recipe,
    texts: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Windows:
    """Draw the recipe's windows from its texts; each begins with the tokenizer's opening().

    Args:
        texts: used instead of the recipe's sources.

    Raises CalibrationError for an empty or too short text.
    """
    n_windows = recipe.n_samples + recipe.held_out + recipe.tune
    before = opening(opened.tokenizer)
    length = recipe.seq_len - len(before)

    def sampled(n: int) -> Tensor:
        _check_fits_memory(opened)
        return sample_windows(
            opened.path, n, length, recipe.seed, before, progress, opened.decoder.device
        )

    named: list[tuple[str, str | Sampler]] = (
        [("texts", "\n\n".join(texts))]
        if texts is not None
        else [(name, sampled if name == SELF else read_source(name)) for name in recipe.sources]
    )
    every = calibration_set(
        named, opened.tokenizer, n_samples=n_windows, seq_len=length, seed=recipe.seed
    )
    limit = opened.decoder.vocab_size
    if every.tokens.max() >= limit:
        raise CalibrationError(
            f"the tokenizer gives token {every.tokens.max()}, the model has {limit}"
        )
    shuffled = every.tokens[
        torch.randperm(n_windows, generator=torch.Generator().manual_seed(recipe.seed))
    ]
    chosen, held_out, tuning = shuffled.split([recipe.n_samples, recipe.held_out, recipe.tune])
    chosen = with_opening(shifted_around(chosen, recipe.expand), before)
    calibration = CalibrationSet(
        chosen, every.source, token_hash(chosen), recipe.seed, recipe.expand
    )
    return Windows(calibration, with_opening(held_out, before), with_opening(tuning, before))


def _check_fits_memory(opened: OpenModel) -> None:
    source, free = opened.source, free_memory()
    needed = 4 * sum(math.prod(source.shape(name)) for name in source.names())
    if free is not None and needed > free:
        raise CalibrationError(
            f"calibration on text that the model writes itself ('self') needs the float model in "
            f"memory, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: name a text instead "
            "(--calibration FILE), or 'builtin'"
        )


def parse_size(size: str | int) -> int:
    """Bytes of "80MB", "1.5 GiB" or a plain number.

    >>> parse_size("80MB"), parse_size("1.5 GiB"), parse_size(1000)
    (80000000, 1610612736, 1000)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]I?B|B)?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise BudgetError(f"size {size!r} is not of the form 80MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * UNITS[(match[2] or "B").upper()])


def bpw_of_size(
    opened: OpenModel,
    size: str | int,
    outliers: bool = False,
    embedding_bits: int | None = None,
) -> float:
    """Bits per weight of the linears that make all weight files together `size` large.

    Args:
        outliers: whether the linears' schemes have outliers.
        embedding_bits: of embedding and head, if not those they have.
    """
    bits = opened.embedding_bits if embedding_bits is None else embedding_bits
    wanted, other = parse_size(size), opened.other_bytes_with(bits)
    if outliers:
        other += opened.outlier_header_bytes()
    if wanted <= other:
        raise BudgetError(
            f"size {wanted / 1e6:.1f} MB is below the floor: what is not in the linears "
            f"(embeddings and head in {bits} bits, norms) takes {other / 1e6:.1f} MB alone"
        )
    return (wanted - other) * 8 / opened.n_weights
