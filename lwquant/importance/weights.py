"""From scores of tokens to their weights in the sums over calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lwquant.importance.view import BlockView, Importance


@dataclass(frozen=True)
class TokenWeighting:
    """How a run weighs its calibration tokens.

    `floor` is the weight of a window's least important token, as a share of that of its most
    important one. RSQ's text finds 0.1 best without rotated weights and 0.01 with them.
    """

    score: Importance
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be between 0 and 1")

    def __call__(self, view: BlockView) -> Tensor:
        """Weights (n_samples, seq_len) of the tokens in this block's statistics."""
        return token_weights(self.score(view), self.floor)


def token_weights(scores: Tensor, floor: float) -> Tensor:
    """Scores (n_samples, seq_len) mapped to [floor, 1] in each window, then scaled to mean one.

    A window whose scores are all the same gets weights of one.
    """
    scores = scores.double()
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    spread = high - low
    share = torch.where(spread > 0, (scores - low) / spread, 1.0)
    raised = floor + (1 - floor) * share
    return (raised / raised.mean(1, keepdim=True)).float()
