"""Compiled kernels on disk, so that a machine compiles each kind once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from lwquant.ops.cuda.nvrtc import SOURCES, Kind, compile_kernels, options, version


def folder() -> Path:
    """Where they are: lwquant/cuda in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lwquant" / "cuda"


def compiled(kind: Kind, architecture: str) -> bytes:
    """Machine code from the cache, or compiled now and put there."""
    path = folder() / f"{kind.label}-{architecture}-{_fingerprint(kind, architecture)}.cubin"
    if path.exists():
        return path.read_bytes()
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


SOURCE_SUFFIXES = (".cu", ".cuh", ".h", ".inc")


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
