"""Checkpoints: a model folder or hub id becomes tensors that are read one at a time.

Everything that can be wrong without reading weights is refused when the checkpoint is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lwquant.errors import CheckpointError
from lwquant.model.model_folder import member, read_config, read_json
from lwquant.model.safetensors_header import Header, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKED_AT_ONCE = 2**16  # values; isfinite makes temporaries as large as its input
SAMPLE_BYTES = 4096  # read at each end of every tensor for the fingerprint
# Never *.bin or *.py: nothing that is downloaded can run.
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
NOT_DOWNLOADED = ("consolidated*", "original/*", "onnx/*")  # the same weights in other layouts


class WeightSource(Protocol):
    """What the decoder needs of a checkpoint, whatever its file format."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, object]: ...
    @property
    def size_bytes(self) -> int: ...
    def names(self) -> tuple[str, ...]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...
    def carried_dtype(self, name: str) -> torch.dtype:
        """What a tensor that is not quantized is stored as in the output."""
        ...

    def file_bytes(self, linears: Sequence[str]) -> int:
        """Bytes that the weights of all the linears take in the file, as it packs them."""
        ...

    def check_finite(self) -> None: ...
    def fingerprint(self) -> str: ...


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder or .gguf file of `model`, downloaded to the hub cache when it is a hub id.

    A Path is always local. CheckpointError where a local path does not exist, where `revision` is
    given for one, or where the hub does not know the id or cannot be reached.
    """
    path = Path(model)
    local = isinstance(model, Path) or _looks_local(model)
    try:
        exists = bool(str(model)) and path.exists()
    except OSError as error:  # a name too long for the file system
        raise CheckpointError(f"{model}: cannot be read: {error.strerror}") from error
    if not exists and not local:
        return _download(str(model), revision)
    if not exists:
        raise CheckpointError(f"{str(model)!r}: no such folder or .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(f"{path}: is neither a model folder nor a .gguf file")
    if revision is not None:
        raise CheckpointError(f"{path}: is local, so revision={revision!r} has no meaning")
    return path


def _looks_local(model: str) -> bool:
    """Hub ids are `name` or `user/name`; all else was meant as a path."""
    return (
        model in ("", ".", "..")
        or model.startswith(("/", "./", "../", "~"))
        or model.endswith(("/", ".gguf", ".safetensors", ".json"))
        or model.count("/") > 1
        or "\\" in model
    )


def _download(model: str, revision: str | None) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(DOWNLOADED),
            ignore_patterns=list(NOT_DOWNLOADED),
        )
    except hub.HFValidationError as error:
        raise CheckpointError(f"{model!r}: is neither an existing path nor a hub id") from error
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"{model!r}: the hub asks to accept its terms and to log in first (`hf auth login`)"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(f"{model!r}: no such folder, and no such model on the hub") from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{model!r}: has no revision {revision!r} on the hub") from error
    except Exception as error:  # the HTTP client, and so its errors, differ between hub versions
        raise CheckpointError(
            f"{model!r}: no such folder, and the hub cannot be reached: {error}"
        ) from error
    return Path(folder)


def open_checkpoint(path: Path) -> WeightSource:
    """The checkpoint at `path`: a .gguf file, or a folder of safetensors."""
    if path.suffix == ".gguf":
        from lwquant.model.gguf import GgufCheckpoint  # loads transformers, so only when asked for

        return GgufCheckpoint.open(path)
    return Checkpoint.open(path)


@dataclass(frozen=True)
class Checkpoint:
    """A transformers folder with safetensors weights; no file stays open between reads."""

    path: Path
    config: dict[str, object]
    files: tuple[Header, ...]
    _file_of: Mapping[str, Header]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Check config, index and every header of the folder; reads no weights.

        CheckpointError names the file, and the tensor where there is one.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a folder")
        config = read_config(path)
        file_of = _read_shards(path)
        if config.pop("quantization_config", None) is not None:
            _refuse_packed_blocks(path, file_of)
        return cls._of(path, config, file_of)

    @classmethod
    def packed(cls, path: Path, config: dict[str, object]) -> Checkpoint:
        """A folder whose weights are quantized, for those who know how; `config` without how."""
        return cls._of(path, config, _read_shards(path))

    @classmethod
    def _of(
        cls, path: Path, config: dict[str, object], file_of: Mapping[str, Header]
    ) -> Checkpoint:
        files = {header.path: header for header in file_of.values()}
        return cls(path, config, tuple(files.values()), file_of)

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(header.file_bytes for header in self.files)

    def names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """The tensor `name` as stored; CheckpointError where a float tensor holds NaN or Inf.

        The file is opened for this one tensor: a handle kept open would keep the pages of every
        tensor read so far in resident memory. In-place changes stay private to the caller.
        """
        entry = self._entry(name)
        path = self._file_of[name].path
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} cannot be read: {error}") from error
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} changed after the checkpoint was opened"
            )
        refuse_non_finite(tensor, name, str(path))
        return tensor

    def carried_dtype(self, name: str) -> torch.dtype:
        return self.dtype(name)

    def file_bytes(self, linears: Sequence[str]) -> int:
        return sum(entry.stop - entry.start for entry in map(self._entry, linears))

    def check_finite(self) -> None:
        """Read every tensor once, so that NaN and Inf are refused before expensive work."""
        for name in self._file_of:
            self.read(name)

    def fingerprint(self) -> str:
        """A key for caches: sha256 of config, headers, file sizes, and both ends of every tensor.

        Two checkpoints that differ only in the middle of tensors share it; training, merging and
        converting change the ends too.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for header in sorted(self.files, key=lambda header: header.path.name):
            digest.update(f"{header.path.name} {header.file_bytes}\n".encode())
            with header.path.open("rb") as file:
                for name, entry in sorted(header.tensors.items()):
                    digest.update(f"{name} {entry}\n".encode())
                    for start in (entry.start, max(entry.start, entry.stop - SAMPLE_BYTES)):
                        file.seek(start)
                        digest.update(file.read(min(SAMPLE_BYTES, entry.stop - start)))
        return digest.hexdigest()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return self._file_of[name].tensors[name]


