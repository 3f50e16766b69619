"""How the sparse part of a weight is stored: compressed rows, columns in 16 bits where they fit.

The columns are unsigned. Few torch operators know unsigned 16-bit integers, so that a column lies
in an int16 of the same bits; from 65537 inputs on it takes an int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.scheme import NARROW_COLUMNS
from lwquant.types import Outliers


def column_dtype(in_features: int) -> torch.dtype:
    """The dtype that columns are stored with."""
    return torch.int16 if in_features <= NARROW_COLUMNS else torch.int32


def encode_columns(columns: Tensor, in_features: int) -> Tensor:
    """Columns (n,) int32 as stored, (n,).

    >>> encode_columns(torch.tensor([7, 40_000], dtype=torch.int32), 50_000)
    tensor([     7, -25536], dtype=torch.int16)
    """
    return columns.to(column_dtype(in_features))  # keeps the low 16 bits


def decode_columns(stored: Tensor) -> Tensor:
    """The inverse, (n,) int32.

    >>> decode_columns(torch.tensor([7, -25536], dtype=torch.int16))
    tensor([    7, 40000], dtype=torch.int32)
    """
    return stored.int() & 0xFFFF if stored.dtype == torch.int16 else stored


def check_outliers(outliers: Outliers, in_features: int) -> None:
    """Raise ValueError for row pointers or columns that lead outside the weight."""
    rows, n = outliers.rows, len(outliers.values)
    if int(rows[0]) != 0 or int(rows[-1]) != n or bool((rows.diff() < 0).any()):
        raise ValueError(f"the row pointers of its outliers do not rise from 0 to {n}")
    if n and not 0 <= int(outliers.columns.min()) <= int(outliers.columns.max()) < in_features:
        raise ValueError(f"an outlier is in none of the {in_features} columns")
