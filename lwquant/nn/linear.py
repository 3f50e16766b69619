"""A linear layer that keeps its weight packed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lwquant import ops
from lwquant.ops.codebook import dequantize_codebook, linear_codebook
from lwquant.ops.outliers import check_outliers, column_dtype, decode_columns, encode_columns
from lwquant.ops.scale_bytes import encode_scales
from lwquant.scheme import QuantScheme, row_words
from lwquant.types import Outliers, QuantizedWeight

# Held while a layer changes its layout: several threads may call it for the first time.
_LAYOUT = threading.Lock()


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias with W = (codes − zeros) · scales + O, unpacked only while it is multiplied.

    With a codebook W = value of the code · scales, and there are no zeros.

    Buffers, as they are in a file (bit layout: lwquant/ops/layout.py):
        qweight: (out_features, row_words(in_features, bits)) int32.
        scales: (out_features, n_groups) float16, whatever dtype the module is moved to; with
            scale_bits 8 (out_features, 1 + n_groups) uint8, see lwquant/ops/scale_bytes.py.
        zeros: (n_groups, row_words(out_features, bits)) int32; with fine_zeros (n_groups,
            out_features) uint8, in steps of scheme.zero_step; absent when symmetric.
        outlier_values: (n,) float16, O's entries row by row, n as scheme.n_outliers() says; like
            the scales whatever dtype the module is moved to. All three are absent without outliers.
        outlier_columns: (n,) int16 or int32, see lwquant/ops/outliers.py.
        outlier_rows: (out_features + 1,) int32, where the entries of each row start.
    Parameter:
        bias: (out_features,) in the dtype of the model, or None.

    There is no `weight`: use `dequantize()`. Gradients reach the input and the bias, not the codes.

    On a CPU, and without outliers on an NVIDIA GPU, qweight, scales and zeros are laid out as the
    kernels read them, see prepare(), and are None from then on; the buffer `tiles` is what they
    became. `state_dict()` and copies have them all the same. Tiles stay where they are until the
    layer moves to another device: a CUDA graph may have their address.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tiles: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_rows: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation_bits: int = 16,
        int8_weights: bool = False,
    ) -> None:
        """An empty layer to load into; `dtype` is that of the bias.

        `activation_bits` is what the kernels round inputs to, 8 or 16, see activation_choice.py;
        it may be changed at any time. With `int8_weights` kernels may, beside 8-bit activations,
        round weights to int8 where there are many tokens; that is laid out with the weight.
        """
        super().__init__()
        if scheme.is_float:
            raise ValueError(f"scheme {scheme.label} is not a packed one")
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer of {in_features} inputs, {out_features} outputs is empty")
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.activation_bits = activation_bits
        self.int8_weights = int8_weights
        n_groups, n_scales = scheme.n_groups(in_features), scheme.row_scales(in_features)
        code_words = row_words(in_features, scheme.bits)
        qweight = torch.zeros(out_features, code_words, dtype=torch.int32, device=device)
        scales = torch.zeros(out_features, n_scales, dtype=scale_dtype(scheme), device=device)
        zero_dtype, zero_width = zero_layout(scheme, out_features)
        zeros = torch.zeros(n_groups, zero_width, dtype=zero_dtype, device=device)
        # While it is set it stands for qweight, scales and zeros.
        self._kernel: ops.TiledLinear | None = None
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", None if scheme.symmetric else zeros)
        self.register_buffer("tiles", None, persistent=False)
        layout = outlier_layout(scheme, out_features, in_features)
        for name, (own_dtype, shape) in layout.items():
            stored = torch.zeros(shape, dtype=own_dtype, device=device)
            self.register_buffer(name, stored if scheme.outliers else None)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @classmethod
    def from_weight(cls, quantized: QuantizedWeight, bias: Tensor | None) -> QuantizedLinear:
        """The layer that computes with `quantized`; `bias` (out_features,) keeps its dtype."""
        scheme = quantized.scheme
        out_features, in_features = quantized.codes.shape
        _check_symmetric_zeros(quantized)
        layer = cls(
            in_features,
            out_features,
            scheme,
            False,
            activation_bits=quantized.activation_bits,
            int8_weights=quantized.int8_weights,
        )
        layer.qweight = ops.pack(quantized.codes, scheme.bits)
        layer.scales = stored_scales(quantized).detach().clone()
        if not scheme.symmetric:
            layer.zeros = stored_zeros(quantized).detach().clone()
        for name, tensor in stored_outliers(quantized):
            setattr(layer, name, tensor.detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in the dtype of x, computed in float32."""
        kernel = self._kernel
        if kernel is None and not torch.compiler.is_compiling():
            kernel = self.prepare()
        if kernel is not None:  # whose own bias is found without a search through all attributes
            return kernel(x, self._parameters.get("bias"), self.activation_bits)
        codebook, group_size = self.scheme.codebook, self.scheme.group_size
        if codebook:
            return linear_codebook(x, self.qweight, self.scales, self.bias, codebook, group_size)
        y: Tensor = torch.ops.lwquant.linear(
            x,
            self.qweight,
            self.scales,
            self.zeros,
            self.bias,
            self.scheme.bits,
            group_size,
            *self._outliers,
        )
        return y

    def prepare(self) -> ops.TiledLinear | None:
        """Lay the weight out for the kernels, in place of qweight, scales and zeros.

        Loading a model does it, and the first call of a layer that was made otherwise or moved,
        but not while torch.compile traces it. Returns what runs them, see lwquant/ops/tiles.py;
        None where no kernel takes the layer: on another device, with a codebook, in groups that are
        neither a multiple of 32 nor a whole row, and with outliers on a GPU.
        """
        with _LAYOUT:
            if self._kernel is not None:
                return self._kernel
            device = self.qweight.device
            if not (device.type == "cpu" or (device.type == "cuda" and not self.scheme.outliers)):
                return None
            if not ops.tiles_bytes(self.scheme, self.out_features, self.in_features):
                return None
            zeros = None if self.zeros is None else self.zeros.cpu()
            in_host = self.qweight.cpu(), self.scales.cpu(), zeros
            tiles = ops.make_tiles(
                self.scheme, self.in_features, *in_host, int8_weights=self.int8_weights
            ).to(device)
            kernel = ops.TiledLinear(tiles, self.out_features, self.in_features, self._outliers)
            for name in ("qweight", "scales", "zeros"):
                self._buffers[name] = None
            self._buffers["tiles"] = tiles
            self._kernel = kernel
            return kernel

    def restore(self) -> None:
        """Undo prepare()."""
        with _LAYOUT:
            if self._kernel is None:
                return
            self._buffers.update(self._stored())
            self._buffers["tiles"] = None
            self._kernel = None

    def allow_int8_weights(self, allowed: bool) -> None:
        """Lay the weight out again where that changes what kernels may do."""
        if allowed != self.int8_weights:
            self.restore()
            self.int8_weights = allowed
            self.prepare()

    def _stored(self) -> dict[str, Tensor | None]:
        """qweight, scales and zeros of the tiles; nothing where there are none."""
        if self._kernel is None:
            return {}
        tiles = self._kernel.tiles
        stored = ops.unmake_tiles(tiles.cpu(), self.scheme, self.out_features, self.in_features)
        named = zip(("qweight", "scales", "zeros"), stored, strict=True)
        return {name: None if t is None else t.to(tiles.device) for name, t in named}

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features) float32."""
        codebook, group_size = self.scheme.codebook, self.scheme.group_size
        if self._kernel is not None:
            tiled: Tensor = torch.ops.lwquant.dequantize_tiled(
                self._kernel.tiles, self.out_features, self.in_features, *self._outliers
            )
            return tiled
        if codebook:
            return dequantize_codebook(
                self.qweight, self.scales, codebook, group_size, self.in_features
            )
        weight: Tensor = torch.ops.lwquant.dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            self.scheme.bits,
            group_size,
            self.in_features,
            *self._outliers,
        )
        return weight

    def check_outliers(self) -> None:
        """Raise ValueError where outliers that were loaded would lie outside the weight."""
        values, columns, rows = self._outliers
        if values is None or columns is None or rows is None:
            return
        check_outliers(Outliers(values, decode_columns(columns), rows), self.in_features)

    @property
    def _outliers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.outlier_values, self.outlier_columns, self.outlier_rows

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" scheme={self.scheme.label}, activations={self.activation_bits}b,"
            f" bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        tiles = self._buffers["tiles"]
        moves = tiles is not None and fn(tiles.new_empty(0)).device != tiles.device
        if moves:
            self.restore()
        self._buffers["tiles"] = None
        # `.to(dtype)`, `.half()`, `.bfloat16()` would convert scales and outliers and lose bits; as
        # integers they are moved like any buffer but never converted.
        floats = [
            name
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype == torch.float16
        ]
        self._view_buffers(floats, torch.int16)
        try:
            super()._apply(fn, recurse)
        finally:
            self._view_buffers(floats, torch.float16)
            self._buffers["tiles"] = None if moves else tiles
        if moves:  # now, since torch.compile does not do it when it traces a call
            self.prepare()
        return self

    def _view_buffers(self, names: list[str], dtype: torch.dtype) -> None:
        for name in names:
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.view(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        tiled = self._buffers
        with _LAYOUT:
            self._buffers = {**tiled, **self._stored()}
            try:
                super()._save_to_state_dict(destination, prefix, keep_vars)
            finally:
                self._buffers = tiled

    def __getstate__(self) -> dict[str, Any]:
        with _LAYOUT:
            buffers = {**self._buffers, **self._stored(), "tiles": None}
        return {**self.__dict__, "_buffers": buffers, "_kernel": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As every module, but refuses floats of another dtype rather than rounding them."""
        self.restore()
        expected = {"scales": scale_dtype(self.scheme), "outlier_values": torch.float16}
        for name, dtype in expected.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != dtype:
                raise ValueError(f"{prefix}{name} is {given.dtype}, expected {dtype}")
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


