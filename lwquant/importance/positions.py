"""Position: only the tokens at a window's beginning, or at both its ends, matter."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.importance.view import BlockView


def positions(view: BlockView, *, first: float = 0.125, last: float = 0.0) -> Tensor:
    """One for the tokens at the chosen ends, zero for the others.

    RSQ tries the first eighth (the default), and the first and last 1/32, and leaves all other
    tokens out; here they keep the least weight there is.

    Args:
        first, last: shares of the window, from 0 to 1.
    """
    for name, share in (("first", first), ("last", last)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be a share of the window between 0 and 1")
    n_samples, seq_len = view.tokens.shape
    place = torch.arange(seq_len, device=view.inputs.device)
    chosen = (place < first * seq_len) | (place >= seq_len - last * seq_len)
    return chosen.float().expand(n_samples, seq_len)
