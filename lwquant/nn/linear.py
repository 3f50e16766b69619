"""A linear layer that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lwquant import ops
from lwquant.ops.scale_bytes import encode_scales
from lwquant.types import QuantizedWeight, QuantScheme, row_words


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias with W = (codes − zeros) · scales, unpacked only while it is multiplied.

    Buffers, the same in memory and in a file (bit layout: lwquant/ops/layout.py):
        qweight: (out_features, row_words(in_features, bits)) int32.
        scales: (out_features, n_groups) float16, whatever dtype the module is moved to; with
            scale_bits 8 (out_features, 1 + n_groups) uint8, see lwquant/ops/scale_bytes.py.
        zeros: (n_groups, row_words(out_features, bits)) int32; with fine_zeros (n_groups,
            out_features) uint8, in steps of scheme.zero_step; absent when symmetric.
    Parameter:
        bias: (out_features,) in the dtype of the model, or None.

    There is no `weight`: use `dequantize()`. Gradients reach the input and the bias, not the codes.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer to load into; `dtype` is that of the bias."""
        super().__init__()
        if scheme.is_float:
            raise ValueError(f"scheme {scheme.label} is not a packed one")
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer of {in_features} inputs, {out_features} outputs is empty")
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        n_groups, n_scales = scheme.n_groups(in_features), scheme.row_scales(in_features)
        code_words = row_words(in_features, scheme.bits)
        qweight = torch.zeros(out_features, code_words, dtype=torch.int32, device=device)
        scales = torch.zeros(out_features, n_scales, dtype=scale_dtype(scheme), device=device)
        zero_dtype, zero_width = zero_layout(scheme, out_features)
        zeros = torch.zeros(n_groups, zero_width, dtype=zero_dtype, device=device)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", None if scheme.symmetric else zeros)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @classmethod
    def from_weight(cls, quantized: QuantizedWeight, bias: Tensor | None) -> QuantizedLinear:
        """The layer that computes with `quantized`; `bias` (out_features,) keeps its dtype."""
        scheme = quantized.scheme
        out_features, in_features = quantized.codes.shape
        _check_symmetric_zeros(quantized)
        layer = cls(in_features, out_features, scheme, bias=False)
        layer.qweight = ops.pack(quantized.codes, scheme.bits)
        layer.scales = stored_scales(quantized).detach().clone()
        if not scheme.symmetric:
            layer.zeros = stored_zeros(quantized).detach().clone()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in the dtype of x, computed in float32."""
        y: Tensor = torch.ops.lwquant.linear(
            x,
            self.qweight,
            self.scales,
            self.zeros,
            self.bias,
            self.scheme.bits,
            self.scheme.group_size,
        )
        return y

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features) float32."""
        weight: Tensor = torch.ops.lwquant.dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            self.scheme.bits,
            self.scheme.group_size,
            self.in_features,
        )
        return weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" scheme={self.scheme.label}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # `.to(dtype)`, `.half()`, `.bfloat16()` would convert the scales and lose bits; as integers
        # they are moved like any buffer but never converted.
        dtype = self.scales.dtype
        if dtype.is_floating_point:
            self._buffers["scales"] = self.scales.view(torch.int16)
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["scales"] = self.scales.view(dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As every module, but scales of another dtype are refused rather than rounded."""
        given = state_dict.get(prefix + "scales")
        expected = scale_dtype(self.scheme)
        if isinstance(given, Tensor) and given.dtype != expected:
            raise ValueError(f"{prefix}scales is {given.dtype}, expected {expected}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def scale_dtype(scheme: QuantScheme) -> torch.dtype:
    """The dtype that a scheme's scales are stored and computed with."""
    return torch.uint8 if scheme.scale_bits == 8 else torch.float16


def stored_scales(quantized: QuantizedWeight) -> Tensor:
    """The scales as stored, (out_features, scheme.row_scales(in_features))."""
    if quantized.scheme.scale_bits == 8:
        return encode_scales(quantized.scales)
    return quantized.scales.contiguous()


def zero_layout(scheme: QuantScheme, out_features: int) -> tuple[torch.dtype, int]:
    """The dtype that a scheme's zeros are stored with, and how many for one group of inputs."""
    if scheme.fine_zeros:
        return torch.uint8, out_features
    return torch.int32, row_words(out_features, scheme.bits)


def stored_zeros(quantized: QuantizedWeight) -> Tensor:
    """The zeros as stored, (n_groups, width) as zero_layout() says; not for symmetric schemes."""
    by_group = quantized.zeros.T.contiguous()
    return by_group if quantized.scheme.fine_zeros else ops.pack(by_group, quantized.scheme.bits)


def _check_symmetric_zeros(quantized: QuantizedWeight) -> None:
    middle = 2 ** (quantized.scheme.bits - 1)
    if quantized.scheme.symmetric and bool((quantized.zeros != middle).any()):
        raise ValueError(
            f"scheme {quantized.scheme.label} is symmetric, but not every zero is {middle}"
        )
