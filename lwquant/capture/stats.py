"""Sums over the inputs of one group of linears, on the quantized and on the float stream."""

from __future__ import annotations

from torch import Tensor

from lwquant.types import LayerStats


class StatsAccumulator:
    """Adds Σ w x̂ x̂ᵀ and, where the others are given too, Σ w (x − x̂) x̂ᵀ and Σ w (r − r̂) x̂ᵀ.

    The weights w of the tokens are 1 by default. With the others, the first half of the tokens of
    every call is also summed by itself.
    """

    def __init__(self) -> None:
        self._first, self._second = _Sums(), _Sums()

    def add(
        self,
        inputs: Tensor,
        float_inputs: Tensor | None = None,
        residual_drift: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """x̂, x: (..., in_features); r − r̂: (..., out_features); w: (...); tokens in one order."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        weighted = flat if weights is None else flat * weights.reshape(-1, 1)
        if float_inputs is None:
            self._second.add(weighted, flat, None, None)
            return
        drift = float_inputs.reshape(flat.shape).float() - flat
        owed = None
        if residual_drift is not None:
            owed = residual_drift.reshape(flat.shape[0], -1).float()
        middle = (flat.shape[0] + 1) // 2
        for sums, half in ((self._first, slice(middle)), (self._second, slice(middle, None))):
            sums.add(weighted[half], flat[half], drift[half], None if owed is None else owed[half])

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
            _plus(first.residual, second.residual),
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
        for name, left in (("hessian", inputs), ("drift", drift), ("residual", owed)):
            if left is None:
                continue
            if name not in self._sums:
                self._sums[name] = inputs.new_zeros(left.shape[1], inputs.shape[1])
            self._sums[name].addmm_(left.T, weighted)

    def result(self) -> LayerStats | None:
        if not self._n_tokens:
            return None
        sums = self._sums
        return LayerStats(sums["hessian"], sums.get("drift"), self._n_tokens, sums.get("residual"))


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left + right
