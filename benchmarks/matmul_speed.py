"""Time the packed matmul beside torch's bf16 F.linear, in microseconds a call.

Every candidate is checked against a float64 product before it is timed. Rounds are interleaved,
and each call takes the next of a pool of weights larger than the L3 cache, as a model would.
Compare only inside one table.

    python benchmarks/matmul_speed.py [--tokens 1,8,512] [--threads N] [--isa NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant import ops
from lwquant.types import WIDTHS, row_words

SHAPES = ((4096, 4096), (576, 1536))  # (out_features, in_features)
POOL_BYTES = 64 * 2**20  # twice the L3 cache of the machine this was written on
CALLS_BYTES = 16 * 2**20  # weights read in one timed stretch, so that short calls are not noise

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to multiply, and its pool of weights."""

    name: str
    weight_bytes: int
    calls: list[Call]
    dense: Tensor  # (out_features, in_features): the weight of calls[0]


@dataclass(frozen=True)
class Row:
    """One line of the table; times are microseconds a call."""

    out_features: int
    in_features: int
    tokens: int
    name: str
    best: float
    median: float
    gb_per_s: float  # of packed weight, at the best time


def pool_size(weight_bytes: int) -> int:
    return max(2, -(-POOL_BYTES // weight_bytes))


def bf16_candidate(out_features: int, in_features: int) -> Candidate:
    size = 2 * out_features * in_features
    weights = [torch.randn(out_features, in_features).bfloat16() for _ in range(pool_size(size))]
    calls: list[Call] = [lambda x, w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]
    return Candidate("bf16", size, calls, weights[0])


def packed_candidate(out_features: int, in_features: int, bits: int, group_size: int) -> Candidate:
    """Random words are valid codes at every width."""
    n_groups = -(-in_features // group_size)
    code_words, zero_words = row_words(in_features, bits), row_words(out_features, bits)
    size = 4 * out_features * code_words + 2 * out_features * n_groups + 4 * n_groups * zero_words

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32)

    layers = [
        (
            words(out_features, code_words),
            (torch.rand(out_features, n_groups) + 0.5).half(),
            words(n_groups, zero_words),
        )
        for _ in range(pool_size(size))
    ]
    calls: list[Call] = [
        lambda x, layer=layer: ops.linear(x, *layer, None, bits, group_size)  # type: ignore[misc]
        for layer in layers
    ]
    dense = ops.dequantize(*layers[0], bits, group_size, in_features)
    return Candidate(f"{bits} bits", size, calls, dense)


def check(candidate: Candidate, x: Tensor) -> None:
    """A bf16 result is within 2⁻⁸ of each value; allow four times that of the largest."""
    expected = x.double() @ candidate.dense.double().T
    error = (candidate.calls[0](x).double() - expected).abs().max() / expected.abs().max()
    if not error < 2**-6:
        raise SystemExit(f"{candidate.name}: wrong result, relative error {error:.3g}")


def time_all(candidates: list[Candidate], x: Tensor, rounds: int) -> list[list[float]]:
    """Seconds a call, (candidates, rounds)."""
    endless = [itertools.cycle(c.calls) for c in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for candidate, calls, found in zip(candidates, endless, times, strict=True):
            n_calls = max(1, CALLS_BYTES // candidate.weight_bytes) if x.shape[0] < 64 else 1
            batch = [next(calls) for _ in range(n_calls)]
            start = time.perf_counter()
            for call in batch:
                call(x)
            found.append((time.perf_counter() - start) / n_calls)
    return times


def measure(tokens: list[int], group_size: int, rounds: int) -> list[Row]:
    rows = []
    for out_features, in_features in SHAPES:
        candidates = [bf16_candidate(out_features, in_features)] + [
            packed_candidate(out_features, in_features, bits, group_size) for bits in WIDTHS
        ]
        for n_tokens in tokens:
            x = torch.randn(n_tokens, in_features).bfloat16()
            for candidate in candidates:
                check(candidate, x)
            for candidate, times in zip(candidates, time_all(candidates, x, rounds), strict=True):
                best = min(times)
                rate = candidate.weight_bytes / best / 1e9
                row = (best * 1e6, statistics.median(times) * 1e6, rate)
                rows.append(Row(out_features, in_features, n_tokens, candidate.name, *row))
    return rows


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": model or platform.processor(),
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
    }


def print_table(rows: list[Row]) -> None:
    print("out x in       tokens  weight      best us   median us    GB/s   bf16 / this")
    base = 0.0
    for row in rows:
        base = row.best if row.name == "bf16" else base
        shape = f"{row.out_features} x {row.in_features}"
        print(
            f"{shape:14} {row.tokens:6}  {row.name:8} {row.best:10.1f} {row.median:11.1f}"
            f" {row.gb_per_s:7.1f} {base / row.best:12.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the packed matmul beside bf16 F.linear.")
    parser.add_argument("--tokens", default="1,8,512", help="numbers of tokens, comma-separated")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=ops.isa(), help=f"one of {ops.available_isas()}")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ops.set_isa(arguments.isa)
    about = machine()
    print("  ".join(f"{key}={value}" for key, value in about.items()))
    tokens = [int(n) for n in arguments.tokens.split(",")]
    rows = measure(tokens, arguments.group_size, arguments.rounds)
    print_table(rows)
    if arguments.json:
        result = {"machine": about, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
