"""Round to nearest: the baseline that looks at no data."""

from __future__ import annotations

from torch import Tensor

from lwquant.quantizers.grid import fit_grid
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight


def rtn(
    weight: Tensor, stats: LayerStats | None, scheme: QuantScheme, *, search: bool = False
) -> QuantizedWeight:
    """Quantize one linear by rounding each weight (out_features, in_features) on its own.

    Args:
        stats: not looked at.
        search: fit each group's range by squared error instead of min and max.
    """
    grid = fit_grid(weight, scheme, search=search)
    return grid.weight_of(grid.round(weight.float()))
