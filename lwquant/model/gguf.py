"""GGUF input: transformers unpacks the file into a float32 model, which serves as a checkpoint.

This is the one source that holds the whole model in memory; safetensors are read tensor by tensor.
What is not quantized (embeddings, head) was packed in the file, so 16 bits carry it to the output.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lwquant.errors import CheckpointError
from lwquant.model.checkpoint import SAMPLE_BYTES, refuse_non_finite

MAGIC = b"GGUF"
EXTRAS = ("gguf", "accelerate")
# What says where a model came from or how it was stored, not what it is.
LEFTOVERS = ("quantization_config", "gguf_file", "_name_or_path", "_model_name_or_path")


@dataclass(frozen=True)
class GgufCheckpoint:
    """A GGUF file as transformers sees it: names and shapes of its model, values in float32."""

    path: Path
    config: dict[str, object]
    size_bytes: int
    matrix_bytes: int  # of the matrices inside blocks, as the file packs them
    carried_as: torch.dtype  # of the matrices outside blocks
    _tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Unpack the file; CheckpointError where it is missing, cut short or of an unknown kind."""
        _require_extras(path)
        matrix_bytes, carried_as = _packing(_check_whole(path))
        model = _load(path)
        tensors = dict(_untied(model.state_dict()))
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{path}: tensor {name!r} came out as {tensor.dtype}")
        size = path.stat().st_size
        return cls(path, _clean_config(model), size, matrix_bytes, carried_as, tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(self, name: str) -> Tensor:
        """A copy of the tensor `name`; CheckpointError where it holds NaN or Inf."""
        tensor = self._tensor(name)
        refuse_non_finite(tensor, name, str(self.path))
        return tensor.clone()

    def carried_dtype(self, name: str) -> torch.dtype:
        """The file's own float, or float16 for packed matrices unless a value overflows it."""
        tensor = self._tensor(name)
        if tensor.ndim < 2 or tensor.abs().max() > torch.finfo(self.carried_as).max:
            return tensor.dtype
        return self.carried_as

    def file_bytes(self, linears: Sequence[str]) -> int:
        return self.matrix_bytes

    def check_finite(self) -> None:
        for name, tensor in self._tensors.items():
            refuse_non_finite(tensor, name, str(self.path))

    def fingerprint(self) -> str:
        """A key for caches: sha256 of config, names, shapes, and both ends of every tensor."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            values = tensor.reshape(-1)
            n_sampled = SAMPLE_BYTES // tensor.itemsize
            for part in (values[:n_sampled], values[-n_sampled:]):
                digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return self._tensors[name]


def _require_extras(path: Path) -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{path}: reading GGUF needs {' and '.join(missing)}: pip install 'lwquant[gguf]'"
        )


def _check_whole(path: Path) -> Any:
    """The file's reader; every tensor that the file announces lies inside it."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise CheckpointError(f"{path}: is not GGUF: it starts with {magic!r} instead of {MAGIC!r}")
    try:
        # The reader maps the whole file and slices it; what lies past the end fails in many ways.
        return GGUFReader(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: truncated or damaged GGUF ({path.stat().st_size} bytes): {error}"
        ) from error


def _packing(reader: Any) -> tuple[int, torch.dtype]:
    """Bytes of the matrices inside blocks, and the float type for the matrices outside."""
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    inside = [tensor for tensor in matrices if tensor.name.startswith("blk.")]
    outside = {t.tensor_type.name for t in matrices if not t.name.startswith("blk.")}
    floats = {"F32": torch.float32, "BF16": torch.bfloat16}
    widest = next((dtype for name, dtype in floats.items() if name in outside), torch.float16)
    return sum(int(tensor.n_bytes) for tensor in inside), widest


def _load(path: Path) -> Any:
    settings: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer transformers would keep the blocks packed where it has a kernel for them.
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, **settings
        )
    except Exception as error:  # every reason not to load is the file's
        raise CheckpointError(f"{path}: transformers cannot load this GGUF: {error}") from error


def _untied(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, each memory once: a tied head comes after its embedding."""
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            yield name, tensor.detach()


def _clean_config(model: Any) -> dict[str, object]:
    # Through JSON, so that it equals what a config.json would give.
    config = json.loads(model.config.to_json_string())
    for key in LEFTOVERS:
        config.pop(key, None)
    return {**config, "architectures": [type(model).__name__], "dtype": "float32"}
