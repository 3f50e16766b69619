"""Least-squares scales of all groups of a row together, for codes that are given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lwquant.groups import by_groups, group_of_inputs
from lwquant.quantizers.grid import Grid, in_window, storable_scale

RIDGE = 1e-6  # of the diagonal: groups whose codes are all zero, or say the same as another's


def refit_scales(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """The grid with the scales of least (Ŵ − W) H (Ŵ − W)ᵀ, row by row.

    Ŵ is linear in its scales, so that each row's are the solution of n_groups normal equations.
    A row keeps its old scales where the new ones are not better once they are positive and
    rounded as they are stored.

    Args:
        weight, codes: (out_features, in_features).
        hessian: (in_features, in_features).
    """
    size, n_groups = grid.scheme.group_size, grid.scales.shape[1]
    group = group_of_inputs(weight.shape[1], size, weight.device)
    steps = grid.scheme.steps_of(codes, grid.zeros[:, group])
    bound = _group_sums(steps * (weight.float() @ hessian), grid)
    rows, product = [], torch.empty_like(steps)  # one buffer: fresh memory costs more than the sums
    for start in range(0, n_groups * size, size):
        part = slice(start, start + size)
        torch.mm(steps[:, part], hessian[part], out=product)
        rows.append(_group_sums(product.mul_(steps), grid))
    normal = torch.stack(rows, dim=1)
    normal = (normal + normal.mT) / 2
    # Around the old scales: where the codes of a group say nothing, nothing moves.
    slack = bound - (normal @ grid.scales.double()[:, :, None])[:, :, 0]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    lower, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(diagonal * RIDGE + ridge))
    moved = torch.cholesky_solve(slack[:, :, None], lower)[:, :, 0]
    wanted = grid.scales.double() + moved
    usable = (info == 0) & torch.isfinite(wanted).all(1)
    kept = torch.where(usable[:, None], wanted, grid.scales.double()).float()
    stored = in_window(storable_scale(kept, grid.scheme), grid.scheme)
    usable &= torch.isfinite(stored).all(1)
    step = torch.where(usable[:, None], stored - grid.scales, 0).double()
    gained = 2 * (slack * step).sum(1) - ((normal @ step[:, :, None])[:, :, 0] * step).sum(1)
    better = usable & (gained > 0)
    return replace(grid, scales=torch.where(better[:, None], stored, grid.scales))


def _group_sums(values: Tensor, grid: Grid) -> Tensor:
    """Sums over the columns of each group, (out_features, n_groups) float64."""
    return by_groups(values, grid.scheme.group_size).sum(2).double()
