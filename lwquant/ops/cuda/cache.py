"""Compiled kernels on disk, so that a machine compiles each kind once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from lwquant.ops.cuda.nvrtc import SOURCES, Kind, compile_kernels, options, version

ELF = b"\x7fELF"  # what machine code begins with
SOURCE_SUFFIXES = (".cu", ".cuh", ".h", ".inc")


def folder() -> Path | None:
    """Where they are: lwquant/cuda in the user's cache folder. None: nobody knows of a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "lwquant" / "cuda"
    except RuntimeError:
        return None


def compiled(kind: Kind, architecture: str) -> bytes:
    """Machine code from the cache, or compiled now and put there."""
    where = folder()
    if where is None:
        return compile_kernels(kind, architecture).code
    path = where / f"{kind.label}-{architecture}-{_fingerprint(kind, architecture)}.cubin"
    code = _read(path)
    if code is None:
        code = compile_kernels(kind, architecture).code
        _write(path, code)
    return code


def _fingerprint(kind: Kind, architecture: str) -> str:
    """Of all that machine code depends on: sources, options and compiler."""
    digest = hashlib.sha256(version().encode())
    for text in options(kind, architecture):
        digest.update(text.encode())
    for source in sorted(p for p in SOURCES.parent.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> bytes | None:
    """What is there, unless it is no machine code: the driver is not told where code ends."""
    try:
        code = path.read_bytes()
    except OSError:
        return None
    return code if code[: len(ELF)] == ELF else None


def _write(path: Path, code: bytes) -> None:
    """Whole or not at all; a folder that cannot be written to only costs compiling again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        Path(name).replace(path)
    except OSError:
        return
