"""GPTQ: round input columns one by one and push each column's error onto the later ones.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", arXiv:2210.17323, Algorithm 1 with lazy updates. The asymmetric term is
from Li et al., "GPTAQ: Efficient Finetuning-Free Quantization with Asymmetric Calibration",
arXiv:2504.02692, the first-order term from Zheng et al., "First-Order Error Matters: Accurate
Compensation for Quantized Large Language Models" (FOEM), arXiv:2507.11017.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lwquant.ops.rounding import BLOCK_COLUMNS, on_grid, round_columns
from lwquant.quantizers.grid import fit_grid
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight

MAX_DAMPING = 10.0


def gptq(
    weight: Tensor,
    stats: LayerStats,
    scheme: QuantScheme,
    *,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    act_order: bool = True,
    search: bool = True,
    unclipped: Tensor | None = None,
    asymmetry: float = 0.0,
    first_order: float = 0.0,
) -> QuantizedWeight:
    """Quantize one linear so that its output error on the calibration inputs is small.

    Grids are fitted once from the given weight (static groups), so act_order stores no permutation.

    Args:
        weight: (out_features, in_features).
        stats: hessian (in_features, in_features); drift too when asymmetry is not 0.
        damping: fraction of mean(diag(H)) added to the diagonal; multiplied by 10 for as long as
            the Cholesky factorization fails, and then noted in the result.
        shrinkage: share of what is off the Hessian's diagonal that is left out; see shrunk().
        act_order: columns of large activations first.
        search: fit each group's range by squared error weighted with diag(H).
        unclipped: rows (out_features,) bool whose groups keep their full range all the same.
        asymmetry: strength of GPTAQ's term, which aims at the output on the float model's inputs.
        first_order: strength β in [0, 1] of FOEM's term, which holds each column back on its way
            from the given weight: 0 is GPTQ, 1 plain rounding on the same grid. Its authors use 0.1
            and 0.2. As in their code, a column is held back once, when its turn comes.

    Raises ValueError when the Hessian stays indefinite up to MAX_DAMPING, drift is missing, or
    first_order or shrinkage is out of range.
    """
    if not 0 <= first_order <= 1:
        raise ValueError(f"first_order={first_order} must be between 0 and 1")
    hessian = stats.hessian.to(weight.device, torch.float32)
    diagonal = hessian.diagonal()
    importance = diagonal if diagonal.any() else None
    grid = fit_grid(weight, scheme, importance, search=search, unclipped=unclipped)
    order, upper, used = _factor(stats, weight.device, damping, shrinkage, act_order)
    # Columns are rows here, so that each is contiguous.
    columns = weight.float().T[order].contiguous()
    expand = order // scheme.group_size
    scales, zeros = (part.T[expand].contiguous() for part in (grid.scales, grid.zeros))
    feedback = upper / upper.diagonal()[:, None]
    if asymmetry or first_order:
        pull = _asymmetric_pull(stats, order, upper, asymmetry) if asymmetry else None
        _round_with_terms(columns, feedback, pull, first_order, scales, zeros, scheme)
    else:
        round_columns(columns, feedback, scales, zeros, scheme.max_code, codebook=scheme.codebook)
    codes = grid.round(columns[torch.argsort(order)].T)
    notes = () if used == damping else (f"damping raised from {damping} to {used:g}",)
    return grid.weight_of(codes, notes)


@lru_cache(maxsize=1)
def _factor(
    stats: LayerStats, device: torch.device, damping: float, shrinkage: float, act_order: bool
) -> tuple[Tensor, Tensor, float]:
    """Column order, factor of the inverse in that order, and the damping used.

    Linears that share their input come one after another, and so do the schemes of one linear, so
    remembering the last factor saves most of them.
    """
    hessian = shrunk(stats.hessian.to(device, torch.float32), shrinkage)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(diagonal))
    order = order.to(device)
    return order, *inverse_cholesky(hessian[order][:, order], damping)


def shrunk(hessian: Tensor, shrinkage: float) -> Tensor:
    """(1 − shrinkage)·H + shrinkage·diag(H): the same energies, weaker correlations.

    An estimate from few samples is better for that (Ledoit, Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices", 2004, towards another target), and still better for text
    of another kind: rounding that leans on correlations errs more where they do not hold. Unlike
    damping, which adds the same to all inputs, it means the same beside inputs of massive energy.

    Raises ValueError for a shrinkage that is not in [0, 1].
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage} must be between 0 and 1")
    if not shrinkage:
        return hessian
    weaker = hessian * (1 - shrinkage)
    weaker.diagonal().copy_(hessian.diagonal())
    return weaker


def inverse_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of (H + damping·mean(diag)·I)⁻¹, and the damping that worked."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise ValueError("the Hessian holds NaN or Inf")
    if mean <= 0:
        return torch.eye(len(diagonal), device=hessian.device), damping
    identity = torch.eye(len(diagonal), device=hessian.device)
    used = damping
    while used <= MAX_DAMPING:
        lower, info = torch.linalg.cholesky_ex(hessian + used * mean * identity)
        if info == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info == 0:
                return upper, used
        used *= 10
    raise ValueError(f"the Hessian is not positive definite even with damping {MAX_DAMPING}")


def _round_with_terms(
    columns: Tensor,
    feedback: Tensor,
    pull: Tensor | None,
    first_order: float,
    scales: Tensor,
    zeros: Tensor,
    scheme: QuantScheme,
) -> None:
    """round_columns() with the terms of GPTAQ and FOEM.

    GPTAQ: each target also pulls the later columns, as it is. FOEM: a target gives up the share β
    of its distance from the weight, and so does its error, again: e = (q − t) + β (t − w).
    """
    weight = columns.clone() if first_order else columns
    for start in range(0, len(columns), BLOCK_COLUMNS):
        own = slice(start, min(start + BLOCK_COLUMNS, len(columns)))
        errors, targets = torch.empty_like(columns[own]), torch.empty_like(columns[own])
        for local, col in enumerate(range(own.start, own.stop)):
            targets[local] = columns[col]
            if first_order:
                targets[local].lerp_(weight[col], first_order)
            grid_of_column = scales[col], zeros[col], scheme.max_code, scheme.codebook
            columns[col] = on_grid(targets[local], *grid_of_column)
            torch.sub(columns[col], targets[local], out=errors[local])
            if first_order:
                errors[local].add_(targets[local] - weight[col], alpha=first_order)
            later = slice(col + 1, own.stop)
            if pull is not None:
                columns[later].addr_(pull[col, later], targets[local])
            columns[later].addr_(feedback[col, later], errors[local])
        if pull is not None:
            columns[own.stop :].addmm_(pull[own, own.stop :].T, targets)
        columns[own.stop :].addmm_(feedback[own, own.stop :].T, errors)


def _asymmetric_pull(stats: LayerStats, order: Tensor, upper: Tensor, strength: float) -> Tensor:
    """P of GPTAQ, (in_features, in_features) strictly upper triangular, in the given order."""
    if stats.drift is None:
        raise ValueError("asymmetry needs the drift between the two streams, which is missing")
    drift = stats.drift.to(order.device, torch.float32)[order][:, order]
    return strength * torch.triu(drift @ upper.T, diagonal=1) @ upper
