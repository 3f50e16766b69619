"""A result folder appears whole or not at all, and can prove later that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwquant.errors import CheckpointError, OutputError
from lwquant.model.model_folder import member, read_json
from lwquant.model.safetensors_header import read_header

MANIFEST = "lwquant_manifest.json"


def check_output(output: str | Path, overwrite: bool = False) -> None:
    """OutputError where a result could not be put at `output`; changes nothing.

    The path must be free or an empty folder, its parent an existing folder that can be written.
    With `overwrite` it may also be an earlier result of ours, known by its manifest.
    """
    output = Path(output).resolve()
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: exists and is not a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise OutputError(f"{output}: exists and is not empty")
        if not (output / MANIFEST).is_file():
            raise OutputError(f"{output}: is not overwritten: it has no {MANIFEST}, so is not ours")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: its parent {output.parent} is not an existing folder")
    # Only trying tells: permission bits do not bind root, and say nothing of read-only systems.
    _partial_folder(output).rmdir()


@contextmanager
def new_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `output`, which becomes `output` when the block succeeds.

    On any exception, Ctrl-C included, the hidden folder is removed and `output` is left as it was.
    A killed process can leave `.<name>.partial-*` behind, never `output`. OutputError as
    check_output says, or where another process made `output` meanwhile.
    """
    output = Path(output).resolve()
    check_output(output, overwrite)
    partial = _partial_folder(output)
    try:
        yield partial
        _publish(partial, output, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file in `folder`; call it last."""
    files = {name: _record(folder / name) for name in _files(folder)}
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def verify(folder: str | Path) -> None:
    """OutputError naming the first file that is missing, changed or not in the manifest.

    Hidden files are no part of a result: tools like the hub's client add their own.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise OutputError(f"{folder}: has no {MANIFEST}, so it is not a complete result")
    try:
        recorded = read_json(folder / MANIFEST).get("files")
        if not isinstance(recorded, dict) or not recorded:
            raise OutputError(f"{folder / MANIFEST}: lists no files")
        for name, record in sorted(recorded.items()):
            _check_file(folder, name, record)
    except CheckpointError as error:
        raise OutputError(str(error)) from error
    for name in _files(folder):
        if name not in recorded and not name.startswith("."):
            raise OutputError(f"{folder / name}: is not in {MANIFEST}")


def _check_file(folder: Path, name: str, record: object) -> None:
    path = member(folder, name)
    if not path.is_file():
        raise OutputError(f"{path}: is missing")
    if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
        raise OutputError(f"{folder / MANIFEST}: has no bytes and sha256 for {name!r}")
    n_bytes = path.stat().st_size
    if n_bytes != record["bytes"]:
        raise OutputError(f"{path}: has {n_bytes} bytes, {MANIFEST} says {record['bytes']}")
    if path.suffix == ".safetensors":
        read_header(path)
    if _record(path) != record:
        raise OutputError(f"{path}: was changed: its sha256 is not the one in {MANIFEST}")


def _files(folder: Path) -> list[str]:
    """Every file of the folder but the manifest, as sorted relative names with slashes."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.as_posix() != MANIFEST)


def _record(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _partial_folder(output: Path) -> Path:
    """A new hidden folder beside `output`, with the permissions of any new folder."""
    partial = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
    except OSError as error:
        raise OutputError(
            f"{output}: {output.parent} cannot be written: {error.strerror}"
        ) from error
    return partial


def _publish(partial: Path, output: Path, overwrite: bool) -> None:
    try:
        # A rename that survives a power cut must not outlive its data.
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        with _moved_aside(output, overwrite):
            partial.rename(output)  # atomic; fails where a non-empty folder appeared meanwhile
        _sync(output.parent)
    except OSError as error:
        raise OutputError(f"{output}: the result cannot be put there: {error.strerror}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _moved_aside(output: Path, overwrite: bool) -> Iterator[None]:
    """With `overwrite`, an old result steps aside: deleted after success, restored otherwise."""
    if not (overwrite and output.is_dir()):
        yield
        return
    aside = output.with_name(f".{output.name}.replaced-{secrets.token_hex(4)}")
    try:
        output.rename(aside)
        yield
    except BaseException:
        if aside.exists() and not output.exists():
            aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
