"""What a token importance may look at: one block on the stream as it is so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockView:
    """A block before any of its linears is quantized, and what reaches it."""

    tokens: Tensor  # (n_samples, seq_len) int64, all calibration windows
    inputs: Tensor  # (n_samples, seq_len, hidden)
    outputs: Callable[[], Tensor]  # runs the block: (n_samples, seq_len, hidden)
    # Runs its attention: post-softmax probabilities (samples, heads, queries, keys), a few
    # samples at a time.
    attention: Callable[[], Iterator[Tensor]]


Importance = Callable[[BlockView], Tensor]
