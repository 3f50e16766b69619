"""What the kernels make of a layer's inputs: integers, with one scale per span of a group.

The compiled kernels round inside each call (csrc/activations.cpp); this is the same in torch, to
measure what it costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_BITS = (8, 16)
LARGEST = {8: 127, 16: 32639}  # of the integers; the low byte of 16 bits is signed, too
BLOCK = 32  # inputs that are unpacked together
MOST_BLOCKS = 4  # of a span
SMALLEST_RANGE = 2.0**-100  # spans of smaller inputs are resolved as if this were their largest


def span_size(in_features: int, group_size: int) -> int:
    """Inputs that share a scale: up to 128, as many as groups are whole numbers of.

    >>> [span_size(576, group) for group in (32, 64, 96, 128, 256, 576)]
    [32, 64, 32, 128, 128, 128]
    """
    if group_size >= in_features:
        return MOST_BLOCKS * BLOCK
    blocks = MOST_BLOCKS
    while group_size % (blocks * BLOCK):
        blocks //= 2
    return blocks * BLOCK


def rounded_activations(x: Tensor, bits: int, group_size: int) -> Tensor:
    """x (..., in_features) float32 as a kernel with `bits` (8 or 16) for activations computes it.

    Groups must be whole numbers of 32 inputs, or the whole row.
    """
    return rounded_spans(x, span_size(x.shape[-1], group_size), LARGEST[bits])


def rounded_spans(x: Tensor, size: int, most: int) -> Tensor:
    """x (..., in_features) with `most` steps to the largest of every `size` inputs."""
    in_features = x.shape[-1]
    spans = torch.nn.functional.pad(x, (0, -in_features % size)).unflatten(-1, (-1, size))
    largest = spans.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_RANGE)
    codes = (spans * (most / largest)).round()
    return (codes * (largest / most)).flatten(-2)[..., :in_features]
