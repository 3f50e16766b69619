"""What tiles that allow it become in a call with many tokens on AMX: int8 weights and activations.

Products of a whole span of inputs then add up in integers before they are scaled, which is up to
twice as fast as with codes or bf16. The compiled kernel (csrc/linear_amx_int8.cpp) rounds inside
each call; this is the same in torch, to measure what it costs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lwquant.ops.activations import LARGEST, rounded_spans
from lwquant.types import QuantizedWeight

SPAN = 256  # inputs of a row, or of a token, that share a scale
_SMALLEST = 2.0**-126  # of steps: where all scales are 0 there are none


def int8_weight(quantized: QuantizedWeight) -> Tensor:
    """The weight with int8 steps, (out_features, in_features) float32, without its outliers.

    A step is 1/127 of what the lowest or the highest code stands for in any group of the span.
    Outliers are added apart from it, in float32.
    """
    top = 2**quantized.scheme.bits - 1
    zeros, group = quantized.zero_points, quantized.group_of_inputs()
    reach = torch.maximum(zeros, top - zeros).abs() * quantized.scales.float().abs()
    weight = without_outliers(quantized).dequantize()
    for first in range(0, weight.shape[1], SPAN):
        span = weight[:, first : first + SPAN]
        of_span = group[first : first + SPAN]
        groups = reach[:, int(of_span[0]) : int(of_span[-1]) + 1]
        step = (groups.amax(1, keepdim=True) / LARGEST[8]).clamp_min(_SMALLEST)
        span.div_(step).round_().mul_(step)
    return weight


def without_outliers(quantized: QuantizedWeight) -> QuantizedWeight:
    return replace(quantized, outliers=None)


def int8_inputs(x: Tensor) -> Tensor:
    """x (..., in_features) float32 with 127 steps to the largest of each span."""
    return rounded_spans(x, SPAN, LARGEST[8])
