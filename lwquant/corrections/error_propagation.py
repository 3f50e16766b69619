"""QEP: aim each linear at the float model's output, given the inputs it will really get.

Arai, Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
arXiv:2504.09629.

Ours goes further in two points. A linear whose output is added to the residual stream also takes
on the error that the stream carries already, as far as its inputs can tell. And the strength is
found for each linear by cross-validation: with few tokens per input, a fixed one does harm (on the
tests' tiny Llama 0.5 does below about 2 tokens per input, and the residual's part below about 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.types import LayerStats


def error_propagation(
    weight: Tensor,
    stats: LayerStats,
    *,
    strength: float | None = None,
    damping: float = 0.01,
    repair_residual: bool = True,
) -> Tensor:
    """W + strength · Δ with Δ = R · (H + damping·mean(diag H)·I)⁻¹.

    R is W Σ (x − x̂) x̂ᵀ and, for linears that write into the residual stream r, all that the stream
    lacks after them, Σ (r + W x − r̂ − W x̂) x̂ᵀ. Strength 1 is the ridge solution of
    min ‖(r + W x) − (r̂ + W* x̂)‖², 0 the weight itself; values between shrink towards the weight,
    which guards against fitting the calibration set. Unlike the authors we correct down projections
    too.

    Args:
        weight: (out_features, in_features).
        stats: hessian (in_features, in_features), and drift, alike, or owed, of the weight's shape.
        strength: None chooses it for each linear by two-fold cross-validation: the one at which Δ
            from one half of the tokens fits the other half best. The authors use 0.5.
        repair_residual: False leaves the stream's own error out, as in the paper; needs drift.

    Raises ValueError when drift was not recorded or the damped Hessian is not positive definite.
    """
    if stats.drift is None and (stats.owed is None or not repair_residual):
        raise ValueError("error propagation needs the drift between the two streams")
    if strength is None:
        strength = cross_validated(weight, stats, damping, repair_residual)
    return weight + strength * _step(weight, stats, damping, repair_residual)


def cross_validated(
    weight: Tensor, stats: LayerStats, damping: float, repair_residual: bool
) -> float:
    """The strength in [0, 1] that fits best where the step was computed from the other half."""
    half = stats.half
    if half is None:
        raise ValueError("a cross-validated strength needs statistics of half of the tokens")
    rest = stats.rest()
    fitted = moved = 0.0
    for known, tested in ((half, rest), (rest, half)):
        step = _step(weight, known, damping, repair_residual)
        fitted += (_owed(weight, tested, repair_residual) * step).sum().item()
        hessian = tested.hessian.to(step.device, torch.float32)
        moved += ((step @ hessian) * step).sum().item()
    return min(max(fitted / moved, 0.0), 1.0) if moved > 0 else 0.0


def _step(weight: Tensor, stats: LayerStats, damping: float, repair_residual: bool) -> Tensor:
    hessian = stats.hessian.to(weight.device, torch.float32)
    mean = hessian.diagonal().mean()
    if mean == 0:
        return torch.zeros_like(weight)
    ridge = damping * mean * torch.eye(len(hessian), device=weight.device)
    lower, info = torch.linalg.cholesky_ex(hessian + ridge)
    if info != 0:
        raise ValueError(f"H + {damping}·mean(diag)·I is not positive definite; raise the damping")
    return torch.cholesky_solve(_owed(weight, stats, repair_residual).T, lower).T


def _owed(weight: Tensor, stats: LayerStats, repair_residual: bool) -> Tensor:
    """R: what the output lacks, times the inputs."""
    if stats.owed is not None and repair_residual:
        return stats.owed.to(weight.device, torch.float32)
    assert stats.drift is not None
    return weight.float() @ stats.drift.to(weight.device, torch.float32)
