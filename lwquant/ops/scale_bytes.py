"""Scales in one byte each: four bits of exponent and four of mantissa in a window of their row.

The float16 pattern of a positive scale is a rough logarithm of it. A row stores the exponent field
at which its window starts, and for every group how far above that start the pattern lies, in steps
of 2⁶:

    row 2, code 0x35:   0 00010 0000000000          the window's start, 2 << 10
                      +     0 0 1101 01 000000      0x35 << 6
                      = 0 00101 0101000000          the scale's float16 pattern

16 octaves above the start can be written, each in 16 steps: a scale is met to 1/32 of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_BITS = 6  # of float16's ten mantissa bits that a byte leaves out
MANTISSA_BITS = 10 - STEP_BITS
OCTAVES = 256 >> MANTISSA_BITS
_EXPONENT_SHIFT = 10


def window_floor(scales: Tensor) -> Tensor:
    """The smallest scale that a row can write beside its largest, (rows, 1) float32.

    Args:
        scales: (rows, n_groups), positive.
    """
    _, exponent = torch.frexp(scales.float().amax(1, keepdim=True))  # in [0.5, 1) · 2^exponent
    lowest = torch.finfo(torch.float16).smallest_normal
    return torch.ldexp(torch.ones_like(scales[:, :1].float()), exponent - OCTAVES).clamp(min=lowest)


def encode_scales(scales: Tensor) -> Tensor:
    """Bytes (rows, 1 + n_groups) uint8 of scales (rows, n_groups) float16.

    Raises ValueError for a scale that no byte stands for exactly.

    >>> encode_scales(torch.tensor([[1.0, 0.5, 1.9375]], dtype=torch.float16))
    tensor([[  1, 224, 208, 239]], dtype=torch.uint8)
    """
    pattern = scales.contiguous().view(torch.int16).int()
    start = ((pattern >> _EXPONENT_SHIFT).amax(1, keepdim=True) - (OCTAVES - 1)).clamp(min=1)
    above = pattern - (start << _EXPONENT_SHIFT)
    codes = above >> STEP_BITS
    wrong = (above < 0) | (codes > 255) | (codes << STEP_BITS != above) | ~scales.isfinite()
    if wrong.any():
        raise ValueError(f"scale {scales[wrong][0].item():g} is none that eight bits can hold")
    return torch.cat([start, codes], dim=1).to(torch.uint8)


def decode_scales(stored: Tensor) -> Tensor:
    """The inverse: bytes (rows, 1 + n_groups) uint8 as scales (rows, n_groups) float16.

    >>> decode_scales(torch.tensor([[1, 224, 208, 239]], dtype=torch.uint8))
    tensor([[1.0000, 0.5000, 1.9375]], dtype=torch.float16)
    """
    start, codes = stored[:, :1].int(), stored[:, 1:].int()
    pattern = (start << _EXPONENT_SHIFT) + (codes << STEP_BITS)
    return pattern.to(torch.int16).view(torch.float16)
