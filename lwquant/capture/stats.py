"""Sums over the inputs of one group of linears, on the quantized and on the float stream."""

from __future__ import annotations

from torch import Tensor

from lwquant.types import LayerStats

STRIPS = 4  # of a Hessian: what lies above the diagonal in blocks of so many is not computed
LEAST_STRIP = 64


class StatsAccumulator:
    """Adds Σ w x̂ x̂ᵀ and, where the others are given too, Σ w (x − x̂) x̂ᵀ and Σ w (y − ŷ) x̂ᵀ.

    The weights w of the tokens are 1 by default. With the others, half of the tokens is also summed
    by itself: the first half of every call, or what the caller names.
    """

    def __init__(self) -> None:
        self._first, self._second = _Sums(), _Sums()

    def add(
        self,
        inputs: Tensor,
        drift: Tensor | None = None,
        owed: Tensor | None = None,
        weights: Tensor | None = None,
        first: Tensor | None = None,
    ) -> None:
        """x̂, x − x̂ (..., in_features), y − ŷ (..., out_features), w (...), of the same tokens.

        `first` (...) says which of them are in the half.
        """
        flat = _flat(inputs)
        weighted = flat if weights is None else flat * weights.reshape(-1, 1)
        if drift is None and owed is None:
            self._second.add(weighted, flat, None, None)
            return
        others = [None if other is None else _flat(other) for other in (drift, owed)]
        middle = (flat.shape[0] + 1) // 2
        halves: tuple[slice | Tensor, ...] = slice(middle), slice(middle, None)
        if first is not None:
            halves = first.flatten(), ~first.flatten()
        for sums, half in zip((self._first, self._second), halves, strict=True):
            others_half = (None if other is None else other[half] for other in others)
            sums.add(weighted[half], flat[half], *others_half)

    def result(self) -> LayerStats:
        first, second = self._first.result(), self._second.result()
        if first is None or second is None:
            only = first or second
            if only is None:
                raise ValueError("no input was recorded")
            return only
        return LayerStats(
            first.hessian + second.hessian,
            _plus(first.drift, second.drift),
            first.n_tokens + second.n_tokens,
            _plus(first.owed, second.owed),
            half=first,
        )


class _Sums:
    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n_tokens = 0

    def add(
        self, weighted: Tensor, inputs: Tensor, drift: Tensor | None, owed: Tensor | None
    ) -> None:
        self._n_tokens += inputs.shape[0]
        for rows, columns in _strips(inputs.shape[1]):
            self._sum("hessian", inputs, inputs)[rows, columns].addmm_(
                inputs[:, rows].T, weighted[:, columns]
            )
        for name, left in (("drift", drift), ("owed", owed)):
            if left is not None:
                self._sum(name, left, inputs).addmm_(left.T, weighted)

    def _sum(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name] = right.new_zeros(left.shape[1], right.shape[1])
        return self._sums[name]

    def result(self) -> LayerStats | None:
        if not self._n_tokens:
            return None
        sums = self._sums
        lower = sums["hessian"].tril()
        hessian = lower + lower.tril(-1).T
        return LayerStats(hessian, sums.get("drift"), self._n_tokens, sums.get("owed"))


def _strips(n: int) -> list[tuple[slice, slice]]:
    """Rows and columns that cover the lower triangle of an (n, n) matrix."""
    size = max(LEAST_STRIP, -(-n // STRIPS))
    return [
        (slice(start, start + size), slice(0, min(start + size, n))) for start in range(0, n, size)
    ]


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).float()


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left + right
