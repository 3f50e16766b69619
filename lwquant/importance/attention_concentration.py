"""AttnCon: a token matters as much as the block's heads look at it."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.importance.view import BlockView


def attention_concentration(view: BlockView, *, skip_first: bool = False) -> Tensor:
    """Attention probability a token gets, summed over heads and query positions.

    Args:
        skip_first: give a window's first token the score of the least important other one. It
            draws attention whatever it says, and the range of weights is spent on it.
    """
    scores = torch.cat([each.float().sum((1, 2)) for each in view.attention()])
    if skip_first and scores.shape[1] > 1:
        scores[:, 0] = scores[:, 1:].amin(1)
    return scores