def refuse_non_finite(tensor: Tensor, name: str, where: str) -> None:
    """CheckpointError with the count where a float tensor holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    n_bad = 0
    for part in tensor.reshape(-1).split(CHECKED_AT_ONCE):
        # isfinite knows no 8-bit floats
        values = part.float() if part.dtype.itemsize == 1 else part
        n_bad += values.numel() - int(torch.isfinite(values).sum())
    if n_bad:
        raise CheckpointError(
            f"{where}: tensor {name!r} holds {n_bad} NaN or Inf among {tensor.numel()} values"
        )


def _refuse_packed_blocks(folder: Path, file_of: Mapping[str, Header]) -> None:
    """Weights saved after unpacking a GGUF file are plain floats; its blocks would be uint8."""
    for name, header in file_of.items():
        dtype = header.tensors[name].dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{folder}: quantization_config says gguf and tensor {name!r} is {dtype}; "
                "give the float checkpoint or the .gguf file itself"
            )


def _read_shards(folder: Path) -> dict[str, Header]:
    """The header of the file that holds each tensor, by tensor name."""
    # The order of transformers: a single file wins over an index.
    if member(folder, SINGLE).is_file():
        header = read_header(folder / SINGLE)
        found = dict.fromkeys(header.tensors, header)
    elif member(folder, INDEX).is_file():
        found = _read_index(folder)
    else:
        pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern)]
        hint = f"{min(pickles)} is pickle, and " if pickles else ""
        raise CheckpointError(
            f"{folder}: has neither {SINGLE} nor {INDEX}; {hint}only safetensors is read"
        )
    if not found:
        raise CheckpointError(f"{folder}: its safetensors hold no tensors")
    return found


def _read_index(folder: Path) -> dict[str, Header]:
    where = folder / INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{where}: 'weight_map' is not an object of file names")
    found: dict[str, Header] = {}
    for file in sorted(set(weight_map.values())):
        path = member(folder, file)
        if not path.is_file():
            n_lost = sum(shard == file for shard in weight_map.values())
            raise CheckpointError(f"{where}: names {file!r} for {n_lost} tensors; no such file")
        header = read_header(path)
        for name in header.tensors:
            if name in found:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {found[name].path.name} and in {file}"
                )
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{where}: tensor {name!r} is in {file}, the index says {weight_map.get(name)}"
                )
            found[name] = header
    for name in weight_map:
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name!r} is not in {weight_map[name]!r}")
    return {name: found[name] for name in weight_map}
