"""The plain-torch meaning of a stored layer; used on every device that has no kernel of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant.ops.layout import unpack_reference
from lwquant.ops.scale_bytes import decode_scales
from lwquant.types import BYTE_BITS


def dequantize_reference(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """The weight (out_features, in_features) float32 = (code − zero) · scale.

    Args:
        qweight: (out_features, row_words(in_features, bits)) int32.
        scales: (out_features, n_groups) float16, or (out_features, 1 + n_groups) uint8 as
            lwquant/ops/scale_bytes.py writes them.
        zeros: (n_groups, row_words(out_features, bits)) int32, or (n_groups, out_features) uint8
            in steps of 2**(bits−8); None: every zero is 2**(bits−1).
    """
    codes = unpack_reference(qweight, bits, in_features)
    group = torch.arange(in_features, device=qweight.device) // group_size
    if zeros is None:
        steps = codes.float() - 2.0 ** (bits - 1)
    elif zeros.dtype == torch.uint8:
        steps = codes.float() - (zeros.T.float() * 2.0 ** (bits - BYTE_BITS))[:, group]
    else:
        steps = codes.float() - unpack_reference(zeros, bits, qweight.shape[0]).T.float()[:, group]
    if scales.dtype == torch.uint8:
        scales = decode_scales(scales)
    return steps * scales.float()[:, group]


def linear_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x Wᵀ + bias in float32, as the dtype of x: (..., in_features) → (..., out_features)."""
    weight = dequantize_reference(qweight, scales, zeros, bits, group_size, x.shape[-1])
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
