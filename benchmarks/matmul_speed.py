"""Time the packed matmul beside torch's bf16 F.linear, in microseconds a call.

Every candidate is checked against a float64 product before it is timed. Rounds are interleaved,
and each call takes the next of a pool of weights larger than the L3 cache, as a model would.
Compare only inside one table.

    python benchmarks/matmul_speed.py [--tokens 1,8,512] [--threads N] [--isa NAME] [--json FILE]
    python benchmarks/matmul_speed.py --tokens 1 --shapes 576x576 --write FILE

The second makes a table of decode times for `lwquant quantize --decode-times FILE`.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant import ops
from lwquant.decode_times import Shape, parse_shape, shape_label, write_decode_times
from lwquant.ops.scale_bytes import encode_scales
from lwquant.quantizers.grid import storable_scale
from lwquant.recipe import Recipe
from lwquant.scheme import SCALE_BITS, WIDTHS, QuantScheme, row_words

SHAPES = ((4096, 4096), (576, 1536))  # (out_features, in_features)
POOL_BYTES = 64 * 2**20  # twice the L3 cache of the machine this was written on
CALLS_BYTES = 16 * 2**20  # weights read in one timed stretch, so that short calls are not noise

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to multiply, and its pool of weights."""

    name: str
    label: str  # of its scheme
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
    label: str
    best: float
    median: float
    gb_per_s: float  # of packed weight, at the best time


def pool_size(weight_bytes: int) -> int:
    return max(2, -(-POOL_BYTES // weight_bytes))


def bf16_candidate(out_features: int, in_features: int) -> Candidate:
    size = 2 * out_features * in_features
    weights = [torch.randn(out_features, in_features).bfloat16() for _ in range(pool_size(size))]
    calls: list[Call] = [lambda x, w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]
    return Candidate("bf16", QuantScheme(16).label, size, calls, weights[0])


def packed_candidate(out_features: int, in_features: int, scheme: QuantScheme) -> Candidate:
    """Random words are valid codes at every width."""
    n_groups, bits = scheme.n_groups(in_features), scheme.bits
    code_words, zero_words = row_words(in_features, bits), row_words(out_features, bits)
    size = scheme.stored_bits(out_features, in_features) // 8

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32)

    def scales() -> Tensor:
        drawn = storable_scale(torch.rand(out_features, n_groups) + 0.5, scheme).half()
        return encode_scales(drawn) if scheme.scale_bits == 8 else drawn

    def zeros() -> Tensor:
        if scheme.fine_zeros:
            return torch.randint(256, (n_groups, out_features), dtype=torch.uint8)
        return words(n_groups, zero_words)

    if not ops.tiles_bytes(scheme, out_features, in_features):
        raise SystemExit(f"there is no kernel for scheme {scheme.label}")
    layers = [
        ops.make_tiles(scheme, in_features, words(out_features, code_words), scales(), zeros())
        for _ in range(pool_size(size))
    ]
    calls: list[Call] = [
        lambda x, tiles=tiles: ops.linear_tiled(x, tiles, None, out_features)  # type: ignore[misc]
        for tiles in layers
    ]
    dense = ops.dequantize_tiled(layers[0], out_features, in_features)
    return Candidate(f"{bits} bits", scheme.label, size, calls, dense)


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


def measure(
    shapes: Sequence[Shape], tokens: list[int], schemes: Sequence[QuantScheme], rounds: int
) -> list[Row]:
    rows = []
    for out_features, in_features in shapes:
        candidates = [bf16_candidate(out_features, in_features)] + [
            packed_candidate(out_features, in_features, scheme) for scheme in schemes
        ]
        for n_tokens in tokens:
            x = torch.randn(n_tokens, in_features).bfloat16()
            for candidate in candidates:
                check(candidate, x)
            for candidate, times in zip(candidates, time_all(candidates, x, rounds), strict=True):
                best = min(times)
                rate = candidate.weight_bytes / best / 1e9
                row = (best * 1e6, statistics.median(times) * 1e6, rate)
                names = candidate.name, candidate.label
                rows.append(Row(out_features, in_features, n_tokens, *names, *row))
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


def write_times(rows: list[Row], about: dict[str, object], path: Path) -> None:
    """The best times at one token, for allocation."""
    times: dict[Shape, dict[str, float]] = {}
    for row in rows:
        if row.tokens == 1:
            times.setdefault((row.out_features, row.in_features), {})[row.label] = row.best
    write_decode_times(path, times, about)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the packed matmul beside bf16 F.linear.")
    parser.add_argument("--tokens", default="1,8,512", help="numbers of tokens, comma-separated")
    shapes = ",".join(shape_label(shape) for shape in SHAPES)
    parser.add_argument("--shapes", default=shapes, help="outputs x inputs, comma-separated")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--scale-bits", type=int, default=8, choices=SCALE_BITS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=ops.isa(), help=f"one of {ops.available_isas()}")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--write", type=Path, help="also write a table of decode times here")
    arguments = parser.parse_args()
    tokens = [int(n) for n in arguments.tokens.split(",")]
    if arguments.write and 1 not in tokens:
        parser.error("--write needs times at one token: add 1 to --tokens")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ops.set_isa(arguments.isa)
    about = machine()
    print("  ".join(f"{key}={value}" for key, value in about.items()))
    # The zeros are those of the default menu.
    menu = Recipe(bits=WIDTHS, group_size=arguments.group_size, scale_bits=arguments.scale_bits)
    schemes = menu.schemes()
    wanted = [parse_shape(label) for label in arguments.shapes.split(",")]
    rows = measure(wanted, tokens, schemes, arguments.rounds)
    print_table(rows)
    if arguments.write:
        write_times(rows, about, arguments.write)
    if arguments.json:
        result = {"machine": about, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
