"""Repairs for the error that earlier, already quantized blocks put into a linear's surroundings.

A correction is a function (weight, stats, *, settings) -> weight of the same shape
(out_features, in_features), applied before rounding. Zero drift, in the input and
in the residual stream, changes nothing.
tests/contract/test_corrections.py holds every entry below to this. GPTAQ's alternative lives in the
column loop itself: gptq(..., asymmetry=0.25).
"""

from collections.abc import Callable

from torch import Tensor

from lwquant.corrections.error_propagation import error_propagation
from lwquant.types import LayerStats

Correction = Callable[[Tensor, LayerStats], Tensor]

CORRECTIONS = {"qep": error_propagation}

__all__ = ["CORRECTIONS", "Correction", "error_propagation"]
