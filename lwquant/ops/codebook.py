"""Layers whose codes name the values of a table; see lwquant/codebooks.py.

Plain torch on every device, but for the unpacking: a lookup among sixteen values is right as it is,
and kernels that multiply packed codes by way of the table are still to be written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant.codebooks import CODE_BITS, values_of
from lwquant.groups import group_of_inputs
from lwquant.ops.scale_bytes import decode_scales
from lwquant.ops.schema import unpack


def dequantize_codebook(
    qweight: Tensor, scales: Tensor, codebook: str, group_size: int, in_features: int
) -> Tensor:
    """The weight (out_features, in_features) float32 = value of the code · scale.

    Args:
        qweight: (out_features, row_words(in_features, 4)) int32.
        scales: (out_features, n_groups) float16, or (out_features, 1 + n_groups) uint8 as
            lwquant/ops/scale_bytes.py writes them.
    """
    codes = unpack(qweight, CODE_BITS, in_features)
    group = group_of_inputs(in_features, group_size, qweight.device)
    if scales.dtype == torch.uint8:
        scales = decode_scales(scales)
    return values_of(codes, codebook) * scales.float()[:, group]


def linear_codebook(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    codebook: str,
    group_size: int,
) -> Tensor:
    """x Wᵀ + bias in float32, as the dtype of x: (..., in_features) → (..., out_features)."""
    weight = dequantize_codebook(qweight, scales, codebook, group_size, x.shape[-1])
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
