"""HQQ: grids fitted to the weights alone, so that few weights err much rather than all a little.

Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
https://mobiusml.github.io/hqq_blog. Their zeros are floats and their scales stay as min and max
gave them; our zeros are whole code values, so that the scale moves too, and each step chooses among
neighbouring zeros or, where the scheme has fine zeros, fits scale and zero together. They measure
errors in units of the weights and raise the penalty as they go; we measure in steps of the grid, so
that one penalty means the same for every group, and keep it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.groups import by_groups
from lwquant.quantizers.grid import (
    SHRINKS,
    Grid,
    even_steps_only,
    fit_grid,
    fit_line,
    in_window,
    storable_scale,
)
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight

Parts = tuple[Tensor, Tensor]  # scales and zeros, (out_features, n_groups, 1) each

PENALTY = 10.0  # of what the split leaves over, a step squared


def hqq(
    weight: Tensor,
    stats: LayerStats | None,
    scheme: QuantScheme,
    *,
    exponent: float = 0.7,
    rounds: int = 20,
) -> QuantizedWeight:
    """Quantize one linear so that Σ |Ŵ − W|^exponent is small in every group.

    With an exponent below 1 a large error costs little more than a middling one, so that outliers
    do not stretch the grid of the others. The sum is split in halves: E takes what the grid cannot
    follow, by shrinkage, and the grid is fitted to W − E by least squares; both in turn, from the
    best of the clipped ranges. Each group keeps the best grid it has seen, plain rounding's among
    them.

    Args:
        weight: (out_features, in_features).
        stats: not looked at.
        exponent: in (0, 1].
        rounds: of rounding, shrinking and fitting.

    Raises ValueError for another exponent, for a codebook, and when a scale leaves float16's range.
    """
    if not 0 < exponent <= 1:
        raise ValueError(f"exponent={exponent} must be above 0 and at most 1")
    even_steps_only(scheme)
    grouped = by_groups(weight.float(), scheme.group_size)
    # Which places (n_groups, size) are real, where the last group is shorter.
    inside = by_groups(torch.ones_like(weight[0], dtype=torch.float32), scheme.group_size)
    found = _parts(fit_grid(weight, scheme, search=False))
    best = _errors(grouped, inside, *found, scheme, exponent)
    for shrink in SHRINKS[1:]:
        tried = _parts(fit_grid(weight * shrink, scheme, search=False))
        errors = _errors(grouped, inside, *tried, scheme, exponent)
        best, found = _better(best, found, errors, tried)
    scale, zero = found
    step = scale
    for _ in range(rounds):
        codes = scheme.nearest_codes(grouped / scale, zero)
        apart = _shrunk((grouped - (codes - zero) * scale) / step, PENALTY, exponent) * step
        scale, zero = _refit(grouped - apart, codes, inside, scale, zero, scheme)
        errors = _errors(grouped, inside, scale, zero, scheme, exponent)
        best, found = _better(best, found, errors, (scale, zero))
    grid = Grid(scheme, in_window(found[0][:, :, 0], scheme), found[1][:, :, 0])
    return grid.weight_of(grid.round(weight.float()))


def _parts(grid: Grid) -> Parts:
    return grid.scales[:, :, None], grid.zeros[:, :, None]


def _errors(
    grouped: Tensor,
    inside: Tensor,
    scale: Tensor,
    zero: Tensor,
    scheme: QuantScheme,
    exponent: float,
) -> Tensor:
    """Σ |Ŵ − W|^exponent of each group, (out_features, n_groups, 1)."""
    rounded = (scheme.nearest_codes(grouped / scale, zero) - zero) * scale
    return (rounded - grouped).abs_().pow_(exponent).mul_(inside).sum(2, keepdim=True)


def _shrunk(errors: Tensor, penalty: float, exponent: float) -> Tensor:
    """About the minimum over e of |e|^exponent / exponent + penalty/2 (e − error)², elementwise."""
    size = errors.abs()
    return errors.sign() * (size - size.pow(exponent - 1) / penalty).clamp_(min=0)


def _refit(
    wanted: Tensor, codes: Tensor, inside: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme
) -> Parts:
    """Scale and zero of least squares for codes that stay.

    The zero is it and its neighbours' best; a fine one is it or that of the fitted line.
    """
    best, found = torch.full_like(scale, torch.inf), (scale, zero)
    for tried in _zeros_to_try(wanted, codes, inside, scale, zero, scheme):
        steps = (codes - tried) * inside
        fit = (steps * wanted).sum(2, keepdim=True)
        fit /= steps.square().sum(2, keepdim=True).clamp(min=1e-30)
        fitted = storable_scale(torch.where(fit > 0, fit, scale), scheme)
        missed = (steps * fitted - wanted).square_().sum(2, keepdim=True)
        best, found = _better(best, found, missed, (fitted, tried))
    return found


def _zeros_to_try(
    wanted: Tensor, codes: Tensor, inside: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme
) -> tuple[Tensor, ...]:
    if scheme.symmetric:
        return (zero,)
    if scheme.fine_zeros:
        return zero, fit_line(wanted, codes, inside.expand_as(wanted), scale, scheme)[1]
    return zero, *((zero + shift).clamp(0, scheme.max_code) for shift in (-1, 1))


def _better(best: Tensor, found: Parts, errors: Tensor, tried: Parts) -> tuple[Tensor, Parts]:
    """The lesser error of each group, and the scale and zero that have it."""
    less = errors < best
    scale, zero = (torch.where(less, new, old) for new, old in zip(tried, found, strict=True))
    return torch.where(less, errors, best), (scale, zero)
