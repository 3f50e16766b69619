"""Layers as the kernels read them: tiles of 16 rows, see csrc/tiles.h. They are never saved.

`lwquant::linear_tiled` and `lwquant::dequantize_tiled` are the operators on them, with kernels for
CPUs and for NVIDIA GPUs (lwquant/ops/cuda). Which layer a buffer of tiles holds is written in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like, get_num_threads, is_grad_enabled
from torch.compiler import is_compiling

from lwquant.errors import LwquantError
from lwquant.ops import native
from lwquant.ops.activations import BLOCK
from lwquant.ops.cuda import tiled as cuda
from lwquant.ops.gradient import of_bias, of_input
from lwquant.ops.huge_pages import empty_bytes
from lwquant.ops.native import OutlierTensors
from lwquant.ops.schema import LIBRARY, check_input, check_outliers, pack
from lwquant.scheme import QuantScheme, row_words

_OUTLIERS = "Tensor? outlier_values=None, Tensor? outlier_columns=None, Tensor? outlier_rows=None"
LIBRARY.define(
    f"linear_tiled(Tensor x, Tensor tiles, Tensor? bias, int out_features, {_OUTLIERS}, "
    "int activation_bits=16) -> Tensor"
)
LIBRARY.define(
    f"dequantize_tiled(Tensor tiles, int out_features, int in_features, {_OUTLIERS}) -> Tensor"
)


def fits_kernels(scheme: QuantScheme, in_features: int) -> bool:
    """Whether there are integer kernels for such a layer, compiled here or not: csrc/tiles.h.

    There are none for codebooks, and for groups that are neither a multiple of 32 inputs nor a
    whole row.
    """
    whole_row = scheme.group_size >= in_features
    return not scheme.codebook and (whole_row or scheme.group_size % BLOCK == 0)


def tiles_bytes(scheme: QuantScheme, out_features: int, in_features: int) -> int:
    """What the tiles of such a layer take; 0 where there is no compiled kernel for it."""
    if not native.compiled() or not fits_kernels(scheme, in_features):
        return 0
    return native.tiles_size(
        out_features,
        in_features,
        scheme.scale_bits == 8,
        not scheme.symmetric,
        scheme.bits,
        scheme.group_size,
    )


def make_tiles(
    scheme: QuantScheme,
    in_features: int,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    int8_weights: bool = False,
) -> Tensor:
    """Tiles of a layer in the stored layout, (bytes,) uint8. Raises LwquantError without kernel.

    `int8_weights` lets kernels round weights to int8 where there are many tokens and activations
    are int8, see int8_weights.py.
    """
    out_features = qweight.shape[0]
    n_bytes = tiles_bytes(scheme, out_features, in_features)
    if not n_bytes:
        raise LwquantError(f"there is no kernel for scheme {scheme.label}")
    tiles = empty_bytes(n_bytes)
    native.make_tiles_native(
        qweight, scales, zeros, scheme.bits, scheme.group_size, in_features, int8_weights, tiles
    )
    return tiles


def unmake_tiles(
    tiles: Tensor, scheme: QuantScheme, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """qweight, scales and zeros in the stored layout again."""
    n_groups, n_scales = scheme.n_groups(in_features), scheme.row_scales(in_features)
    scale_dtype = torch.uint8 if scheme.scale_bits == 8 else torch.float16
    qweight = torch.empty(out_features, row_words(in_features, scheme.bits), dtype=torch.int32)
    scales = torch.empty(out_features, n_scales, dtype=scale_dtype)
    zeros = None if scheme.symmetric else torch.empty(n_groups, out_features, dtype=torch.uint8)
    native.unmake_tiles_native(tiles, out_features, in_features, qweight, scales, zeros)
    if zeros is not None and not scheme.fine_zeros:
        zeros = pack(zeros, scheme.bits)
    return qweight, scales, zeros


def _check_tiles(tiles: Tensor, out_features: int, in_features: int) -> None:
    if tiles.dim() != 1 or tiles.dtype != torch.uint8 or not tiles.is_contiguous():
        raise LwquantError(f"tiles are {tuple(tiles.shape)} {tiles.dtype}, expected (bytes,) uint8")
    if out_features < 1 or in_features < 1:
        raise LwquantError(f"a layer of {in_features} inputs and {out_features} outputs is empty")


def _linear(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
    activation_bits: int = 16,
) -> Tensor:
    outliers = (outlier_values, outlier_columns, outlier_rows)
    check_input(x, bias, out_features)
    _check_tiles(tiles, out_features, x.shape[-1])
    check_outliers(outliers, out_features, x.shape[-1], tiles.device)
    kernel = native.TiledLinear(tiles, out_features, x.shape[-1], outliers)
    return _run(kernel, x, bias, activation_bits)


def _run(
    kernel: native.TiledLinear, x: Tensor, bias: Tensor | None, activation_bits: int
) -> Tensor:
    """By the kernel where it can and is faster, else by panels."""
    wide_bias = None if bias is None else _wide(bias)
    y = None
    n_tokens = x.numel() // kernel.in_features
    if not native.panels_are_faster(n_tokens):
        read = x.contiguous() if kernel.takes(x.dtype, n_tokens, activation_bits) else _wide(x)
        y = kernel(read, wide_bias, activation_bits)
    if y is None:  # or NaN or infinity among the inputs, which integers cannot hold
        y = native.tiled_panels(kernel, _wide(x).reshape(-1, kernel.in_features), wide_bias)
        y = y.view(*x.shape[:-1], kernel.out_features)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Contiguous float32; conversions that change nothing take their microseconds, too."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _is_differentiated(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


def _is_float32(bias: Tensor, out_features: int) -> bool:
    return (
        bias.dtype is torch.float32
        and bias.shape == (out_features,)
        and bias.is_cpu
        and bias.is_contiguous()
    )


class _Seen(NamedTuple):
    """Inputs that a layer took: what all of its checks and its result depend on."""

    shape: torch.Size
    dtype: torch.dtype  # of the result, too
    in_bf16: bool
    n_tokens: int
    like: Tensor  # of the result's shape, without its memory


class TiledLinear:
    """A layer on tiles, called past torch's dispatcher where nobody but it would see the call.

    The dispatcher, the autograd wrapper of an operator written in Python and the checks of every
    tensor take longer than the product with a small layer. So what was found out about a shape is
    kept until another comes, bf16 is converted within the call, and results are
    made like a tensor that is there: with a shape in numbers that takes a microsecond more.
    """

    def __init__(
        self, tiles: Tensor, out_features: int, in_features: int, outliers: OutlierTensors
    ) -> None:
        self.tiles, self._outliers = tiles, outliers
        self._out_features, self._in_features = out_features, in_features
        self._kernel: native.TiledLinear | None = None
        self._on_gpu: cuda.TilesOnGpu | None = None
        if tiles.is_cpu:
            self._kernel = native.TiledLinear(tiles, out_features, in_features, outliers)
        elif tiles.is_cuda:
            # This waits for the GPU, so that calls need not.
            self._on_gpu = cuda.on_gpu_of(tiles, out_features, in_features)
        self._seen: _Seen | None = None  # read and replaced as a whole: threads may call at once

    def __call__(self, x: Tensor, bias: Tensor | None, activation_bits: int) -> Tensor:
        """As linear_tiled()."""
        kernel, seen = self._kernel, self._seen
        if (
            not is_compiling()
            and seen is not None
            and kernel is not None
            and type(x) is Tensor
            and x.shape == seen.shape
            and x.dtype is seen.dtype
            and x.is_cpu
            and x.is_contiguous()
            and (bias is None or _is_float32(bias, kernel.out_features))
            and not (is_grad_enabled() and _is_differentiated(x, bias))
        ):
            y = empty_like(seen.like)
            if kernel.run(
                x.data_ptr(),
                seen.n_tokens,
                0 if bias is None else bias.data_ptr(),
                activation_bits,
                get_num_threads(),
                y.data_ptr(),
                seen.in_bf16,
            ):
                return y
        arguments = x, self.tiles, bias, self._out_features, *self._outliers, activation_bits
        if (
            is_compiling()
            or _is_differentiated(x, bias)
            or type(x) is not Tensor
            or x.dim() < 1
            or x.shape[-1] != self._in_features
            or not (x.is_cpu if kernel is not None else x.is_cuda)
        ):
            dispatched: Tensor = torch.ops.lwquant.linear_tiled(*arguments)
            return dispatched
        if kernel is None:
            return _linear_cuda(*arguments)
        check_input(x, bias, kernel.out_features)
        n_tokens = x.numel() // kernel.in_features
        panels = native.panels_are_faster(n_tokens)
        if n_tokens and not panels and kernel.takes(x.dtype, n_tokens, activation_bits):
            like = torch.empty(1, dtype=x.dtype).expand(*x.shape[:-1], kernel.out_features)
            self._seen = _Seen(x.shape, x.dtype, x.dtype is torch.bfloat16, n_tokens, like)
        return _run(kernel, x, bias, activation_bits)


def compile_ahead(layers: Iterable[tuple[TiledLinear, int]]) -> None:
    """Compile what layers on GPUs need, each with its activation bits; else their first calls do.

    LwquantError where there is no compiler, or it cannot do it.
    """
    wanted = [(layer._on_gpu, bits) for layer, bits in layers if layer._on_gpu is not None]
    cuda.compile_ahead(wanted)


def _dequantize(
    tiles: Tensor,
    out_features: int,
    in_features: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
) -> Tensor:
    outliers = (outlier_values, outlier_columns, outlier_rows)
    _check_tiles(tiles, out_features, in_features)
    check_outliers(outliers, out_features, in_features, tiles.device)
    weight = torch.empty(out_features, in_features)
    native.TiledLinear(tiles, out_features, in_features, outliers).dequantize_rows(0, weight)
    return weight


def _linear_cuda(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
    activation_bits: int = 16,
) -> Tensor:
    check_input(x, bias, out_features)
    _check_tiles(tiles, out_features, x.shape[-1])
    _check_no_outliers(outlier_values)
    _check_device("x", x, tiles)
    if bias is not None:
        _check_device("bias", bias, tiles)
    return cuda.linear(x, tiles, bias, out_features, activation_bits)


def _dequantize_cuda(
    tiles: Tensor,
    out_features: int,
    in_features: int,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_rows: Tensor | None = None,
) -> Tensor:
    _check_tiles(tiles, out_features, in_features)
    _check_no_outliers(outlier_values)
    return cuda.dequantize(tiles, out_features, in_features)


def _check_no_outliers(values: Tensor | None) -> None:
    if values is not None:
        raise LwquantError(
            "the GPU kernels have no outliers: such layers are not laid out in tiles"
        )


def _check_device(name: str, tensor: Tensor, tiles: Tensor) -> None:
    if tensor.device != tiles.device:
        raise LwquantError(f"{name} is on {tensor.device}, the layer's tiles on {tiles.device}")


def _linear_fake(
    x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, *others: Any
) -> Tensor:
    check_input(x, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def _dequantize_fake(
    tiles: Tensor, out_features: int, in_features: int, *outliers: Tensor | None
) -> Tensor:
    return tiles.new_empty(out_features, in_features, dtype=torch.float32)


for _name, _on_cpu, _on_gpu, _fake in (
    ("linear_tiled", _linear, _linear_cuda, _linear_fake),
    ("dequantize_tiled", _dequantize, _dequantize_cuda, _dequantize_fake),
):
    LIBRARY.impl(_name, _on_cpu, "CPU")
    LIBRARY.impl(_name, _on_gpu, "CUDA")
    torch.library.register_fake(f"lwquant::{_name}", _fake, lib=LIBRARY)

linear_tiled = torch.ops.lwquant.linear_tiled.default
dequantize_tiled = torch.ops.lwquant.dequantize_tiled.default


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, bias, out_features, *outliers, _ = inputs
    ctx.save_for_backward(tiles, *outliers)
    ctx.shape = (out_features, x.shape[-1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tiles, *outliers = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (5 + len(outliers))
    if ctx.needs_input_grad[0]:
        grads[0] = of_input(grad, dequantize_tiled(tiles, *ctx.shape, *outliers))
    if ctx.needs_input_grad[2]:
        grads[2] = of_bias(grad, ctx.bias_dtype)
    return tuple(grads)


torch.library.register_autograd(
    "lwquant::linear_tiled", _backward, setup_context=_setup, lib=LIBRARY
)
