"""What was measured so far: printed at once, and in a JSON file that is whole after every row."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rows import commit, machine

from lwquant.errors import LwquantError
from lwquant.ops.cuda import nvrtc


class GpuLost(Exception):
    """No call of this process reaches the GPU any more, as after an access outside its memory."""


class Report:
    def __init__(self, file: Path | None, header: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {"header": header, "errors": []}
        for name, value in header.items():
            print(f"{name}: {value}", flush=True)
        self._write()

    @property
    def has_errors(self) -> bool:
        return bool(self._content["errors"])

    def add(self, part: str, row: Any, text: str) -> None:
        """One more row, a dataclass, of a part."""
        self._content.setdefault(part, []).append(asdict(row))
        self._show(text)

    def put(self, part: str, value: Any, text: str) -> None:
        self._content[part] = value
        self._show(text)

    def error(self, what: str, error: str, trace: str = "") -> None:
        self._content["errors"].append({"what": what, "error": error, "trace": trace})
        self._show(f"FAILED {what}: {error.splitlines()[0]}")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Records what is raised inside and goes on; GpuLost where nothing can follow."""
        try:
            yield
        except GpuLost:
            raise
        except Exception as error:
            self.error(what, f"{type(error).__name__}: {error}", traceback.format_exc())
            # A capture that failed may have left its own stream current.
            torch.cuda.set_stream(torch.cuda.default_stream())
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise GpuLost(str(lost)) from lost

    def _show(self, text: str) -> None:
        print(text, flush=True)
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        new = self._file.with_name(f"{self._file.name}.new")
        new.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        new.replace(self._file)


def header(given_commit: str | None) -> dict[str, str]:
    """What a number from a GPU carries."""
    return {
        "card": torch.cuda.get_device_name(0),
        "driver": _driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "NVRTC": _nvrtc(),
        "commit": given_commit or _commit(),
        "machine": machine(),
        "command": shlex.join(sys.argv),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else "unknown"


def _nvrtc() -> str:
    try:
        return nvrtc.version()
    except LwquantError:
        return "missing"


def _commit() -> str:
    """A copy of the code has no history, and its machine perhaps no git."""
    try:
        found = commit()
    except OSError:
        return "unknown"
    return "unknown" if found.startswith("-") or not found else found
