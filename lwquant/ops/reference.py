"""The plain-torch meaning of a stored layer; used on every device that has no kernel of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant.groups import group_of_inputs
from lwquant.ops.layout import unpack_reference
from lwquant.ops.outliers import decode_columns
from lwquant.ops.scale_bytes import decode_scales
from lwquant.scheme import BYTE_BITS
from lwquant.types import Outliers


def dequantize_reference(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
) -> Tensor:
    """The weight (out_features, in_features) float32 = (code − zero) · scale + outlier.

    Args:
        qweight: (out_features, row_words(in_features, bits)) int32.
        scales: (out_features, n_groups) float16, or (out_features, 1 + n_groups) uint8 as
            lwquant/ops/scale_bytes.py writes them.
        zeros: (n_groups, row_words(out_features, bits)) int32, or (n_groups, out_features) uint8
            in steps of 2**(bits−8); None: every zero is 2**(bits−1).
        outlier_values: (n,) float16, with outlier_columns (n,) as lwquant/ops/outliers.py writes
            them and outlier_rows (out_features + 1,) int32; all three or none.
    """
    codes = unpack_reference(qweight, bits, in_features)
    group = group_of_inputs(in_features, group_size, qweight.device)
    if zeros is None:
        steps = codes.float() - 2.0 ** (bits - 1)
    elif zeros.dtype == torch.uint8:
        steps = codes.float() - (zeros.T.float() * 2.0 ** (bits - BYTE_BITS))[:, group]
    else:
        steps = codes.float() - unpack_reference(zeros, bits, qweight.shape[0]).T.float()[:, group]
    if scales.dtype == torch.uint8:
        scales = decode_scales(scales)
    weight = steps * scales.float()[:, group]
    if outlier_values is None or outlier_columns is None or outlier_rows is None:
        return weight
    columns = decode_columns(outlier_columns)
    return Outliers(outlier_values, columns, outlier_rows).added_to(weight)


def linear_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias in float32, as the dtype of x: (..., in_features) → (..., out_features)."""
    outliers = (outlier_values, outlier_columns, outlier_rows)
    weight = dequantize_reference(qweight, scales, zeros, bits, group_size, x.shape[-1], *outliers)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
