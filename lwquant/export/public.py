"""What of a result folder may leave this machine: all of it, without the paths of this machine.

A path tells user names, clients and mounts. So of every path that is absolute, starts at a home
folder or climbs out of the working folder, only the last component is published; names below the
working folder and Hub ids stay as they were typed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwquant.errors import OutputError
from lwquant.export.folder import MANIFEST
from lwquant.export.record import EVALUATION_FILE, RUN_FILE

# Our own records: any string in them may be, or may quote, a path.
RECORDS = (RUN_FILE, EVALUATION_FILE, "plan.json", "sensitivity.json")

# Files of transformers hold text that only looks like paths (chat templates, vocabularies); they
# name where the model was loaded from under SOURCE_KEYS.
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
SOURCE_KEYS = ("_name_or_path", "name_or_path")

# Under these keys the whole string is the path, blanks and all.
PATH_KEYS = (*SOURCE_KEYS, "base_model", "model", "source", "text")

_START = r"(?:(?:file://)?/+|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\|\.\.[/\\])"
_WHOLE = re.compile(rf"{_START}.+", re.DOTALL)
# In running text: a quoted path, or one up to the next blank or bracket. Not preceded by a letter
# ("user/name"), nor by what makes it the rest of a URL ("https://...").
_QUOTED = re.compile(rf"(['\"])({_START}.*?)\1")
_BARE = re.compile(
    rf"(?:(?<![\w./\\:~-])|(?<=:)(?!//)){_START}(?:\\ |,(?=\S)|[^\s'\"`,;()<>|\[\]{{}}])+"
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form "user/name"; a local model is recorded as an absolute path.

    >>> is_hub_id("HuggingFaceTB/SmolLM2-135M"), is_hub_id("/data/SmolLM2-135M"), is_hub_id("smol")
    (True, False, False)
    """
    return _HUB_ID.fullmatch(model) is not None


def mask(text: str) -> str:
    """`text` with only the last component of every path that tells of this machine.

    >>> mask("lwquant quantize /home/ann/models/smol --bpw 3.5 --output=~/out user/name ./x/y")
    'lwquant quantize smol --bpw 3.5 --output=out user/name ./x/y'
    >>> mask("see https://huggingface.co/a/b, read '/data/my texts/a.txt' at 3 tokens / s")
    "see https://huggingface.co/a/b, read 'a.txt' at 3 tokens / s"
    """
    text = _QUOTED.sub(lambda found: found[1] + _last(found[2]) + found[1], text)
    return _BARE.sub(lambda found: _last(found[0]), text)


def mask_path(value: str) -> str:
    """`value`, or its last component where all of it is a path that tells of this machine.

    >>> mask_path("/home/ann lee/models/smol"), mask_path("user/name")
    ('smol', 'user/name')
    """
    return _last(value) if _WHOLE.fullmatch(value) else value


def public_files(folder: Path) -> dict[str, Path | bytes]:
    """Everything that is published of a verified folder, by name: weights as paths, the rest read.

    Only files of the manifest are in it, and the manifest itself is not: `public_manifest` makes
    the one that fits. OutputError where a file is no longer what the manifest says.
    """
    files: dict[str, Path | bytes] = {}
    for name, record in manifest(folder).items():
        path = folder / name
        if path.suffix == ".safetensors":
            files[name] = path
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise OutputError(f"{path}: was changed while it was being read")
        files[name] = _masked_file(name, content)
    return files


def public_manifest(folder: Path, files: Mapping[str, Path | bytes]) -> bytes:
    """The manifest of `files` in the form of `write_manifest`; a path keeps its recorded sum."""
    known = manifest(folder)
    records = {
        name: known[name]
        if isinstance(content, Path)
        else {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
    }
    return (json.dumps({"files": records}, indent=2) + "\n").encode()


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file of a verified folder, by name."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


def _masked_file(name: str, content: bytes) -> bytes:
    if name not in (*RECORDS, *CONFIGS):
        return content
    try:
        values = json.loads(content)
    except ValueError as error:
        raise OutputError(f"{name}: is not JSON: {error}") from error
    masked = _masked(values, everywhere=name in RECORDS)
    if masked == values:
        return content
    return (json.dumps(masked, indent=2, ensure_ascii=False) + "\n").encode()


def _masked(value: Any, everywhere: bool, key: str = "") -> Any:
    if isinstance(value, str):
        if key in (PATH_KEYS if everywhere else SOURCE_KEYS):
            value = mask_path(value)
        return mask(value) if everywhere else value
    if isinstance(value, list):
        return [_masked(item, everywhere, key) for item in value]
    if isinstance(value, dict):
        return {name: _masked(item, everywhere, name) for name, item in value.items()}
    return value


def _last(path: str) -> str:
    """
    >>> _last("/a/b/"), _last("C:\\\\Users\\\\ann"), _last("/")
    ('b', 'ann', '/')
    """
    return re.split(r"[/\\]+(?! )", path.rstrip("/\\"))[-1] or "/"
