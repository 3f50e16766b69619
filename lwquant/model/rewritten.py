"""A checkpoint whose tensors are rewritten as they are read, one at a time like those of the file.

What a rewrite says is small (which tensor is multiplied by what), so nothing is held in memory
but the gains and matrices that it multiplies with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lwquant.model.checkpoint import WeightSource

# Float64 values (..., n) to values of the same shape, each row on its own; linear, or a constant.
Step = Callable[[Tensor], Tensor]

CHUNK_VALUES = 2**22  # of an embedding or head rewritten at once: 32 MiB in float64


@dataclass(frozen=True)
class Edit:
    """What happens to one tensor, a weight (out_features, in_features) or a vector (n,)."""

    columns: tuple[Step, ...] = ()  # over in_features, for each output
    rows: tuple[Step, ...] = ()  # over out_features, for each input; or over the vector

    def then(self, *, columns: Sequence[Step] = (), rows: Sequence[Step] = ()) -> Edit:
        return Edit((*self.columns, *columns), (*self.rows, *rows))

    def apply(self, tensor: Tensor) -> Tensor:
        """The rewritten tensor in float32, computed in float64."""
        if tensor.ndim == 1:
            return _through(self.rows, tensor.double()).float()
        if self.rows:
            wide = _through(self.columns, tensor.double())
            return _through(self.rows, wide.T).T.float().contiguous()
        n_rows = max(1, CHUNK_VALUES // tensor.shape[1])
        return torch.cat(
            [_through(self.columns, part.double()).float() for part in tensor.split(n_rows)]
        )


def _through(steps: Sequence[Step], values: Tensor) -> Tensor:
    for step in steps:
        values = step(values)
    return values


@dataclass(frozen=True)
class Rewrite:
    """Edits of a checkpoint that leave what its model computes unchanged."""

    label: str  # tells this rewrite from every other, for caches
    edits: Mapping[str, Edit]  # by the checkpoint's name of the tensor, or by a copy's
    copies: Mapping[str, str] = field(default_factory=dict)  # new tensor -> the one it starts from
    config: Mapping[str, object] = field(default_factory=dict)  # entries that change
    notes: tuple[str, ...] = ()  # what the reader of the result has to know


@dataclass(frozen=True)
class RewrittenSource:
    """A WeightSource whose rewritten tensors are read as float32.

    `dtype` and `carried_dtype` still say how the original stores them, and so what the output
    stores them as; sizes in bytes are those of the original's files.
    """

    original: WeightSource
    rewrite: Rewrite

    @property
    def path(self) -> Path:
        return self.original.path

    @property
    def config(self) -> dict[str, object]:
        return {**self.original.config, **self.rewrite.config}

    @property
    def size_bytes(self) -> int:
        return self.original.size_bytes

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.original.names(), *self.rewrite.copies)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.original.shape(self._origin(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.original.dtype(self._origin(name))

    def read(self, name: str) -> Tensor:
        tensor = self.original.read(self._origin(name))
        edit = self.rewrite.edits.get(name)
        return tensor if edit is None else edit.apply(tensor)

    def carried_dtype(self, name: str) -> torch.dtype:
        """As the original, but float32 for what a rewrite makes too large for float16."""
        dtype = self.original.carried_dtype(self._origin(name))
        if name in self.rewrite.edits and dtype == torch.float16:
            if self.read(name).abs().max() > torch.finfo(dtype).max:
                return torch.float32
        return dtype

    def file_bytes(self, linears: Sequence[str]) -> int:
        return self.original.file_bytes(linears)

    def check_finite(self) -> None:
        self.original.check_finite()

    def fingerprint(self) -> str:
        """Differs from the original's: hidden states differ, though logits do not."""
        parts = json.dumps([self.original.fingerprint(), self.rewrite.label])
        return hashlib.sha256(parts.encode()).hexdigest()

    def _origin(self, name: str) -> str:
        return self.rewrite.copies.get(name, name)
