"""Progress reporting: one callback through the library, one stderr renderer for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

# (stage, item, done, total): "quantize", "model.layers.3", 4, 30
Progress = Callable[[str, str, int, int], None]


def silent(stage: str, item: str, done: int, total: int) -> None:
    """Report nothing; the default of every library function."""


def clock(seconds: float) -> str:
    """
    >>> clock(3725.4), clock(42)
    ('1:02:05', '0:42')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class StderrProgress:
    """Writes stage, item, elapsed and remaining time to stderr; one live line on a terminal,
    otherwise a plain line at most every `interval` seconds so that logs stay readable."""

    def __init__(self, interval: float = 10.0) -> None:
        self._interval = interval
        self._stage = ""
        self._start = self._last = 0.0

    def __call__(self, stage: str, item: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._last = stage, now, 0.0
        live = sys.stderr.isatty()
        finished = done >= total
        if not (finished or live or now - self._last >= self._interval):
            return
        self._last = now
        elapsed = now - self._start
        remaining = clock(elapsed / done * (total - done)) if done else "?"
        line = f"{stage:<12} {done:>4}/{total} {item}  elapsed {clock(elapsed)}"
        if not finished:
            line += f"  remaining {remaining}"
        end = "\n" if finished or not live else ""
        print(("\r\x1b[K" if live else "") + line, end=end, file=sys.stderr, flush=True)
