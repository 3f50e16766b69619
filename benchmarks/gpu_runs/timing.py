"""Times on a GPU: medians by events, of CUDA graphs where Python would be what is measured."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPH_SECONDS = 3e-3  # that a graph should last, so that its launch and the clock do not count
WARM_SECONDS = 0.05  # of replays, after which the GPU's clocks are up
REPLAYS = 20
COPIED_BYTES = 2**30
SQUARE = 8192

Call = Callable[[], object]


@dataclass(frozen=True)
class Roofs:
    """What the GPU reaches where nothing but memory, or nothing but products, is the limit."""

    copy_bandwidth: float  # bytes read and written a second
    matmul_rate: float  # bf16 operations a second


def measured_roofs() -> Roofs:
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    one, other = (
        torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    return Roofs(
        copy_bandwidth=2 * COPIED_BYTES / warm_time(lambda: target.copy_(source)),
        matmul_rate=2 * SQUARE**3 / warm_time(lambda: one @ other),
    )


def graph_time(calls: Sequence[Call]) -> float:
    """Seconds of one of the calls, in a CUDA graph that makes all of them over and over."""
    once = captured(calls)
    rounds = math.ceil(GRAPH_SECONDS / warm_time(once.replay))
    graph = once if rounds == 1 else captured(calls, rounds)
    return warm_time(graph.replay) / (rounds * len(calls))


def captured(calls: Sequence[Call], rounds: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of the calls, which have run once before: that compiles, loads, and reads tiles."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())  # where what they read may still be written
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def warm_time(run: Call) -> float:
    """As event_time(), when run() has kept the GPU busy for a while."""
    stop = time.monotonic() + WARM_SECONDS
    while time.monotonic() < stop:
        run()
        torch.cuda.synchronize()
    return event_time(run)


def event_time(run: Call, n: int = REPLAYS) -> float:
    """Median seconds of run(), by events."""
    times = []
    for _ in range(n):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)


def beyond_cache(tensor: Tensor) -> list[Tensor]:
    """As many copies as are twice the L2 cache, and at least two.

    Calls that take turns with them find none in the cache, as the layers of a model do.
    """
    cache_bytes = torch.cuda.get_device_properties(tensor.device).L2_cache_size
    n = max(2, math.ceil(2 * cache_bytes / tensor.nbytes))
    return [tensor.clone() for _ in range(n)]
