"""Statistics of linears whose rows are cut into groups, each with token weights of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

from lwquant.capture.stats import StatsAccumulator
from lwquant.types import LayerStats

Key = TypeVar("Key", bound=Hashable)


def row_groups(out_features: int, n_groups: int) -> list[slice]:
    """The rows of each of n_groups neighbouring groups, whose sizes differ by one at most.

    >>> row_groups(7, 3)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    ends = [group * out_features // n_groups for group in range(n_groups + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


class RowGroupSums:
    """One StatsAccumulator for each group of rows; holds as many sums as there are groups."""

    def __init__(self, weights: Tensor | None) -> None:
        """How much each token counts for each group, (n_samples, seq_len, n_groups); None: one
        group, for which all count the same."""
        self._weights = weights
        self._groups = [
            StatsAccumulator() for _ in range(1 if weights is None else weights.shape[2])
        ]

    def add(
        self,
        samples: slice,
        inputs: Tensor,
        drift: Tensor | None,
        owed: Tensor | None,
        first: Tensor | None,
    ) -> None:
        """Tensors of these samples, as StatsAccumulator.add() takes them."""
        for number, group in enumerate(self._groups):
            weights = None if self._weights is None else self._weights[samples, :, number]
            own = owed
            if owed is not None and len(self._groups) > 1:
                own = owed[..., row_groups(owed.shape[-1], len(self._groups))[number]]
            group.add(inputs, drift, own, weights, first)

    def results(self) -> list[LayerStats]:
        """Of each group; owed is of its rows alone."""
        return [group.result() for group in self._groups]


def results(sums: Mapping[Key, RowGroupSums]) -> dict[Key, list[LayerStats]]:
    """Results by key; keys with the same sums get the very same result."""
    finished = {each: each.results() for each in set(sums.values())}
    return {key: finished[each] for key, each in sums.items()}
