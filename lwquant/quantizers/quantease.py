"""QuantEase: cyclic coordinate descent on the output error, from any start.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models",
arXiv:2309.01885. A sweep visits the input columns in turn and puts each weight on the grid point
that is best given all others. With outliers in the scheme, sweeps alternate with steps on these:
see outliers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from lwquant.methods import base_of
from lwquant.ops.rounding import round_columns
from lwquant.quantizers.gptq import gptq, shrunk
from lwquant.quantizers.grid import Grid, even_steps_only, fit_grid
from lwquant.quantizers.outliers import largest_eigenvalue, refit_outliers, top_entries
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, Outliers, QuantizedWeight

SHRINKAGE = 0.35  # of the correlations; the README says what it is worth
RELAXED_EVERY = 3  # from unrounded weights, every third sweep moves them without rounding


def quantease(
    weight: Tensor,
    stats: LayerStats,
    scheme: QuantScheme,
    *,
    start: Literal["gptq", "weight"] = "gptq",
    sweeps: int = 4,
    damping: float = 0.01,
    shrinkage: float = SHRINKAGE,
    search: bool = True,
    unclipped: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize one linear by descent on tr((Ŵ − W)(S + damping·mean(diag H)·I)(Ŵ − W)ᵀ).

    S is the Hessian H with weaker correlations, see shrunk(): a descent leans on them more than
    GPTQ does.

    Where the scheme has outliers they are part of Ŵ. They lie wherever in the linear they do most,
    so that the rows are not independent of each other then.

    Args:
        weight: (out_features, in_features).
        stats: hessian (in_features, in_features).
        start: "gptq" polishes GPTQ's result, and no step can make it worse; "weight" is the
            paper's: from the weight itself, with relaxed sweeps that do not round in between.
        sweeps: over all columns. The last one always rounds.
        damping, shrinkage, search, unclipped: as for gptq().

    Raises ValueError as gptq() does, and for a codebook.
    """
    even_steps_only(scheme)
    hessian, order = _damped(stats, weight.device, damping, shrinkage)
    n_outliers, plain = scheme.n_outliers(*weight.shape), scheme.without_outliers
    apart = top_entries(weight.float(), n_outliers)
    target = weight.float() - apart
    eigenvalue = largest_eigenvalue(hessian) if n_outliers else None
    if start == "gptq":
        begun = gptq(
            target,
            stats,
            plain,
            damping=damping,
            shrinkage=shrinkage,
            search=search,
            unclipped=unclipped,
        )
        grid = Grid(plain, begun.scales.float(), begun.zero_points)
        current, notes = begun.dequantize(), begun.notes
    else:
        importance = stats.hessian.diagonal().to(weight.device)
        seen = importance if importance.any() else None
        grid = fit_grid(target, plain, seen, search=search, unclipped=unclipped)
        current, notes = target.clone(), ()
    codes = grid.round(current)
    for number in range(sweeps):
        relaxed = start == "weight" and number % RELAXED_EVERY == 1 and number < sweeps - 1
        current = sweep(target, current, hessian, None if relaxed else grid, order)
        if relaxed:
            continue
        codes = grid.round(current)
        if eigenvalue is not None:
            missed = weight.float() - current
            apart = refit_outliers(missed, apart, hessian, eigenvalue, n_outliers)
            target = weight.float() - apart
    found = grid.weight_of(codes, notes)
    if not scheme.outliers:
        return found
    return replace(found, scheme=scheme, outliers=Outliers.largest(apart, n_outliers))


def without_descent(quantizer: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantizer` starts from where it is quantease(start="gptq"), else itself.

    The descent takes several times as long as GPTQ and changes little in which linears suffer most,
    so this is what costs are measured with.
    """
    settings = quantizer.keywords if isinstance(quantizer, partial) else {}
    if base_of(quantizer) is not quantease or settings.get("start", "gptq") != "gptq":
        return quantizer
    named = ("damping", "shrinkage", "search")
    shared = {key: settings[key] for key in named if key in settings}
    return partial(gptq, **{"shrinkage": SHRINKAGE, **shared})


@lru_cache(maxsize=1)
def _damped(
    stats: LayerStats, device: torch.device, damping: float, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """The Hessian of the descent and the columns by falling diagonal; linears share it."""
    hessian = shrunk(stats.hessian.to(device, torch.float32), shrinkage)
    mean = hessian.diagonal().mean()
    ridge = damping * mean if mean > 0 else torch.ones_like(mean)
    damped = hessian + ridge * torch.eye(len(hessian), device=device)
    return damped, torch.argsort(damped.diagonal(), descending=True)


def sweep(
    weight: Tensor, current: Tensor, hessian: Tensor, grid: Grid | None, order: Tensor
) -> Tensor:
    """One visit to every column in `order`; returns the new (out_features, in_features).

    Args:
        weight, current: the target, and where the descent is.
        hessian: positive on the diagonal.
        grid: None moves each column to its optimum without rounding.
    """
    ordered = hessian[order][:, order]
    # Columns are rows here, so that each is contiguous. A target is where the column's optimum is
    # given all others: Ŵ_j + [(W − Ŵ) H]_j / H_jj.
    values = current.T[order].contiguous()
    owed = ((weight.float() - current) @ hessian).T[order]
    diagonal = ordered.diagonal()
    targets = (values + owed / diagonal[:, None]).contiguous()
    feedback = -ordered / diagonal
    if grid is None:
        _move_columns(targets, feedback, values)
    else:
        expand = order // grid.scheme.group_size
        scales, zeros = (part.T[expand].contiguous() for part in (grid.scales, grid.zeros))
        round_columns(targets, feedback, scales, zeros, grid.scheme.max_code, base=values)
    return targets[torch.argsort(order)].T.contiguous()


def _move_columns(targets: Tensor, feedback: Tensor, base: Tensor) -> None:
    """round_columns() without rounding: solve for all columns at once.

    Column c ends at t_c = u_c + Σ_{k<c} (t_k − b_k) F_kc, so with m = t − b the moves solve the
    unit triangular system (I − F)ᵀ m = u − b over the strictly upper F.
    """
    upper = torch.triu(feedback, diagonal=1)
    system = torch.eye(len(upper), device=upper.device) - upper.T
    moves = torch.linalg.solve_triangular(system, targets - base, upper=False, unitriangular=True)
    targets.copy_(base + moves)
