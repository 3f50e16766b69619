"""ActDiff: a token matters the more, the less the block changes it."""

from __future__ import annotations

from torch import Tensor

from lwquant.importance.view import BlockView


def activation_difference(view: BlockView) -> Tensor:
    """−‖z − x‖ of what enters the block, x, and what leaves it, z."""
    return -(view.outputs().float() - view.inputs.float()).norm(dim=-1)
