"""The reference's predictions, computed once for a text and kept on disk.

What is kept is the output of the last block, not log-probabilities: through the head it determines
them exactly, and it is smaller by vocabulary / hidden size (85 times for SmolLM2-135M).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwquant.capture.tokens import token_hash
from lwquant.evaluation.measure import Predictions
from lwquant.progress import Progress, silent

CACHE_FOLDER = Path("~/.cache/lwquant/reference")
CACHE_BYTES = 10**9
VERSION = 1  # of the meaning of a cache file


class ReferenceModel(Protocol):
    """What is needed of the reference; `Decoder` has it."""

    def fingerprint(self) -> str: ...
    def last_hidden(self, tokens: Tensor, progress: Progress = silent) -> Tensor:
        """(n, seq_len, hidden) of tokens (n, seq_len)."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (1, m, vocab) of (1, m, hidden)."""
        ...


def reference_predictions(
    model: ReferenceModel,
    tokens: Tensor,
    *,
    cache: Path | None = CACHE_FOLDER,
    limit_bytes: int = CACHE_BYTES,
    progress: Progress = silent,
) -> Predictions:
    """The model's predictions on windows (n, seq_len), from the cache where it has them.

    Args:
        cache: folder, made when missing; None keeps nothing on disk.
        limit_bytes: of all files in it together; those unused for longest are removed first.

    A file that is damaged in any way is made again. A folder that cannot be written only costs
    the time next time, and progress says so.
    """
    if cache is None:
        return Predictions(model.last_hidden(tokens, progress), model.head)
    path = cache.expanduser() / f"{_key(model, tokens)}.safetensors"
    hidden = _load(path)
    if hidden is None:
        hidden = model.last_hidden(tokens, progress)
        try:
            _store(path, hidden, limit_bytes)
        except OSError as error:
            progress("reference", f"not cached in {path.parent}: {error.strerror}", 1, 1)
    return Predictions(hidden, model.head)


def _key(model: ReferenceModel, tokens: Tensor) -> str:
    parts = (VERSION, transformers.__version__, model.fingerprint(), token_hash(tokens))
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _load(path: Path) -> Tensor | None:
    """The hidden states of a whole and undamaged cache file, None for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            hidden = file.get_tensor("hidden")
            expected = (file.metadata() or {}).get("sha256")
        if _sha256(hidden) != expected:
            return None
        path.touch()  # used now, so removed late
    except (OSError, SafetensorError):
        return None
    return hidden


def _store(path: Path, hidden: Tensor, limit_bytes: int) -> None:
    """Write aside, then rename, after making room; nothing where it alone exceeds the limit."""
    hidden = hidden.detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    room = limit_bytes - hidden.nbytes - 1024  # the header
    if room < 0:
        return
    _shrink(path.parent, room)
    partial = path.with_suffix(".partial")
    try:
        save_file({"hidden": hidden}, partial, metadata={"sha256": _sha256(hidden)})
        partial.replace(path)
    except SafetensorError as error:  # how save_file reports a full disk
        raise OSError(0, str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def _shrink(folder: Path, limit_bytes: int) -> None:
    """Remove the files unused for longest until all together have at most `limit_bytes`."""
    files = [
        (path.stat(), path) for path in (*folder.glob("*.safetensors"), *folder.glob("*.partial"))
    ]
    total = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
        if total <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def _sha256(tensor: Tensor) -> str:
    view = tensor.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(view.data).hexdigest()
