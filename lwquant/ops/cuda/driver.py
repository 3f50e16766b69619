"""What the compiled module does with a GPU: it reaches the driver, and launches kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from lwquant.ops.native import extension

if TYPE_CHECKING:
    from lwquant.ops._kernels import GpuKernels, GpuLayer, GpuRounding
    from lwquant.ops.cuda.nvrtc import KernelKind


@functools.cache
def most_tokens(activation_bits: int) -> int:
    """How many tokens the kernels take at a time."""
    return extension().gpu_tokens(activation_bits)  # type: ignore[no-any-return]


def layer(header: bytes, tiles: Tensor, out_features: int, in_features: int) -> GpuLayer:
    """Tiles on a GPU, of which `header` are the first 64 bytes; ValueError where they lie."""
    return extension().GpuLayer(  # type: ignore[no-any-return]
        header, tiles.data_ptr(), tiles.numel(), out_features, in_features
    )


def kernels(code: bytes, device_index: int, kind: KernelKind, n_multiprocessors: int) -> GpuKernels:
    """Machine code of csrc/cuda/kernels.cu, loaded into a GPU."""
    return extension().GpuKernels(  # type: ignore[no-any-return]
        code,
        device_index,
        kind.bits,
        kind.activation_bits,
        kind.span_blocks,
        n_multiprocessors,
    )


def rounding(code: bytes, device_index: int) -> GpuRounding:
    """Machine code of csrc/cuda/rounding.cu, loaded into a GPU."""
    return extension().GpuRounding(code, device_index)  # type: ignore[no-any-return]
