"""The protocol of all dialects, and the linear that each of them writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lwquant import ops
from lwquant.scheme import WHOLE_ROW, WIDTHS, QuantScheme


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear as lwquant's own folder has it (export/format.py)."""

    scheme: QuantScheme
    out_features: int
    in_features: int
    qweight: Tensor  # (out_features, row_words(in_features, bits)) int32
    scales: Tensor  # (out_features, n_groups) float16, decoded where a byte was stored
    zeros: Tensor | None  # as stored, None where symmetric

    def zero_points(self) -> Tensor:
        """(out_features, n_groups) float32, in codes: also where they are symmetric, or fine."""
        if self.zeros is None:
            return torch.full(self.scales.shape, 2.0 ** (self.scheme.bits - 1))
        if self.scheme.fine_zeros:
            return self.zeros.T.float() * self.scheme.zero_step
        return ops.unpack(self.zeros, self.scheme.bits, self.out_features).T.float()

    def packed_zeros(self) -> Tensor:
        """(n_groups, row_words(out_features, bits)) int32 of whole zeros, symmetric ones too."""
        if self.zeros is not None and not self.scheme.fine_zeros:
            return self.zeros
        zeros = self.zero_points().T.contiguous().to(torch.uint8)
        return ops.pack(zeros, self.scheme.bits)


@dataclass(frozen=True)
class Loader:
    """What loads a format."""

    quant_method: str | None  # in the quantization_config of config.json
    library: str  # that the Hub is told
    install: str  # with pip
    usage: str  # Python that loads the folder or repository {name}


class Dialect(Protocol):
    """One format. It stores what lwquant did exactly, or says why it cannot."""

    @property
    def loader(self) -> Loader: ...

    @property
    def rounded_embeddings(self) -> bool:
        """Whether embedding and head may be stored in few bits, too."""
        ...

    def why_not(self, scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
        """Why the dialect has no such linear; None where it has."""
        ...

    def tensors(
        self, name: str, linear: StoredLinear, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that is stored for a linear, its bias aside.

        `dtype` is that of the model, float16, bfloat16 or float32.
        """
        ...

    def config(
        self, model: Mapping[str, Any], schemes: Mapping[str, QuantScheme], head: str
    ) -> dict[str, Any]:
        """What is added to config.json, of which `model` is the rest.

        `schemes` are those of all linears, of 16 bits too, and of a rounded embedding and head;
        `head` is the module path of the output layer.
        """
        ...

    def notes(self, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
        """What a user should know of such a folder before an engine refuses it."""
        ...


def why_not_plain(
    scheme: QuantScheme, in_features: int, widths: tuple[int, ...] = WIDTHS
) -> str | None:
    """What no other format has, and what one with these widths has not."""
    if scheme.bits not in widths:
        return f"there are {', '.join(map(str, widths))} bits, not {scheme.bits}"
    if scheme.codebook:
        return f"the codes stand for values of {scheme.codebook}"
    if scheme.outliers:
        return f"{scheme.outliers} of 1000 weights are stored apart"
    if scheme.group_size != WHOLE_ROW and in_features % scheme.group_size:
        return f"{in_features} inputs are no whole number of groups of {scheme.group_size}"
    return None


def why_not_whole(scheme: QuantScheme) -> str | None:
    """For formats whose zero-points are whole codes."""
    if scheme.fine_zeros:
        return "zero-points lie between the codes (fine_zeros)"
    return None


def in_16_bits(dtype: torch.dtype) -> torch.dtype:
    """What scales are stored as beside weights of `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def commonest(schemes: Iterable[QuantScheme]) -> QuantScheme:
    """The one that most quantized linears have; the narrower of two."""
    counts = Counter(scheme for scheme in schemes if not scheme.is_float)
    return max(counts, key=lambda scheme: (counts[scheme], -scheme.bits))
