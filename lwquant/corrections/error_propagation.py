"""QEP: aim each linear at the float model's output, given the inputs it will really get.

Arai, Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
arXiv:2504.09629.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.types import LayerStats


def error_propagation(
    weight: Tensor, stats: LayerStats, *, strength: float = 0.5, damping: float = 0.01
) -> Tensor:
    """W + strength · W · C · (H + damping·mean(diag H)·I)⁻¹ with C = Σ (x − x̂) x̂ᵀ.

    Unlike the authors we correct down projections too, which lowers the KL at 2, 3 and 4 bits on
    the tests' tiny Llama. A strength of 0.75 is better still there, but worse on SmolLM2-135M.

    Strength 1 is the ridge solution of min ‖W X − W* X̂‖², 0 the weight itself; values between
    shrink towards the weight, which guards against fitting the calibration set.

    Args:
        weight: (out_features, in_features).
        stats: hessian and drift, each (in_features, in_features).

    Raises ValueError when drift was not recorded or the damped Hessian is not positive definite.
    """
    if stats.drift is None:
        raise ValueError("error propagation needs the drift between the two streams")
    hessian = stats.hessian.to(weight.device, torch.float32)
    mean = hessian.diagonal().mean()
    if strength == 0 or mean == 0:
        return weight
    ridge = damping * mean * torch.eye(len(hessian), device=weight.device)
    lower, info = torch.linalg.cholesky_ex(hessian + ridge)
    if info != 0:
        raise ValueError(f"H + {damping}·mean(diag)·I is not positive definite; raise the damping")
    moved = weight.float() @ stats.drift.to(weight.device, torch.float32)
    return weight + strength * torch.cholesky_solve(moved.T, lower).T
