"""Which tokens are predicted from which: windows of one length cut from a tokenized text.

Each begins with what the tokenizer puts before a text, `before` (m,), if anything; it counts in
the window's length, and the first token of the text is then predicted, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwquant.capture.tokens import opening, tokenize, with_opening
from lwquant.errors import CalibrationError

NOTHING = torch.zeros(0, dtype=torch.long)


def evenly_spread_windows(
    tokens: Tensor, seq_len: int, n_windows: int, before: Tensor = NOTHING
) -> Tensor:
    """Windows (n_windows, seq_len) that start at linspace(0, n - length, n_windows), rounded down.

    Args:
        tokens: (n,) of the whole text.

    They overlap where the text is shorter than all of them together. Raises CalibrationError
    where the text is shorter than one window.

    >>> evenly_spread_windows(torch.arange(10), 4, 3)[:, 0].tolist()
    [0, 3, 6]
    """
    length = _length(tokens, seq_len, before)
    if n_windows < 1:
        raise CalibrationError(f"windows={n_windows} must be at least 1")
    # Whole numbers: a float32 linspace rounds wrongly in texts of millions of tokens.
    last = tokens.numel() - length
    starts = [last * index // max(n_windows - 1, 1) for index in range(n_windows)]
    return with_opening(torch.stack([tokens[start : start + length] for start in starts]), before)


def windows_of(text: str, tokenizer: Any, seq_len: int, n_windows: int) -> Tensor:
    """Evenly spread windows (n_windows, seq_len) of a text; each has the tokenizer's opening()."""
    return evenly_spread_windows(tokenize(text, tokenizer), seq_len, n_windows, opening(tokenizer))


def strided_windows(
    tokens: Tensor, seq_len: int, stride: int, before: Tensor = NOTHING
) -> tuple[Tensor, Tensor]:
    """Windows that predict every token of the text exactly once, the first one after `before` only.

    Args:
        tokens: (n,) of the whole text.
        stride: tokens from one window to the next, at least 1 and less than a window has; a smaller
            one gives every token more context, at least seq_len - stride tokens of it after the
            first window.

    Returns the windows (n_windows, seq_len), and counted (n_windows, seq_len - 1) bool: whether
    window w is the one that predicts its token i + 1. The last window ends with the text.
    Raises CalibrationError where the text is shorter than one window.

    >>> windows, counted = strided_windows(torch.arange(7), 4, 2)
    >>> windows[:, 0].tolist(), counted.int().tolist()
    ([0, 2, 3], [[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    """
    length = _length(tokens, seq_len, before)
    if not 1 <= stride < length:
        raise CalibrationError(f"stride={stride} must be from 1 to {length - 1}: windows overlap")
    last = tokens.numel() - length
    starts = [*range(0, last, stride), last]
    counted = torch.zeros(len(starts), seq_len - 1, dtype=torch.bool)
    predicted = 0 if len(before) else 1  # tokens of the text before this one are done
    for row, start in enumerate(starts):
        counted[row, predicted - start + len(before) - 1 :] = True
        predicted = start + length
    windows = torch.stack([tokens[start : start + length] for start in starts])
    return with_opening(windows, before), counted


def _length(tokens: Tensor, seq_len: int, before: Tensor) -> int:
    """Tokens of the text in a window.

    Raises CalibrationError for an empty text, one below a window, or a window that predicts
    nothing.
    """
    length = seq_len - len(before)
    if seq_len < 2 or length < 1:
        raise CalibrationError(f"seq_len={seq_len} must be at least 2 to predict a token")
    if tokens.numel() == 0:
        raise CalibrationError("the text has no tokens")
    if tokens.numel() < length:
        raise CalibrationError(
            f"the text has {tokens.numel()} tokens, fewer than the {length} of one window"
        )
    return length
