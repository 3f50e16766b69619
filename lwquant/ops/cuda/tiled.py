"""The operators on tiles for CUDA tensors."""

from __future__ import annotations

import functools
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
    from lwquant.ops._kernels import GpuKernels, GpuLayer

HEADER_BYTES = 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/cuda/arguments.h

# Tiles say in their first bytes what they are. To read them means to wait for the GPU, so they are
# read once for every tensor, with its address: `tensor.data = other` would leave another there.
_layers = WeakTensorKeyDictionary()


def linear(
    x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, activation_bits: int
) -> Tensor:
    """x (..., in_features) → (..., out_features) in the dtype of x; all on one GPU.

    Up to 64 tokens as lwquant.ops.native.TiledLinear says, apart from rounding to the dtype of x; a
    token that holds NaN or infinity gets NaN for all its outputs. With more tokens the weight is
    rounded to the dtype of x instead of the activations to integers.
    """
    in_features = x.shape[-1]
    layer = layer_of(tiles, out_features, in_features)
    tokens = x.reshape(-1, in_features).contiguous()
    n_tokens = tokens.shape[0]
    if n_tokens > driver.most_tokens():
        shape = out_features, in_features
        weight = _weight(layer, activation_bits, shape, x.dtype, tiles.device)
        with torch.autocast(x.device.type, enabled=False):  # it would take another dtype
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.new_empty(*x.shape[:-1], out_features)
    if n_tokens == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    device = tiles.device
    processors = multiprocessors(index(device))
    n_bytes = layer.workspace_bytes(n_tokens, activation_bits, processors)
    # From torch's allocator: it knows streams and the memory of CUDA graphs.
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    kernels = _kernels(layer, activation_bits, device)
    layer.multiply(
        kernels,
        tokens.data_ptr(),
        FLOATS.index(x.dtype),
        n_tokens,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOATS.index(bias.dtype),
        y.data_ptr(),
        workspace.data_ptr(),
        n_bytes,
        processors,
        stream(device),
    )
    return y


def dequantize(tiles: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight, (out_features, in_features) float32; equal to the CPU's bit for bit."""
    layer = layer_of(tiles, out_features, in_features)
    return _weight(layer, 16, (out_features, in_features), torch.float32, tiles.device)


def layer_of(tiles: Tensor, out_features: int, in_features: int) -> GpuLayer:
    """What the kernels know of a layer. ValueError where the tiles are those of another."""
    found: tuple[int, GpuLayer] | None = _layers.get(tiles)
    if found is None or found[0] != tiles.data_ptr():
        header = tiles[:HEADER_BYTES].cpu().numpy().tobytes()
        found = tiles.data_ptr(), driver.layer(header, tiles, out_features, in_features)
        _layers[tiles] = found
    return found[1]


def _weight(
    layer: GpuLayer,
    activation_bits: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """By the kernels for `activation_bits`: all can unpack, and these may be there already."""
    weight = torch.empty(shape, dtype=dtype, device=device)
    kernels = _kernels(layer, activation_bits, device)
    layer.dequantize(kernels, weight.data_ptr(), FLOATS.index(dtype), stream(device))
    return weight


def _kernels(layer: GpuLayer, activation_bits: int, device: torch.device) -> GpuKernels:
    return _loaded(KernelKind(layer.bits, activation_bits, layer.span_blocks), index(device))


@functools.cache
def _loaded(kind: KernelKind, device_index: int) -> GpuKernels:
    code = compiled(kind, architecture(device_index))
    return driver.kernels(code, device_index, kind.bits, kind.activation_bits, kind.span_blocks)
