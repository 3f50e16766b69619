"""An embedding table that stays packed, and a head that multiplies by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lwquant import ops
from lwquant.nn.linear import QuantizedLinear, scale_dtype, stored_scales
from lwquant.scheme import QuantScheme, row_words
from lwquant.types import QuantizedWeight


class QuantizedEmbedding(nn.Module):
    """Looks rows of W = (codes − 2^(bits−1)) · scales up, and unpacks only these.

    Buffers, as they are in a file and as in a QuantizedLinear without zeros:
        qweight: (num_embeddings, row_words(embedding_dim, bits)) int32.
        scales: (num_embeddings, 1 + n_groups) uint8, see lwquant/ops/scale_bytes.py.
    """

    qweight: Tensor
    scales: Tensor
    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: QuantScheme,
        *,
        factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is that of the rows it gives, each times `factor`, rounded to that dtype.

        Raises ValueError for a scheme with zeros, a codebook or outliers, and for wide scales.
        """
        super().__init__()
        check_table_scheme(scheme)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.out_features, self.in_features = num_embeddings, embedding_dim  # as of the head
        self.scheme, self.factor = scheme, factor
        self.padding_idx = None  # what transformers looks for; it changes nothing in a lookup
        words, n_scales = row_words(embedding_dim, scheme.bits), scheme.row_scales(embedding_dim)
        codes = torch.zeros(num_embeddings, words, dtype=torch.int32, device=device)
        scales = torch.zeros(num_embeddings, n_scales, dtype=scale_dtype(scheme), device=device)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", scales)
        # Follows the module to other dtypes, which its integers do not.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) tokens → (..., embedding_dim)."""
        flat = ids.reshape(-1)
        if not len(flat):
            return self.like.new_empty(*ids.shape, self.embedding_dim)
        rows: Tensor = torch.ops.lwquant.dequantize(
            self.qweight.index_select(0, flat),  # which refuses what is no row, unlike [flat]
            self.scales.index_select(0, flat),
            None,
            self.scheme.bits,
            self.scheme.group_size,
            self.embedding_dim,
        )
        found = rows.to(self.like.dtype).view(*ids.shape, self.embedding_dim)
        if self.factor is None:
            return found
        return found * self.like.new_full((), self.factor)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.label}"


class TiedHead(nn.Module):
    """y = x Wᵀ + bias with the table of a QuantizedEmbedding, of which it stores nothing itself.

    What the kernels read is laid out from it, once.
    """

    bias: nn.Parameter | None

    def __init__(self, table: QuantizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.activation_bits = 16  # as of QuantizedLinear
        self.bias = bias
        self._table = (table,)  # no module of this one: its tensors have one name
        self._laid_out: tuple[object, QuantizedLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in the dtype of x."""
        return self.layer().forward(x)

    def prepare(self) -> ops.TiledLinear | None:
        """As of QuantizedLinear."""
        return self.layer().prepare()

    def layer(self) -> QuantizedLinear:
        """The linear that computes it, made anew when the table was filled or moved."""
        found = self._laid_out
        if found is not None and torch.compiler.is_compiling():
            return found[1]
        (table,) = self._table
        codes = table.qweight
        version = None if codes.is_inference() else codes._version  # which these do not count
        state = codes.data_ptr(), version, codes.device
        if found is None or found[0] != state:
            layer = QuantizedLinear(
                self.in_features, self.out_features, table.scheme, bias=False, device="meta"
            )
            layer.qweight, layer.scales = codes, table.scales
            found = self._laid_out = state, layer
        layer = found[1]
        layer.bias, layer.activation_bits = self.bias, self.activation_bits
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid_out": None}

    def extra_repr(self) -> str:
        (table,) = self._table
        return f"{self.in_features}, {self.out_features}, scheme={table.scheme.label}"


def check_table_scheme(scheme: QuantScheme) -> None:
    """ValueError for a scheme that no table has."""
    plain = not (scheme.codebook or scheme.outliers or scheme.is_float)
    if not (plain and scheme.symmetric and scheme.scale_bits == 8):
        raise ValueError(f"an embedding table cannot have scheme {scheme.label}")


def fill_table(table: QuantizedEmbedding, quantized: QuantizedWeight) -> None:
    """Give the table the weight that was rounded for it."""
    table.qweight = ops.pack(quantized.codes, quantized.scheme.bits)
    table.scales = stored_scales(quantized)
