"""The operators on tiles for CUDA tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lwquant.ops.cuda import driver
from lwquant.ops.cuda.cache import compiled
from lwquant.ops.cuda.device import architecture, index, multiprocessors, stream
from lwquant.ops.cuda.nvrtc import KernelKind

if TYPE_CHECKING:
    from lwquant.ops._kernels import GpuKernels

HEADER_BYTES = 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/cuda/arguments.h


class TilesOnGpu:
    """Tiles on a GPU and what their calls need: nothing is asked for twice.

    Tiles say in their first bytes what they are; to read them means to wait for the GPU.
    """

    def __init__(self, tiles: Tensor, out_features: int, in_features: int) -> None:
        """ValueError where the tiles are those of another layer."""
        header = tiles[:HEADER_BYTES].cpu().numpy().tobytes()
        self.address, self.device_index = tiles.data_ptr(), index(tiles.device)
        self.layer = driver.layer(header, tiles, out_features, in_features)
        self._kernels: dict[int, GpuKernels] = {}
        self._workspace: dict[tuple[int, int], int] = {}

    def kind(self, activation_bits: int) -> KernelKind:
        return KernelKind(self.layer.bits, activation_bits, self.layer.span_blocks)

    def kernels(self, activation_bits: int) -> GpuKernels:
        """Those for `activation_bits`, compiled and loaded by the first who asks."""
        found = self._kernels.get(activation_bits)
        if found is None:
            found = _loaded(self.kind(activation_bits), self.device_index)
            self._kernels[activation_bits] = found
        return found

    def any_kernels(self) -> GpuKernels:
        """Those that are there, if any are: all can unpack."""
        return next(iter(self._kernels.values()), None) or self.kernels(16)

    def workspace_bytes(self, n_tokens: int, activation_bits: int) -> int:
        key = n_tokens, activation_bits
        found = self._workspace.get(key)
        if found is None:
            found = self.layer.workspace_bytes(self.kernels(activation_bits), n_tokens)
            self._workspace[key] = found
        return found


_known = WeakTensorKeyDictionary()


def linear(
    x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, activation_bits: int
) -> Tensor:
    """x (..., in_features) → (..., out_features) in the dtype of x; all on one GPU.

    Up to driver.most_tokens() as lwquant.ops.native.TiledLinear says, apart from rounding to the
    dtype of x; a token that holds NaN or infinity gets NaN for all its outputs. With more tokens
    the weight is rounded to the dtype of x instead of the activations to integers.
    """
    in_features = x.shape[-1]
    on_gpu = on_gpu_of(tiles, out_features, in_features)
    n_tokens = x.numel() // in_features
    if n_tokens > driver.most_tokens(activation_bits):
        kernels = on_gpu.kernels(activation_bits)
        weight = _weight(on_gpu, kernels, tiles, (out_features, in_features), x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # it would take another dtype
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(*x.shape[:-1], out_features)
    if n_tokens == 0:
        return y
    tokens = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    n_bytes = on_gpu.workspace_bytes(n_tokens, activation_bits)
    # From torch's allocator: it knows streams and the memory of CUDA graphs.
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=tiles.device)
    on_gpu.layer.multiply(
        on_gpu.kernels(activation_bits),
        tokens.data_ptr(),
        FLOATS.index(x.dtype),
        n_tokens,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOATS.index(bias.dtype),
        y.data_ptr(),
        workspace.data_ptr(),
        n_bytes,
        stream(tiles.device),
    )
    return y


def dequantize(tiles: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight, (out_features, in_features) float32; equal to the CPU's bit for bit."""
    on_gpu = on_gpu_of(tiles, out_features, in_features)
    kernels = on_gpu.any_kernels()
    return _weight(on_gpu, kernels, tiles, (out_features, in_features), torch.float32)


def on_gpu_of(tiles: Tensor, out_features: int, in_features: int) -> TilesOnGpu:
    """What is known of these tiles. ValueError where they are those of another layer."""
    found: TilesOnGpu | None = _known.get(tiles)
    # `tensor.data = other` leaves another layer in the same tensor.
    if found is None or found.address != tiles.data_ptr():
        found = _known[tiles] = TilesOnGpu(tiles, out_features, in_features)
    return found


def compile_ahead(wanted: Iterable[tuple[TilesOnGpu, int]]) -> None:
    """Compile and load kernels for tiles with their activation bits, side by side.

    A kind takes seconds. Raises LwquantError where there is no compiler, or it cannot do it.
    """
    kinds = {(on_gpu.kind(bits), on_gpu.device_index) for on_gpu, bits in wanted}
    if not kinds:
        return
    with ThreadPoolExecutor(min(len(kinds), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda kind: _loaded(*kind), kinds))


def _weight(
    on_gpu: TilesOnGpu,
    kernels: GpuKernels,
    tiles: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=tiles.device)
    kind, where = FLOATS.index(dtype), stream(tiles.device)
    on_gpu.layer.dequantize(kernels, weight.data_ptr(), kind, where)
    return weight


@functools.cache
def _loaded(kind: KernelKind, device_index: int) -> GpuKernels:
    code = compiled(kind, architecture(device_index))
    return driver.kernels(code, device_index, kind, multiprocessors(device_index))
