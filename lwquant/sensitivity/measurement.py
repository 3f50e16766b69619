"""What a metric returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Measurement:
    """Costs, and for metrics that rank blocks the scores they rank by."""

    costs: Tensor  # (n_linears, n_schemes) float64, ≥ 0
    scores: tuple[float, ...] | None = None  # (n_blocks,), larger is more important
