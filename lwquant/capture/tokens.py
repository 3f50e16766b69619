"""Calibration tokens: fixed windows cut from text, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lwquant.errors import CalibrationError
from lwquant.types import CalibrationSet

Sampler = Callable[[int], Tensor]  # of n windows, (n, seq_len)


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Tokens (n,) int64 of a whole text, no special tokens added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def opening(tokenizer: Any) -> Tensor:
    """What the tokenizer puts before a text, (0 or 1,): the beginning-of-text token, or nothing.

    Every window begins with it. Gemma and Llama learned to leave there what they attend to for
    nothing else: on four windows of WikiText-2 Gemma 3 270M has perplexity 31 with it, 86 without.
    """
    bos = tokenizer.bos_token_id
    added = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return torch.tensor([bos] if added else [], dtype=torch.long)


def with_opening(windows: Tensor, before: Tensor) -> Tensor:
    """Windows (n, k) with the same tokens (m,) before each: (n, m + k)."""
    return torch.cat([before.expand(len(windows), -1), windows], dim=1)


def cut_windows(tokens: Tensor, n_windows: int, seq_len: int, seed: int, source: str) -> Tensor:
    """`n_windows` of the text's non-overlapping windows, (n_windows, seq_len), drawn by seed.

    Raises CalibrationError naming both lengths when the text has too few of them.
    """
    available = tokens.numel() // seq_len
    if available < n_windows:
        raise CalibrationError(
            f"{source}: {tokens.numel()} tokens give {available} windows of {seq_len}, "
            f"{n_windows} are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:n_windows].sort().values
    return tokens[: available * seq_len].view(available, seq_len)[chosen]


def shifted_around(windows: Tensor, times: int) -> Tensor:
    """Windows (n, seq_len), then each again shifted around by seq_len/times, 2·seq_len/times, …

    So that each token also occurs early in a window; from RSQ, arXiv:2503.01820, which calls it
    dataset expansion. Returns (times · n, seq_len), the windows as they are first.
    """
    seq_len = windows.shape[1]
    return torch.cat([windows.roll(k * seq_len // times, dims=1) for k in range(times)])


def token_hash(tokens: Tensor) -> str:
    """sha256 of the tokens as little-endian int64, with their shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def calibration_set(
    sources: Sequence[tuple[str, str | Sampler]],
    tokenizer: Any,
    *,
    n_samples: int,
    seq_len: int,
    seed: int,
) -> CalibrationSet:
    """Windows from several sources in equal shares, without an opening().

    Args:
        sources: (name, text) pairs, or (name, what draws so many windows itself); earlier ones get
            the remainder of n_samples. Texts come first: they take no time, and may be too short.

    Raises CalibrationError for no source, an empty text, or one too short for its share.
    """
    if not sources:
        raise CalibrationError("no calibration text was given")
    parts: dict[int, Tensor] = {}
    in_order = sorted(enumerate(sources), key=lambda item: not isinstance(item[1][1], str))
    for position, (name, source) in in_order:
        share = n_samples // len(sources) + (position < n_samples % len(sources))
        if not isinstance(source, str):
            parts[position] = source(share)
            continue
        if not source.strip():
            raise CalibrationError(f"{name}: the text is empty")
        parts[position] = cut_windows(tokenize(source, tokenizer), share, seq_len, seed, name)
    tokens = torch.cat([parts[position] for position in range(len(sources))])
    return from_tokens(tokens, " + ".join(name for name, _ in sources), seed)


def from_tokens(tokens: Tensor, source: str, seed: int) -> CalibrationSet:
    return CalibrationSet(tokens, source, token_hash(tokens), seed)
