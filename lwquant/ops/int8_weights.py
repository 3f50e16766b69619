"""What tiles that allow it become in a call with many tokens on AMX: int8 weights and activations.

Products of a whole span of inputs then add up in integers before they are scaled, which is up to
twice as fast as with codes or bf16. The compiled kernel (csrc/linear_amx_int8.cpp) rounds inside
each call; this is the same in torch, to measure what it costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.ops.activations import LARGEST, rounded_spans
from lwquant.types import QuantizedWeight

SPAN = 256  # inputs of a row, or of a token, that share a scale
WIDEST = 4  # bits of codes: weights of more would lose much of what they say


def int8_weight(quantized: QuantizedWeight) -> Tensor:
    """The weight with int8 steps, (out_features, in_features) float32; outliers stay as they are.

    A step is 1/127 of what the lowest or the highest code stands for in any group of the span.
    """
    in_features = quantized.codes.shape[1]
    top = 2**quantized.scheme.bits - 1
    zeros, scales = quantized.zero_points, quantized.scales.float()
    reach = torch.maximum(zeros, top - zeros).abs() * scales.abs()
    by_input = reach[:, quantized.group_of_inputs()]
    spans = torch.nn.functional.pad(by_input, (0, -in_features % SPAN)).unflatten(-1, (-1, SPAN))
    step = spans.amax(-1).repeat_interleave(SPAN, dim=1)[:, :in_features] / LARGEST[8]
    weight = quantized.steps() * scales[:, quantized.group_of_inputs()]
    rounded = torch.where(step > 0, (weight / step).round() * step, 0.0)
    return quantized.plus_outliers(rounded)


def int8_inputs(x: Tensor) -> Tensor:
    """x (..., in_features) float32 with 127 steps to the largest of each span."""
    return rounded_spans(x, SPAN, LARGEST[8])
