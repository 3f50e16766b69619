"""The roofs of one core in this run: probes.cpp, compiled here."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("probes.cpp")
AHEAD = (0, 2048, 6144, 16384)  # bytes fetched ahead; which is best differs between machines
INT8_ROUNDS = 500_000


@dataclass(frozen=True)
class Roofs:
    """What all threads together reached at best."""

    bytes_per_second: float
    int8_per_second: float  # a product and its addition are two

    def microseconds(self, n_bytes: int, operations: int) -> float:
        """The least that reading so much and multiplying so much can take."""
        return 1e6 * max(n_bytes / self.bytes_per_second, operations / self.int8_per_second)


class Probes:
    """Probed again and again between the rounds of a measurement."""

    def __init__(self, work: Path, n_bytes: int, threads: int, with_amx: bool) -> None:
        """`n_bytes` should be what one candidate's pool takes: the same share of the caches.

        Without `with_amx` the int8 rate is that of vectors, as on a processor that has no tiles.
        """
        work.mkdir(parents=True, exist_ok=True)
        path = work / "probes.so"
        how = ["-O3", "-march=native", *([] if with_amx else ["-mno-amx-int8"])]
        subprocess.run(["g++", *how, "-shared", "-fPIC", "-o", path, SOURCE], check=True)
        self._library = ctypes.CDLL(str(path))  # its calls release the GIL
        self._library.probe_buffer.restype = ctypes.c_void_p
        self._library.probe_buffer.argtypes = [ctypes.c_size_t]
        self._library.probe_read.restype = ctypes.c_double
        self._library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._library.probe_int8.restype = ctypes.c_double
        self._library.probe_int8.argtypes = [ctypes.c_int64]
        self._share = n_bytes // threads
        self._buffers = [self._library.probe_buffer(self._share) for _ in range(threads)]
        if not all(self._buffers):
            raise MemoryError(f"no memory for a probe of {n_bytes} bytes")
        self._threads = ThreadPoolExecutor(threads)
        self._found: list[Roofs] = []

    def probe(self) -> None:
        """A pass over the buffers for each distance, and some milliseconds for the int8 rate."""
        reads = [
            sum(self._threads.map(self._library.probe_read, self._buffers, *self._same(ahead)))
            for ahead in AHEAD
        ]
        operations = self._threads.map(self._library.probe_int8, [INT8_ROUNDS] * self._n_threads)
        self._found.append(Roofs(max(reads), sum(operations)))

    def roofs(self) -> Roofs:
        """The best since the last call."""
        found, self._found = self._found, []
        return Roofs(
            max(roofs.bytes_per_second for roofs in found),
            max(roofs.int8_per_second for roofs in found),
        )

    def _same(self, ahead: int) -> tuple[list[int], list[int]]:
        return [self._share] * self._n_threads, [ahead] * self._n_threads

    @property
    def _n_threads(self) -> int:
        return len(self._buffers)
