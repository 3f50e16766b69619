"""Which tokens are predicted from which: windows of one length cut from a tokenized text."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.errors import CalibrationError


def evenly_spread_windows(tokens: Tensor, seq_len: int, n_windows: int) -> Tensor:
    """Windows (n_windows, seq_len) that start at linspace(0, n - seq_len, n_windows), rounded down.

    Args:
        tokens: (n,) of the whole text.

    They overlap where the text is shorter than all of them together. Raises CalibrationError
    where the text is shorter than one window.

    >>> evenly_spread_windows(torch.arange(10), 4, 3)[:, 0].tolist()
    [0, 3, 6]
    """
    check_lengths(tokens, seq_len)
    if n_windows < 1:
        raise CalibrationError(f"windows={n_windows} must be at least 1")
    # Whole numbers: a float32 linspace rounds wrongly in texts of millions of tokens.
    last = tokens.numel() - seq_len
    starts = [last * index // max(n_windows - 1, 1) for index in range(n_windows)]
    return torch.stack([tokens[start : start + seq_len] for start in starts])


def strided_windows(tokens: Tensor, seq_len: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows that predict every token of the text but the first exactly once.

    Args:
        tokens: (n,) of the whole text.
        stride: tokens from one window to the next, 1 to seq_len - 1; a smaller one gives every
            token more context, at least seq_len - stride tokens of it after the first window.

    Returns the windows (n_windows, seq_len), and counted (n_windows, seq_len - 1) bool: whether
    window w is the one that predicts its token i + 1. The last window ends with the text.
    Raises CalibrationError where the text is shorter than one window.

    >>> windows, counted = strided_windows(torch.arange(7), 4, 2)
    >>> windows[:, 0].tolist(), counted.int().tolist()
    ([0, 2, 3], [[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    """
    check_lengths(tokens, seq_len)
    if not 1 <= stride < seq_len:
        raise CalibrationError(f"stride={stride} must be from 1 to seq_len - 1 = {seq_len - 1}")
    last = tokens.numel() - seq_len
    starts = [*range(0, last, stride), last]
    counted = torch.zeros(len(starts), seq_len - 1, dtype=torch.bool)
    predicted = 1  # tokens before this one are done
    for row, start in enumerate(starts):
        counted[row, predicted - start - 1 :] = True
        predicted = start + seq_len
    return torch.stack([tokens[start : start + seq_len] for start in starts]), counted


def check_lengths(tokens: Tensor, seq_len: int) -> None:
    """CalibrationError for an empty text, one below a window, or a window that predicts nothing."""
    if seq_len < 2:
        raise CalibrationError(f"seq_len={seq_len} must be at least 2 to predict a token")
    if tokens.numel() == 0:
        raise CalibrationError("the text has no tokens")
    if tokens.numel() < seq_len:
        raise CalibrationError(
            f"the text has {tokens.numel()} tokens, fewer than one window of {seq_len}"
        )
