"""The small files of a model folder: which paths lie inside it and what its config.json says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from lwquant.errors import CheckpointError

CONFIG = "config.json"


def read_config(folder: Path) -> dict[str, object]:
    """The checked config.json of `folder`; CheckpointError where it is missing or unusable."""
    path = member(folder, CONFIG)
    if not path.is_file():
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; for GGUF input give the file itself, e.g. {folder / gguf[0]}" if gguf else ""
        raise CheckpointError(f"{folder}: has no {CONFIG}{hint}")
    config = read_json(path)
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, object], where: str) -> None:
    """CheckpointError where the config names no architecture or describes quantized weights.

    The method "gguf" passes: transformers leaves it behind when it unpacks a GGUF file into plain
    floats, so the tensors decide (see Checkpoint.open).
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(f"{where}: names no architecture (key 'architectures')")
    if not all(isinstance(name, str) and name for name in architectures):
        raise CheckpointError(f"{where}: 'architectures' holds {architectures!r}, not class names")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{where}: names no 'model_type'")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            method = _method(part.get(key))
            if method is not None and (method != "gguf" or part is not config):
                raise CheckpointError(
                    f"{where}: the checkpoint is already quantized ({key}: {method}); "
                    "give the float checkpoint it was made from"
                )


def _method(quantization: object) -> str | None:
    if quantization is None:
        return None
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unnamed method"))
    return str(quantization)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`; CheckpointError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def member(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refused where it lies outside.

    A symlink may leave the folder only the way the hub cache does it: from snapshots/<commit>/ into
    the blobs/ folder beside snapshots/.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise CheckpointError(f"{folder}: the path {name!r} leaves the folder")
    path, root = folder / pure, folder.resolve()
    if path.resolve().is_relative_to(root):
        return path
    if path.is_symlink() and path.parent.resolve().is_relative_to(root):
        # One step only: a blob may itself be a link into the hub's store shared between caches.
        target = Path(os.path.normpath(path.parent.resolve() / path.readlink()))
        if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
            return path
    raise CheckpointError(f"{folder}: {name!r} is a link to {path.resolve()}, outside the folder")