def outlier_layout(
    scheme: QuantScheme, out_features: int, in_features: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the buffers that outliers are stored in, whether there are any or not."""
    n = scheme.n_outliers(out_features, in_features)
    return {
        "outlier_values": (torch.float16, (n,)),
        "outlier_columns": (column_dtype(in_features), (n,)),
        "outlier_rows": (torch.int32, (out_features + 1,)),
    }


def stored_outliers(quantized: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the outliers as stored; nothing where the scheme has none.

    Raises ValueError where there are more or fewer than the scheme says, or some lie outside.
    """
    scheme, outliers = quantized.scheme, quantized.outliers
    out_features, in_features = quantized.codes.shape
    n = scheme.n_outliers(out_features, in_features)
    if (outliers is None) != (scheme.outliers == 0):
        raise ValueError(f"scheme {scheme.label} and the weight's outliers contradict each other")
    if outliers is None:
        return
    if len(outliers.values) != n or len(outliers.columns) != n:
        raise ValueError(f"scheme {scheme.label} has {n} outliers, not {len(outliers.values)}")
    check_outliers(outliers, in_features)
    yield "outlier_values", outliers.values
    yield "outlier_columns", encode_columns(outliers.columns, in_features)
    yield "outlier_rows", outliers.rows


def _check_symmetric_zeros(quantized: QuantizedWeight) -> None:
    middle = 2 ** (quantized.scheme.bits - 1)
    if quantized.scheme.symmetric and bool((quantized.zeros != middle).any()):
        raise ValueError(
            f"scheme {quantized.scheme.label} is symmetric, but not every zero is {middle}"
        )
