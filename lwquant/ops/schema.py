"""The operators torch knows: signatures, checks, shapes for tracing, and who computes them where.

`Library.define/impl` rather than the custom_op decorator: a call costs microseconds, not tens.
Every device runs the plain-torch meaning, CPU the compiled kernels when they are there.
"""

import torch
from torch import Tensor

from lwquant.errors import LwquantError
from lwquant.ops import native
from lwquant.ops.layout import pack_reference, unpack_reference
from lwquant.ops.native import OutlierTensors
from lwquant.ops.outliers import column_dtype
from lwquant.ops.reference import dequantize_reference, linear_reference
from lwquant.scheme import WIDTHS, row_words

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("lwquant", "DEF")
LIBRARY.define("pack(Tensor codes, int bits) -> Tensor")
LIBRARY.define("unpack(Tensor packed, int bits, int n_codes) -> Tensor")
_OUTLIERS = "Tensor? outlier_values=None, Tensor? outlier_columns=None, Tensor? outlier_rows=None"
LIBRARY.define(
    "dequantize(Tensor qweight, Tensor scales, Tensor? zeros, int bits, int group_size,"
    f" int in_features, {_OUTLIERS}) -> Tensor"
)
LIBRARY.define(
    "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits,"
    f" int group_size, {_OUTLIERS}) -> Tensor"
)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise LwquantError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise LwquantError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise LwquantError(f"bits={bits} is not one of {WIDTHS}")


def _check_rows(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dim() != 2 or tensor.dtype != dtype:
        raise LwquantError(
            f"{name} must be (rows, columns) {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
        )


def _check_pack(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    _check_rows("codes", codes, torch.uint8)


def _check_unpack(packed: Tensor, bits: int, n_codes: int) -> None:
    _check_bits(bits)
    _check_rows("packed", packed, torch.int32)
    if n_codes < 0 or packed.shape[1] != row_words(n_codes, bits):
        raise LwquantError(
            f"{n_codes} codes of {bits} bits need {row_words(n_codes, bits)} words a row,"
            f" packed has {packed.shape[1]}"
        )


def _check_layer(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    _check_bits(bits)
    if group_size < 1:
        raise LwquantError(f"group_size={group_size} must be at least 1")
    _check_rows("qweight", qweight, torch.int32)
    out_features = qweight.shape[0]
    if in_features < 1 or out_features < 1:
        raise LwquantError(f"a layer of {in_features} inputs and {out_features} outputs is empty")
    n_groups = -(-in_features // group_size)
    _check_tensor("qweight", qweight, torch.int32, (out_features, row_words(in_features, bits)))
    if scales.dtype == torch.uint8:
        _check_tensor("scales", scales, torch.uint8, (out_features, 1 + n_groups))
    else:
        _check_tensor("scales", scales, torch.float16, (out_features, n_groups))
    if zeros is not None and zeros.dtype == torch.uint8:
        _check_tensor("zeros", zeros, torch.uint8, (n_groups, out_features))
    elif zeros is not None:
        _check_tensor("zeros", zeros, torch.int32, (n_groups, row_words(out_features, bits)))


def check_outliers(
    outliers: OutlierTensors, out_features: int, in_features: int, device: torch.device
) -> None:
    """LwquantError where the tensors of outliers do not fit the layer."""
    values, columns, rows = outliers
    if values is None and columns is None and rows is None:
        return
    if values is None or columns is None or rows is None:
        raise LwquantError("outliers have values, columns and rows: all three or none")
    _check_tensor("outlier_values", values, torch.float16, (values.numel(),))
    _check_tensor("outlier_columns", columns, column_dtype(in_features), (values.numel(),))
    _check_tensor("outlier_rows", rows, torch.int32, (out_features + 1,))
    for tensor in (values, columns, rows):
        if tensor.device != device:
            raise LwquantError(f"outliers are on {tensor.device}, the layer on {device}")


def check_input(x: Tensor, bias: Tensor | None, out_features: int) -> None:
    """LwquantError where x or bias cannot be what a linear is called with."""
    if x.dim() < 1 or x.dtype not in _FLOATS:
        raise LwquantError(
            f"x must be (..., in_features) of {_FLOATS}, got {tuple(x.shape)} {x.dtype}"
        )
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != (out_features,)):
        raise LwquantError(
            f"bias must be ({out_features},) of {_FLOATS}, got {tuple(bias.shape)} {bias.dtype}"
        )


def _check_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    check_input(x, bias, qweight.shape[0])
    _check_layer(qweight, scales, zeros, bits, group_size, x.shape[-1])
    for tensor in (qweight, scales, zeros, bias):
        if tensor is not None and tensor.device != x.device:
            raise LwquantError(f"x is on {x.device}, the layer on {tensor.device}")


def _pack(codes: Tensor, bits: int) -> Tensor:
    _check_pack(codes, bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise LwquantError(f"code {int(codes.max())} does not fit in {bits} bits")
    if native.compiled() and codes.is_cpu:
        return native.pack_native(codes, bits)
    return pack_reference(codes, bits)


def _unpack(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    _check_unpack(packed, bits, n_codes)
    if native.compiled() and packed.is_cpu:
        return native.unpack_native(packed, bits, n_codes)
    return unpack_reference(packed, bits, n_codes)


def _dequantize(
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
    outliers = (outlier_values, outlier_columns, outlier_rows)
    _check_layer(qweight, scales, zeros, bits, group_size, in_features)
    check_outliers(outliers, qweight.shape[0], in_features, qweight.device)
    if native.compiled() and qweight.is_cpu:
        return native.dequantize_native(
            qweight, scales, zeros, bits, group_size, in_features, outliers
        )
    return dequantize_reference(qweight, scales, zeros, bits, group_size, in_features, *outliers)


def _linear(
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
    outliers = (outlier_values, outlier_columns, outlier_rows)
    _check_linear(x, qweight, scales, zeros, bias, bits, group_size)
    check_outliers(outliers, qweight.shape[0], x.shape[-1], qweight.device)
    if x.is_cpu:
        if native.compiled():
            return native.linear_panels(x, qweight, scales, zeros, bias, bits, group_size, outliers)
        native.warn_uncompiled()
    return linear_reference(x, qweight, scales, zeros, bias, bits, group_size, *outliers)


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    _check_pack(codes, bits)
    return codes.new_empty(codes.shape[0], row_words(codes.shape[1], bits), dtype=torch.int32)


def _unpack_fake(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    _check_unpack(packed, bits, n_codes)
    return packed.new_empty(packed.shape[0], n_codes, dtype=torch.uint8)


def _dequantize_fake(
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
    outliers = (outlier_values, outlier_columns, outlier_rows)
    _check_layer(qweight, scales, zeros, bits, group_size, in_features)
    check_outliers(outliers, qweight.shape[0], in_features, qweight.device)
    return qweight.new_empty(qweight.shape[0], in_features, dtype=torch.float32)


def _linear_fake(
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
    outliers = (outlier_values, outlier_columns, outlier_rows)
    _check_linear(x, qweight, scales, zeros, bias, bits, group_size)
    check_outliers(outliers, qweight.shape[0], x.shape[-1], qweight.device)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


for _name, _meaning, _fake in (
    ("pack", _pack, _pack_fake),
    ("unpack", _unpack, _unpack_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("linear", _linear, _linear_fake),
):
    LIBRARY.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lwquant::{_name}", _fake, lib=LIBRARY)

pack = torch.ops.lwquant.pack.default
unpack = torch.ops.lwquant.unpack.default
dequantize = torch.ops.lwquant.dequantize.default
linear = torch.ops.lwquant.linear.default
