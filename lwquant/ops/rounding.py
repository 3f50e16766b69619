"""The two inner loops of rounding, in plain torch and compiled.

The compiled loops serve float32 tensors and grids of even steps, on the CPU, and the first of them
on NVIDIA GPUs; the others run here. All compute the same sums; the compiled ones may order or round
them differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lwquant.codebooks import nearest_codes, values_of
from lwquant.ops.cuda import rounding as cuda
from lwquant.ops.native import fit_groups_native, round_block_native, rounding_compiled

# Targets, feedback, scales, zeros, the largest code and the base to errors, as round_block_torch().
BlockLoop = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
BLOCK_COLUMNS = 128  # columns whose effect on later blocks is applied as one matrix product


def round_columns(
    targets: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    base: Tensor | None = None,
    codebook: str = "",
) -> None:
    """Replace each column of the targets by grid points in turn; its miss moves the later ones.

    Column c leaves error (got − base) · feedback[c, k] on every column k > c.

    Args:
        targets: (in_features, out_features), columns of the weight as rows; changed in place.
        feedback: (in_features, in_features), of which the upper triangle is read.
        scales, zeros: like targets.
        base: like targets; by default what the target is when its turn comes.
        codebook: of the grid; zeros and max_code then say nothing.
    """
    n = len(targets)
    feedback = feedback.contiguous()  # a Cholesky factor is not: its columns are
    one_block = _block_loop(codebook, targets, feedback, scales, zeros, base)
    for start in range(0, n, BLOCK_COLUMNS):
        own = slice(start, min(start + BLOCK_COLUMNS, n))
        start_at = None if base is None else base[own]
        errors = one_block(
            targets[own], feedback[own, own], scales[own], zeros[own], max_code, start_at
        )
        if own.stop < n:
            targets[own.stop :].addmm_(feedback[own, own.stop :].T, errors)


def _block_loop(codebook: str, *tensors: Tensor | None) -> BlockLoop:
    """The fastest loop for these tensors, which targets come first of."""
    if not codebook and rounding_compiled(*tensors):
        return round_block_native
    if not codebook and cuda.can_round(*tensors):
        return cuda.round_block
    return partial(round_block_torch, codebook=codebook)


def round_block_torch(
    targets: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    base: Tensor | None,
    codebook: str = "",
) -> Tensor:
    """One block of round_columns(); returns the errors, like targets."""
    errors = torch.empty_like(targets)
    for col, target in enumerate(targets):
        got = on_grid(target, scales[col], zeros[col], max_code, codebook)
        torch.sub(got, target if base is None else base[col], out=errors[col])
        targets[col + 1 :].addr_(feedback[col, col + 1 :], errors[col])
        targets[col] = got
    return errors


def on_grid(
    target: Tensor, scales: Tensor, zeros: Tensor, max_code: int, codebook: str = ""
) -> Tensor:
    """The grid points nearest to the target; all arguments have its shape."""
    steps = target / scales
    if codebook:
        return values_of(nearest_codes(steps, codebook), codebook).mul_(scales)
    return steps.add_(zeros).round_().clamp_(0, max_code).sub_(zeros).mul_(scales)


def fit_groups(
    rows: Tensor,
    importance: Tensor,
    shrinks: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_mantissa: int,
    halvings: int | None,
) -> tuple[Tensor, Tensor] | None:
    """Scale and zero (n,) of groups (n, size), compiled; None where only torch can do it.

    Args:
        importance: (n_groups, size); row r has those of group r mod n_groups.
        shrinks: shares of the full range to try.
        scale_mantissa: bits of a scale below its leading one.
        halvings: how often to search more finely for a fine zero; None: the zero is whole.
    """
    if not rounding_compiled(rows, importance):
        return None
    return fit_groups_native(rows, importance, shrinks, bits, symmetric, scale_mantissa, halvings)
