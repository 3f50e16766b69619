"""Safetensors headers: what a file claims to hold, checked before any weight is read.

The format is eight bytes of header length, a JSON header, then the tensors back to back. The reader
of the safetensors package checks much of this too, but says neither which tensor is cut nor by how
much, and reports a lying dtype as a parse error.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lwquant.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIM = 2**63  # torch sizes are int64
LFS_POINTER = b"version "  # how a git-lfs pointer file starts

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `stop` are bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Everything a safetensors file says about itself, known to fit the file."""

    path: Path
    file_bytes: int
    tensors: Mapping[str, TensorEntry]  # in the order of their bytes


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    CheckpointError where the file is missing, cut short or longer than its tensors, where the
    header is no JSON object or names an unknown dtype, or where shape, dtype and offsets disagree.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(LENGTH_BYTES), file_bytes)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    claims = _parse(path, text)
    metadata = claims.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header is not an object")
    data_start = LENGTH_BYTES + length
    entries = {name: _entry(path, name, claim, data_start) for name, claim in claims.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_extent(path, ordered, data_start, file_bytes)
    return Header(path, file_bytes, ordered)


def _header_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if prefix == LFS_POINTER:
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: is not safetensors: a header of {length} bytes, "
            f"the limit is {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: the header alone needs {LENGTH_BYTES + length} bytes, "
            f"the file has {file_bytes}"
        )
    return length


def _parse(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            twice = counts.most_common(1)[0][0]
            raise CheckpointError(f"{path}: the safetensors header names {twice!r} twice")
        return dict(pairs)

    try:
        claims = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(claims, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return claims


def _entry(path: Path, name: str, claim: object, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(claim, dict) or not {"dtype", "shape", "data_offsets"} <= claim.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets in the header")
    dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{where} has the unknown dtype {claim['dtype']!r}; known: {known}")
    shape = _whole_numbers(claim["shape"])
    if shape is None or any(size >= MAX_DIM for size in shape):
        raise CheckpointError(f"{where} has the impossible shape {claim['shape']!r}")
    offsets = _whole_numbers(claim["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the impossible offsets {claim['data_offsets']!r}")
    needed, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise CheckpointError(
            f"{where} of dtype {claim['dtype']} and shape {shape} needs {needed} bytes, "
            f"its offsets hold {given}"
        )
    return TensorEntry(dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    """The list as a tuple where every item is a JSON integer ≥ 0 (`true` is not one), else None."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


def _check_extent(
    path: Path, ordered: Mapping[str, TensorEntry], data_start: int, file_bytes: int
) -> None:
    """Tensors lie back to back and end with the file."""
    end = data_start
    for name, entry in ordered.items():
        if entry.start != end:
            kind = (
                "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            )
            raise CheckpointError(
                f"{path}: tensor {name!r} {kind}: it starts at byte {entry.start} instead of {end}"
            )
        end = entry.stop
    if end == file_bytes:
        return
    if end < file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - end} bytes follow the last tensor; "
            f"the header accounts for {end} bytes, the file has {file_bytes}"
        )
    name, entry = next((n, e) for n, e in ordered.items() if e.stop > file_bytes)
    raise CheckpointError(
        f"{path}: truncated: tensor {name!r} ends at byte {entry.stop} and the last one at {end}, "
        f"the file has {file_bytes} bytes"
    )
