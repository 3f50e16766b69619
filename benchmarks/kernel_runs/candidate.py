"""One way to multiply, with a pool of weights that does not fit the caches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

Shape = tuple[int, int]  # (out_features, in_features)
Call = Callable[[], Tensor]  # -> (tokens, out_features), perhaps a view of reused memory

SMALLEST_POOL = 64 * 2**20
MEMORY_SHARE = 40  # a shape has some 35 candidates, each with a pool
DRAWN_ROWS = 64  # of a peer's weight that are really quantized; the others repeat them


@dataclass(frozen=True)
class Candidate:
    """`bind(x, n)` gives a call for each of n weights of the pool at most, all on the same x.

    x is (tokens, in_features) float32; a call may take it in bf16.
    """

    name: str
    bits: int  # the width it is compared at
    weight_bytes: int  # that one call reads
    bind: Callable[[Tensor, int], list[Call]]
    # (out_features, in_features): what the first weight of the pool stands for, made when it is
    # asked for, as it is several times as large as the weight.
    dense: Callable[[], Tensor]
    # Of the largest output, for the check before the timing, by the number of tokens.
    tolerance: Callable[[int], float]
    activation_bits: int = 0  # 0: a peer's, which do not matter here


def always(tolerance: float) -> Callable[[int], float]:
    return lambda n_tokens: tolerance


@cache
def pool_bytes() -> int:
    """A quarter more than the last cache holds; less where memory for all pools is short."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    match = re.fullmatch(r"(\d+)K", path.read_text().strip()) if path.exists() else None
    l3_bytes = int(match[1]) * 1024 if match else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(SMALLEST_POOL, l3_bytes * 5 // 4), memory // MEMORY_SHARE)


def pool_size(weight_bytes: int) -> int:
    """How many weights make a pool."""
    return max(2, -(-pool_bytes() // weight_bytes))


def repeated_rows(drawn: Tensor, n_rows: int) -> Tensor:
    """(n_rows, ..) of the rows of `drawn`, again and again."""
    times = -(-n_rows // len(drawn))
    return drawn.repeat(times, *[1] * (drawn.dim() - 1))[:n_rows].contiguous()
