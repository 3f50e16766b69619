"""TokenSim: tokens unlike the rest of their window matter more."""

from __future__ import annotations

from torch import Tensor

from lwquant.importance.view import BlockView


def token_similarity(view: BlockView) -> Tensor:
    """Mean squared distance of what enters the block to the window's other tokens."""
    inputs = view.inputs.double()
    others = max(inputs.shape[1] - 1, 1)
    # Σ_j ‖x_i − x_j‖² = Σ_j ‖x_j − m‖² + n ‖x_i − m‖² around the window's mean m.
    away = (inputs - inputs.mean(1, keepdim=True)).square().sum(-1)
    total = away.sum(1, keepdim=True) + inputs.shape[1] * away
    return (total / others).float()
