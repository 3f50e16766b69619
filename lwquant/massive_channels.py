"""Massive channels of queries and keys, whose rows of weights are rounded without clipping.

Jin et al., "Massive Values in Self-Attention Modules are the Key to Contextual Knowledge
Understanding", arXiv:2502.01563: few channels of queries and keys are much larger than the others,
and quantization that hurts them hurts what a model takes from its context more than what it knows.
A range search trades the ends of a group's range for finer steps in the middle. That is right for
the mean error, but the rows that feed those channels keep the full range here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.errors import LwquantError
from lwquant.types import LayerStats, LinearSpec

ROLES = ("q_proj", "k_proj")


def massive_rows(weight: Tensor, stats: LayerStats, share: float) -> Tensor:
    """The `share` of the outputs, rounded up, whose mean square on the calibration inputs is
    largest, (out_features,) bool.

    E[y_o²] = W_o H W_oᵀ / n. A bias is not counted, nor what a norm or rotary positions do after.

    Args:
        weight: (out_features, in_features).
    """
    squares = ((weight.float() @ stats.hessian.to(weight.device, torch.float32)) * weight).sum(1)
    n_rows = math.ceil(share * len(weight) - 1e-9)  # 0.1 · 30 is a little above 3
    rows = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    rows[squares.topk(n_rows).indices] = True
    return rows


def check_roles(linears: Sequence[LinearSpec], share: float) -> None:
    """LwquantError where a share is asked for of a model whose queries and keys have no linears of
    their own, because it fuses them with the values or calls them otherwise."""
    roles = sorted({spec.role for spec in linears})
    if share and not set(ROLES) <= set(roles):
        raise LwquantError(
            f"unclipped_qk={share} needs linears named {' and '.join(ROLES)}; the model has "
            f"{', '.join(roles)}"
        )
