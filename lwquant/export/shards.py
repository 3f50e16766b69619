"""Writes tensors to safetensors shards in the order they come, holding none of them in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lwquant.errors import OutputError
from lwquant.model.safetensors_header import DTYPE_NAMES, LENGTH_BYTES

COPY_BYTES = 2**24
ALIGNMENT = 8  # the header is padded so that the data starts on an 8-byte boundary


@dataclass(frozen=True)
class _Spooled:
    """A tensor of the current shard; `start` is its first byte in the spool."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class ShardWriter:
    """Takes tensors one by one and leaves `model.safetensors`, or shards and their index.

    A safetensors header comes before its data, so the tensors of the current shard go to an unnamed
    spool file in `folder` first. The folder needs room for the model and one shard more.

    Args:
        folder: where the files go; it must exist.
        max_shard_bytes: tensor bytes of one shard; only one larger tensor makes a larger shard.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 2 * 2**30) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._shard_of: dict[str, int] = {}
        self._current: list[_Spooled] = []
        self._current_bytes = 0
        self._n_shards = 0
        self._total_bytes = 0
        self._finished = False
        with self._writing(folder, 0):
            self._spool: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, _close, self._spool)  # a failed run drops the writer unfinished

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; OutputError for a known name, an unknown dtype or a full disk."""
        if self._finished:
            raise OutputError(
                f"tensor {name!r} comes after the shards in {self._folder} were finished"
            )
        if name in self._shard_of:
            raise OutputError(f"tensor {name!r} is written twice to {self._folder}")
        if tensor.dtype not in DTYPE_NAMES:
            raise OutputError(f"tensor {name!r}: safetensors has no dtype for {tensor.dtype}")
        if self._current and self._current_bytes + tensor.nbytes > self._max_shard_bytes:
            self._close_shard()
        with self._writing(self._folder, tensor.nbytes):
            self._spool.write(_raw_bytes(tensor))
        entry = _Spooled(
            name, tensor.dtype, tuple(tensor.shape), self._current_bytes, tensor.nbytes
        )
        self._current.append(entry)
        self._current_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._shard_of[name] = self._n_shards

    def finish(self) -> int:
        """Close and name the shards, write the index; returns the bytes of the files."""
        if self._finished:
            raise OutputError(f"the shards in {self._folder} are already finished")
        if not self._shard_of:
            raise OutputError(f"no tensors to write to {self._folder}")
        self._close_shard()
        _close(self._spool)
        self._finished = True
        final = [self._final_name(shard) for shard in range(self._n_shards)]
        with self._writing(self._folder, 0):
            for shard, name in enumerate(final):
                self._unfinished_path(shard).rename(self._folder / name)
            if self._n_shards > 1:
                self._write_index(final)
        return sum((self._folder / name).stat().st_size for name in final)

    def _close_shard(self) -> None:
        # Largest items first: every tensor then starts at a multiple of its item size.
        order = sorted(self._current, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header = _header(order)
        path = self._unfinished_path(self._n_shards)
        with self._writing(path, len(header) + self._current_bytes), path.open("wb") as shard:
            shard.write(header)
            for entry in order:
                self._spool.seek(entry.start)
                self._copy(entry.n_bytes, shard)
            self._spool.seek(0)  # the next shard overwrites this one
        self._n_shards += 1
        self._current, self._current_bytes = [], 0

    def _copy(self, n_bytes: int, shard: IO[bytes]) -> None:
        while n_bytes:
            chunk = self._spool.read(min(n_bytes, COPY_BYTES))
            if not chunk:
                raise OSError("the spool file is shorter than what was written to it")
            shard.write(chunk)
            n_bytes -= len(chunk)

    def _unfinished_path(self, shard: int) -> Path:
        return self._folder / f".shard-{shard + 1:05}.unfinished"

    def _final_name(self, shard: int) -> str:
        if self._n_shards == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05}-of-{self._n_shards:05}.safetensors"

    def _write_index(self, final: list[str]) -> None:
        weight_map = {name: final[shard] for name, shard in sorted(self._shard_of.items())}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self, path: Path, n_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self._folder).free if self._folder.is_dir() else 0
            raise OutputError(
                f"{path}: writing {n_bytes} bytes failed, {free} are free: "
                f"{error.strerror or error}"
            ) from error


def _close(spool: IO[bytes]) -> None:
    # After a full disk, closing tries to write the rest once more; the error was already raised.
    with suppress(OSError):
        spool.close()


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy where it is contiguous and on the CPU."""
    # reshape first: viewing as bytes needs at least one dimension
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _header(order: list[_Spooled]) -> bytes:
    """The length and the JSON that come before the tensors of one shard, in this order."""
    claims: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in order:
        claims[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, start + entry.n_bytes),
        }
        start += entry.n_bytes
    text = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
