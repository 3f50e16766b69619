"""Sums over the inputs of one group of linears, on the quantized and on the float stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.types import LayerStats


class StatsAccumulator:
    """Adds Σ x̂ x̂ᵀ and, where the others are given too, Σ (x − x̂) x̂ᵀ and Σ (r − r̂) x̂ᵀ."""

    def __init__(self) -> None:
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None
        self._n_tokens = 0

    def add(
        self,
        inputs: Tensor,
        float_inputs: Tensor | None = None,
        residual_drift: Tensor | None = None,
    ) -> None:
        """x̂, x: (..., in_features); r − r̂: (..., out_features); the same tokens in one order."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._hessian is None:
            size = flat.shape[1]
            self._hessian = torch.zeros(size, size, device=flat.device)
        self._hessian.addmm_(flat.T, flat)
        self._n_tokens += flat.shape[0]
        if float_inputs is not None:
            difference = float_inputs.reshape(flat.shape).float() - flat
            if self._drift is None:
                self._drift = torch.zeros_like(self._hessian)
            self._drift.addmm_(difference.T, flat)
        if residual_drift is not None:
            owed = residual_drift.reshape(flat.shape[0], -1).float()
            if self._residual is None:
                self._residual = torch.zeros(owed.shape[1], flat.shape[1], device=flat.device)
            self._residual.addmm_(owed.T, flat)

    def result(self) -> LayerStats:
        if self._hessian is None:
            raise ValueError("no input was recorded")
        return LayerStats(self._hessian, self._drift, self._n_tokens, self._residual)
