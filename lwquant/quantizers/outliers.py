"""The sparse part of a weight: few entries in 16-bit floats that take what no grid follows.

Behdin et al., "QuantEase", arXiv:2309.01885: the output error is minimized over a grid part and a
part of few entries in turn, beginning with the largest weights; the latter by a projected gradient
step (iterative hard thresholding, Blumensath, Davies, arXiv:0805.0510). Our steps measure entries
in units of 1/√H_jj of their column, as the error does: the largest ones are then those that matter,
and a few loud columns do not hold the others back.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER_STEPS = 30  # of the power iteration, enough for two digits
MARGIN = 1.05  # by which an eigenvalue may be above what those steps find
STEPS = 4  # of descent on the sparse part between two sweeps over the grid part


def top_entries(dense: Tensor, n: int, diagonal: Tensor | None = None) -> Tensor:
    """Of dense (out_features, in_features) the `n` largest as float16 values, the others zero.

    Args:
        diagonal: (in_features,) positive: the size of an entry counts times its root.
    """
    size = (dense if diagonal is None else dense * diagonal.sqrt()).abs().flatten()
    places = size.topk(n).indices
    kept = torch.zeros_like(size)
    kept[places] = dense.flatten()[places].half().float()
    return kept.view(dense.shape)


def largest_eigenvalue(hessian: Tensor) -> Tensor:
    """Of D^-½ H D^-½, D the diagonal of `hessian`; by power iteration, and a little above it."""
    root = hessian.diagonal().sqrt()
    vector = torch.ones_like(root)
    for _ in range(POWER_STEPS):
        vector = vector / vector.norm()
        vector = (hessian @ (vector / root)) / root
    return MARGIN * vector.norm()


def refit_outliers(
    missed: Tensor, outliers: Tensor, hessian: Tensor, eigenvalue: Tensor, n: int
) -> Tensor:
    """Sparse entries that leave no more of tr((O − M) H (O − M)ᵀ) than the given ones.

    Args:
        missed: M, what the grid part lacks, (out_features, in_features).
        outliers: O, like missed, at most `n` entries not zero, all of them float16 values.
        hessian: (in_features, in_features), positive definite.
        eigenvalue: as largest_eigenvalue() finds it.
    """
    diagonal = hessian.diagonal()
    least, slope = _error(missed, outliers, hessian)
    for _ in range(STEPS):
        tried = top_entries(outliers - slope / (eigenvalue * diagonal), n, diagonal)
        error, after = _error(missed, tried, hessian)
        if not error < least:
            break
        outliers, least, slope = tried, error, after
    return outliers


def _error(missed: Tensor, outliers: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """tr(E H Eᵀ) of E = O − M in float64, and E H, half its gradient in O."""
    error = outliers - missed
    slope = error @ hessian
    return (slope * error).sum(dtype=torch.float64), slope
