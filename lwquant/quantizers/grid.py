"""Fitting the grid of each group, and rounding onto it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lwquant.groups import by_groups, group_of_inputs
from lwquant.ops.rounding import fit_groups
from lwquant.ops.scale_bytes import MANTISSA_BITS, window_floor
from lwquant.scheme import QuantScheme
from lwquant.types import QuantizedWeight

# Ranges tried by the clip search, as fractions of the full range; below a third, clipping has
# never won at 2 bits on the weights we looked at, where it goes furthest.
SHRINKS = torch.linspace(1.0, 0.36, 33).tolist()
# With fine zeros each end of the range shrinks by itself: every pair of these is tried, then the
# pairs around the best, this often, at half the distance each time.
END_SHRINKS = torch.linspace(1.0, 0.36, 6).tolist()
HALVINGS = 3
LINE_FITS = 2  # and then lines are fitted this often through codes and weights
FLOAT16_END = 2.0**16  # what would follow the largest float16
# Rows are handled in slices of about this many weights, so that the search stays in cache.
SLICE_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Scales (float16 values) and zero-points of every group, each (out_features, n_groups)."""

    scheme: QuantScheme
    scales: Tensor  # float32, values that the scheme's scale_bits can hold
    # float32 codes: multiples of scheme.zero_step, up to scheme.max_zero of them. A codebook has
    # none; then they say nothing.
    zeros: Tensor

    def round(self, weight: Tensor) -> Tensor:
        """Nearest codes (out_features, in_features) float32."""
        group = self._group_of_inputs(weight)
        return self.scheme.nearest_codes(weight / self.scales[:, group], self.zeros[:, group])

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weight (out_features, in_features) float32 that codes of this grid stand for."""
        group = self._group_of_inputs(codes)
        return self.scheme.steps_of(codes, self.zeros[:, group]) * self.scales[:, group]

    def _group_of_inputs(self, like: Tensor) -> Tensor:
        return group_of_inputs(like.shape[1], self.scheme.group_size, like.device)

    def weight_of(self, codes: Tensor, notes: tuple[str, ...] = ()) -> QuantizedWeight:
        """What is stored of codes (out_features, in_features) of this grid, whole numbers."""
        zeros = (self.zeros / self.scheme.zero_step).byte()
        return QuantizedWeight(self.scheme, codes.byte(), self.scales.half(), zeros, notes)


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

    Fine zeros are searched as in NeUQI (arXiv:2505.17595), which minimizes the same error over
    scales and real zero-points together, coarsely and then finely; how the pairs are chosen is
    ours.

    Raises ValueError when a scale leaves float16's range, and for a scheme with outliers: a grid
    is fitted to what they leave.
    """
    if scheme.outliers:
        raise ValueError(
            f"scheme {scheme.label} has outliers, which only the quantizer quantease looks for"
        )
    out_features, in_features = weight.shape
    grouped = by_groups(weight.float(), scheme.group_size)
    n_groups, size = grouped.shape[1:]
    grouped = grouped.reshape(out_features * n_groups, size)
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    per_group = by_groups(importance.float(), scheme.group_size)
    found = None
    if search and not scheme.codebook:
        shrinks, halvings = (END_SHRINKS, HALVINGS) if scheme.fine_zeros else (SHRINKS, None)
        how = scheme.bits, scheme.symmetric, scale_mantissa(scheme)
        found = fit_groups(grouped, per_group, shrinks, *how, halvings)
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
    if scheme.fine_zeros:
        return _search_ends(rows, importance, low, high, scheme)
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


def _search_ends(
    rows: Tensor, importance: Tensor, low: Tensor, high: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """Scale and zero, each (n,), of the best range whose ends are shares of low and high (n,)."""
    best: tuple[Tensor, ...] = ()  # error, scale, zero, share of low, share of high

    def try_shares(share_low: Tensor, share_high: Tensor) -> None:
        nonlocal best
        scale, zero = _grid_of(low * share_low, high * share_high, scheme)
        error = _error(rows, importance, scale, zero, scheme)
        best = _lesser(best, (error, scale, zero, share_low, share_high))

    for one, other in product(END_SHRINKS, repeat=2):
        try_shares(torch.full_like(low, one), torch.full_like(high, other))
    distance = END_SHRINKS[0] - END_SHRINKS[1]
    for _ in range(HALVINGS):
        distance /= 2
        around_low, around_high = best[3:]
        for one, other in product((-1, 0, 1), repeat=2):
            if one or other:
                try_shares(around_low + one * distance, around_high + other * distance)
    found = best[:3]
    for _ in range(LINE_FITS):
        _, scale, zero = found
        codes = scheme.nearest_codes(rows / scale[:, None], zero[:, None])
        line = fit_line(rows, codes, importance, scale[:, None], scheme)
        scale, zero = (part[:, 0] for part in line)
        error = _error(rows, importance, scale, zero, scheme)
        found = _lesser(found, (error, scale, zero))
    return found[1], found[2]


def _lesser(best: tuple[Tensor, ...], tried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row by row the one with less error, which comes first; the best so far may be empty."""
    if not best:
        return tried
    less = tried[0] < best[0]
    return tuple(torch.where(less, new, old) for new, old in zip(tried, best, strict=True))


def fit_line(
    values: Tensor, codes: Tensor, importance: Tensor, scale: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """Scale and fine zero, each (..., 1), of the least-squares line through codes and values.

    Args:
        values, codes, importance: (..., size); what has no importance is not looked at.
        scale: (..., 1), kept where the line does not rise.
    """
    total = importance.sum(-1, keepdim=True).clamp(min=1e-30)
    mean_code = (importance * codes).sum(-1, keepdim=True) / total
    mean_value = (importance * values).sum(-1, keepdim=True) / total
    apart = codes - mean_code
    slope = (importance * apart * (values - mean_value)).sum(-1, keepdim=True)
    slope /= (importance * apart.square()).sum(-1, keepdim=True).clamp(min=1e-30)
    fitted = storable_scale(torch.where(slope > 0, slope, scale), scheme)
    return fitted, storable_zero(mean_code - mean_value / fitted, scheme)


def _grid_of(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    if scheme.symmetric:
        # 2^(b-1) negative steps and one fewer positive: the larger half carries the range.
        steps = 1.0 if scheme.codebook else 2 ** (scheme.bits - 1) - 0.5
        scale = storable_scale(high / steps, scheme)
        return scale, torch.full_like(scale, float(2 ** (scheme.bits - 1)))
    scale = storable_scale((high - low) / scheme.max_code, scheme)
    return scale, storable_zero(-low / scale, scheme)


def storable_zero(zero: Tensor, scheme: QuantScheme) -> Tensor:
    """The nearest zero-point that the scheme stores."""
    stored = (zero / scheme.zero_step).round_().clamp_(0, scheme.max_zero)
    return stored.mul_(scheme.zero_step)


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
    zeros = zero[:, None]
    return scheme.steps_of(scheme.nearest_codes(rows / scale[:, None], zeros), zeros)


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
