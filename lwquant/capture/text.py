"""Where calibration text comes from: a file, the interpreter's own English, or a dataset."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from lwquant.errors import CalibrationError

MAX_CHARACTERS = 4_000_000  # enough for any calibration set; tokenizing more only costs time
DATASET_PREFIX = "datasets:"
SELF = "self"
BUILTIN = "builtin"


def read_source(source: str) -> str:
    """The text that a source names, at most MAX_CHARACTERS of it.

    Args:
        source: "builtin", "datasets:NAME", "datasets:NAME,CONFIG", or the path of a text file.

    Raises CalibrationError for a missing, unreadable or empty source.
    """
    if source == BUILTIN:
        return builtin_english()
    if source.startswith(DATASET_PREFIX):
        return _dataset_text(source.removeprefix(DATASET_PREFIX))
    return read_text_file(Path(source))


def read_text_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"text file {path}: {error}") from error
    if not text.strip():
        raise CalibrationError(f"text file {path} is empty")
    return text


def builtin_english() -> str:
    """About 700 kB of English about Python that comes with every interpreter."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _dataset_text(name: str) -> str:
    from datasets import load_dataset  # slow to import, and only this source needs it

    path, _, config = name.partition(",")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
        if "text" not in columns:
            raise CalibrationError(f"dataset {name!r} has no column 'text', only {columns}")
        parts, length = [], 0
        for row in islice(rows, 100_000):
            parts.append(row["text"])
            length += len(row["text"])
            if length >= MAX_CHARACTERS:
                break
    except (OSError, ValueError, ConnectionError) as error:
        raise CalibrationError(f"dataset {name!r}: {error}") from error
    if not length:
        raise CalibrationError(f"dataset {name!r} holds no text")
    return "\n\n".join(parts)
