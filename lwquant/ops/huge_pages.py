"""Memory for weights that are read from start to end in every call: in huge pages where there are.

With pages of 4 KB a core spends much of a matmul at one token on finding them: on the machine this
was written on it reads 16 GB/s so, 31 GB/s from pages of 2 MB. Layers of small models are smaller
than such a page, so layers share chunks; a chunk is given back when the last of its tensors is.
"""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2**21
CHUNK = 16 * HUGE_PAGE  # what is not yet used of one takes no memory
ALIGNMENT = 64

_lock = threading.Lock()
_free: Tensor | None = None  # the rest of the newest chunk


def empty_bytes(n: int) -> Tensor:
    """(n,) uint8, uninitialized, aligned to 64 bytes."""
    global _free
    size = -(-n // ALIGNMENT) * ALIGNMENT
    with _lock:
        if size > CHUNK // 2:
            return _chunk(size)[:n]
        if _free is None or _free.numel() < size:
            _free = _chunk(CHUNK)
        taken, _free = _free[:n], _free[size:]
    return taken


def _chunk(size: int) -> Tensor:
    """A whole number of huge pages, at least `size` bytes, starting on one."""
    n_pages = -(-size // HUGE_PAGE)
    # Private: shared memory, which is Python's default, has huge pages on few machines only.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, (n_pages + 1) * HUGE_PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + n_pages * HUGE_PAGE]
