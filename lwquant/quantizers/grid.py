"""Fitting the grid of each group, and rounding onto it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lwquant.codebooks import nearest_codes, values_of
from lwquant.ops.rounding import fit_groups
from lwquant.ops.scale_bytes import MANTISSA_BITS, window_floor
from lwquant.types import QuantScheme

# Ranges tried by the clip search, as fractions of the full range; below a third, clipping has
# never won at 2 bits on the weights we looked at, where it goes furthest.
SHRINKS = torch.linspace(1.0, 0.36, 33).tolist()
FLOAT16_END = 2.0**16  # what would follow the largest float16
# Rows are handled in slices of about this many weights, so that the search stays in cache.
SLICE_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Scales (float16 values) and whole zeros of every group, each (out_features, n_groups)."""

    scheme: QuantScheme
    scales: Tensor  # float32, values that the scheme's scale_bits can hold
    zeros: Tensor  # float32, whole numbers in [0, max_code]; not looked at with a codebook

    def round(self, weight: Tensor) -> Tensor:
        """Nearest codes (out_features, in_features) float32."""
        expand = torch.arange(weight.shape[1], device=weight.device) // self.scheme.group_size
        steps = weight / self.scales[:, expand]
        if self.scheme.codebook:
            return nearest_codes(steps, self.scheme.codebook).float()
        return steps.add_(self.zeros[:, expand]).round_().clamp_(0, self.scheme.max_code)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weight (out_features, in_features) float32 that codes of this grid stand for."""
        expand = torch.arange(codes.shape[1], device=codes.device) // self.scheme.group_size
        if self.scheme.codebook:
            return values_of(codes, self.scheme.codebook) * self.scales[:, expand]
        return (codes.float() - self.zeros[:, expand]) * self.scales[:, expand]


def even_steps_only(scheme: QuantScheme) -> None:
    """ValueError for a scheme whose codes name the values of a table."""
    if scheme.codebook:
        raise ValueError(
            f"scheme {scheme.label} has no even steps; quantizers 'gptq', 'rtn' and 'bnb' need none"
        )


def fit_grid(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor | None = None,
    *,
    search: bool = True,
    unclipped: Tensor | None = None,
) -> Grid:
    """The grid of each group of each row.

    Args:
        weight: (out_features, in_features) float.
        importance: (in_features,) weights of the squared error, e.g. the Hessian's diagonal;
            equal weights when None.
        search: shrink the range step by step and keep, per group, the range of least weighted
            squared error, then refit its scale by least squares. False: plain min-max.
        unclipped: rows (out_features,) bool that are plain min-max all the same.

    Raises ValueError when a scale leaves float16's range.
    """
    out_features, in_features = weight.shape
    n_groups, size = scheme.n_groups(in_features), min(scheme.group_size, in_features)
    padding = n_groups * size - in_features
    grouped = torch.nn.functional.pad(weight.float(), (0, padding))
    grouped = grouped.reshape(out_features * n_groups, size)
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    per_group = torch.nn.functional.pad(importance.float(), (0, padding)).view(n_groups, size)
    found = None
    if search and not scheme.codebook:
        how = scheme.bits, scheme.symmetric, scale_mantissa(scheme)
        found = fit_groups(grouped, per_group, SHRINKS, *how)
    scales, zeros = found or _fit_slices(grouped, per_group, scheme, search)
    scales, zeros = scales.view(out_features, n_groups), zeros.view(out_features, n_groups)
    scales = in_window(scales, scheme)
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"a group of weights up to {weight.abs().max():.3g} overflows float16 scales"
        )
    if search and unclipped is not None and unclipped.any():
        full = fit_grid(weight[unclipped], scheme, search=False)
        scales[unclipped], zeros[unclipped] = full.scales, full.zeros
    return Grid(scheme, scales, zeros)


def _fit_slices(
    grouped: Tensor, per_group: Tensor, scheme: QuantScheme, search: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero, each (n,), of groups (n, size); importance (n_groups, size) repeats."""
    n_groups, size = per_group.shape
    rows = max(1, SLICE_WEIGHTS // (size * n_groups)) * n_groups
    parts = []
    for start in range(0, grouped.shape[0], rows):
        part = grouped[start : start + rows]
        weights = per_group.repeat(part.shape[0] // n_groups, 1)
        parts.append(_fit_rows(part, weights, scheme, search))
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _fit_rows(
    rows: Tensor, importance: Tensor, scheme: QuantScheme, search: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero, each (n,), of rows (n, size) that are one group each."""
    # Zero is always inside the range, so that 0.0 stays exactly representable.
    low = rows.amin(1).clamp(max=0)
    high = rows.amax(1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_scale, best_zero = _grid_of(low, high, scheme)
    if not search:
        return best_scale, best_zero
    best_error = _error(rows, importance, best_scale, best_zero, scheme)
    for shrink in SHRINKS[1:]:
        scale, zero = _grid_of(low * shrink, high * shrink, scheme)
        error = _error(rows, importance, scale, zero, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    scale = _refit_scale(rows, importance, best_scale, best_zero, scheme)
    better = _error(rows, importance, scale, best_zero, scheme) < best_error
    return torch.where(better, scale, best_scale), best_zero


def _grid_of(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    if scheme.symmetric:
        # 2^(b-1) negative steps and one fewer positive: the larger half carries the range.
        steps = 1.0 if scheme.codebook else 2 ** (scheme.bits - 1) - 0.5
        scale = storable_scale(high / steps, scheme)
        return scale, torch.full_like(scale, float(2 ** (scheme.bits - 1)))
    scale = storable_scale((high - low) / scheme.max_code, scheme)
    zero = (-low / scale).round_().clamp_(0, scheme.max_code)
    return scale, zero


def storable_scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Round to the mantissa that the scheme stores, and keep above zero; 1 for an all-zero group.

    Infinite where float16 ends. Scales of one row can still lie too far apart: see in_window().
    """
    tiny = torch.finfo(torch.float16).smallest_normal
    stored = torch.where(scale > 0, scale.clamp(min=tiny), torch.ones_like(scale)).float()
    mantissa, exponent = torch.frexp(stored)  # in [0.5, 1): one bit fewer than float16 counts
    steps = 2.0 ** (scale_mantissa(scheme) + 1)
    stored = torch.ldexp((mantissa * steps).round_() / steps, exponent)
    return torch.where(stored < FLOAT16_END, stored, torch.inf)


def in_window(scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Raise scales (out_features, n_groups) that 8 bits cannot write beside their row's largest.

    That leaves at most 2⁻¹⁵ of the largest: what such a group holds is nothing beside the others.
    """
    return torch.maximum(scales, window_floor(scales)) if scheme.scale_bits == 8 else scales


def scale_mantissa(scheme: QuantScheme) -> int:
    """Bits of a stored scale below its leading one."""
    return MANTISSA_BITS if scheme.scale_bits == 8 else 10


def _steps(rows: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """The grid's nearest to the rows (n, size), in units of the scale."""
    steps = rows / scale[:, None]
    if scheme.codebook:
        return values_of(nearest_codes(steps, scheme.codebook), scheme.codebook)
    return steps.add_(zero[:, None]).round_().clamp_(0, scheme.max_code).sub_(zero[:, None])


def _error(
    rows: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme
) -> Tensor:
    rounded = _steps(rows, scale, zero, scheme).mul_(scale[:, None])
    return rounded.sub_(rows).square_().mul_(importance).sum(1)


def _refit_scale(
    rows: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme
) -> Tensor:
    """Least-squares scale for the codes that `scale` gives; the old one if not positive."""
    steps = _steps(rows, scale, zero, scheme)
    fit = (importance * steps * rows).sum(1) / (importance * steps.square()).sum(1).clamp(min=1e-30)
    return storable_scale(torch.where(fit > 0, fit, scale), scheme)
