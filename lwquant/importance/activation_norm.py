"""ActNorm: a token matters as much as its activations are large."""

from __future__ import annotations

from torch import Tensor

from lwquant.importance.view import BlockView


def activation_norm(view: BlockView) -> Tensor:
    """Euclidean norm of what enters the block."""
    return view.inputs.float().norm(dim=-1)
