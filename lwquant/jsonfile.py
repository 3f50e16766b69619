"""Reading and writing the small JSON files of each stage, with a format name and a version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwquant.errors import OutputError, PlanError


def write_json(path: Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write aside, then rename, so that a reader never sees half a file."""
    text = json.dumps({"format": kind, "version": version, **body}, indent=1, ensure_ascii=False)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error}") from error


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The file's body; PlanError when it is missing, not JSON, or of another kind or version."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error
    if not isinstance(body, dict) or body.get("format") != kind:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise PlanError(f"{path} is not a {kind} file (format: {found!r})")
    if body.get("version") != version:
        raise PlanError(f"{path} has version {body.get('version')!r}, this lwquant reads {version}")
    return body
