"""The measurement behind benchmarks/kernels.py, whose docstring says what is measured."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rows import HERE, commit, machine
from torch import Tensor

from kernel_runs import ours, torch_peers
from kernel_runs.candidate import Call, Candidate, Shape, pool_bytes
from kernel_runs.packages import PACKAGES, make_importable
from kernel_runs.probes import Probes, Roofs
from lwquant import ops
from lwquant.decode_times import parse_shape, shape_label, write_decode_times
from lwquant.recipe import Recipe
from lwquant.scheme import SCALE_BITS, WHOLE_ROW, QuantScheme

WORK = HERE.parent / "demo" / "kernels"  # git-ignored: the peers' packages
LARGE = ((4096, 4096), (4096, 11008), (11008, 4096))
SHAPES = (*LARGE, (576, 1536), (1536, 576), (4304, 1000))
QUICK_TOKENS, TOKENS = (1, 8), (1, 8, 32, 512)
QUICK_GROUPS, GROUPS = (64,), (32, 64, 128, WHOLE_ROW)
WIDTHS = (2, 3, 4, 5, 6, 8)
QUICK_ROUNDS, ROUNDS, MANY_TOKENS_ROUNDS = 10, 15, 3
STRETCH_BYTES = 64 * 2**20  # of weights read in one timed stretch, as a model would
CHECKED_TOKENS = 8  # at most, evenly spread; in float64 more would take longer than all the rest
MANY_TOKENS = 32  # from here on a stretch is one call
ROW = "row"


@dataclass(frozen=True)
class Row:
    """One layer of ours on some tokens; times are microseconds a call, the best of the rounds."""

    shape: str  # outputs x inputs
    M: int  # tokens
    bits: int
    group_size: int | str
    scheme: str
    activation_bits: int
    threads: int
    microseconds: float
    median_microseconds: float
    roof_microseconds: float
    roof_fraction: float
    best_peer: str | None
    best_peer_microseconds: float | None
    ratio: float | None
    peers: dict[str, float]  # at this width
    bf16_microseconds: float
    int8_product_microseconds: float | None  # of weights and inputs that are int8 already


def check(candidate: Candidate, calls: list[Call], x: Tensor) -> None:
    some = slice(None, None, -(-len(x) // CHECKED_TOKENS))
    expected = x[some].double() @ candidate.dense().double().T
    error = (calls[0]()[some].double() - expected).abs().max() / expected.abs().max()
    if not error < candidate.tolerance(len(x)):
        raise SystemExit(f"{candidate.name}: wrong result, relative error {error:.3g}")


def time_all(
    candidates: Sequence[Candidate], x: Tensor, rounds: int, probes: Probes
) -> list[list[float]]:
    """Microseconds a call, (candidates, rounds)."""
    few = len(x) < MANY_TOKENS
    # With many tokens the inputs and outputs of a call are large, and nothing reads a weight twice.
    bound = [candidate.bind(x, sys.maxsize if few else rounds) for candidate in candidates]
    for candidate, calls in zip(candidates, bound, strict=True):
        check(candidate, calls, x)
    endless = [itertools.cycle(calls) for calls in bound]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        probes.probe()
        next(endless[0])()  # or the first to be timed would find nothing but probes in the caches
        for candidate, calls, found in zip(candidates, endless, times, strict=True):
            n_calls = max(1, STRETCH_BYTES // candidate.weight_bytes) if few else 1
            batch = [next(calls) for _ in range(n_calls)]
            start = time.perf_counter()
            for call in batch:
                call()
            found.append((time.perf_counter() - start) / n_calls * 1e6)
    return times


def common_peers(shape: Shape) -> list[Candidate]:
    """Those without a group size of their own to choose."""
    from kernel_runs import ggml_peer

    return [*torch_peers.candidates(shape), *ggml_peer.candidates(shape, torch.get_num_threads())]


def grouped_peers(shape: Shape, group: int) -> list[Candidate]:
    from kernel_runs import onnxruntime_peer

    size = 128 if group == WHOLE_ROW else group
    return onnxruntime_peer.candidates(shape, size, torch.get_num_threads())


@dataclass(frozen=True)
class Wanted:
    """What is measured of each shape."""

    tokens: Sequence[int]
    schemes: dict[int, list[QuantScheme]]  # by group size
    activation_bits: int | None  # None: usual_activation_bits()
    bf16_inputs: bool
    rounds: tuple[int, int]  # with few tokens, with many
    with_peers: bool


def measure(shape: Shape, wanted: Wanted, probes: Probes) -> list[Row]:
    """Everything about one shape; its weights are gone afterwards."""
    common = common_peers(shape) if wanted.with_peers else [torch_peers.bf16(shape)]
    if wanted.with_peers and max(wanted.tokens) >= MANY_TOKENS:  # few wait for memory anyway
        common.append(torch_peers.int8_product(shape))
    rows = []
    for group, schemes in wanted.schemes.items():
        own = [
            ours.candidate(
                shape,
                scheme,
                wanted.activation_bits or usual_activation_bits(scheme.bits),
                wanted.bf16_inputs,
            )
            for scheme in schemes
        ]
        peers = [*common, *(grouped_peers(shape, group) if wanted.with_peers else [])]
        for n_tokens in wanted.tokens:
            everyone = [*own, *peers]
            x = torch.randn(n_tokens, shape[1])
            n_rounds = wanted.rounds[n_tokens >= MANY_TOKENS]
            print(f"{shape_label(shape)}, groups of {group}, {n_tokens} tokens", file=sys.stderr)
            times = time_all(everyone, x, n_rounds, probes)
            roofs = probes.roofs()
            best = {c.name: min(found) for c, found in zip(everyone, times, strict=True)}
            for scheme, candidate, found in zip(schemes, own, times, strict=False):
                rows.append(row_of(shape, scheme, candidate, found, peers, best, x, roofs))
        del own, peers, everyone  # before the next ones take as much memory again
    return rows


def usual_activation_bits(bits: int) -> int:
    """What quantizing chooses for most linears of this width, at 4 bits for about half of them."""
    return 8 if bits <= 4 else 16


def row_of(
    shape: Shape,
    scheme: QuantScheme,
    candidate: Candidate,
    times: list[float],
    peers: Sequence[Candidate],
    best: dict[str, float],
    x: Tensor,
    roofs: Roofs,
) -> Row:
    took = min(times)
    operations = 2 * len(x) * shape[0] * shape[1]
    roof = roofs.microseconds(candidate.weight_bytes, operations)
    same_width = {p.name: best[p.name] for p in peers if p.bits == scheme.bits}
    fastest = min(same_width, key=lambda name: same_width[name]) if same_width else None
    return Row(
        shape=shape_label(shape),
        M=len(x),
        bits=scheme.bits,
        group_size=ROW if scheme.group_size == WHOLE_ROW else scheme.group_size,
        scheme=scheme.label,
        activation_bits=candidate.activation_bits,
        threads=torch.get_num_threads(),
        microseconds=took,
        median_microseconds=statistics.median(times),
        roof_microseconds=roof,
        roof_fraction=roof / took,
        best_peer=fastest,
        best_peer_microseconds=same_width[fastest] if fastest else None,
        ratio=same_width[fastest] / took if fastest else None,
        peers=same_width,
        bf16_microseconds=best[torch_peers.BF16_NAME],
        int8_product_microseconds=best.get(torch_peers.INT8_PRODUCT_NAME),
    )


def print_tables(rows: list[Row]) -> None:
    """Markdown; a cell is microseconds, percent of the roof, and the best peer's time over ours."""
    widths = sorted({row.bits for row in rows})
    heads = ["out x in", "tokens", "groups", "bf16", "int8", *(f"{bits} bits" for bits in widths)]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    key = lambda row: (row.shape, row.M, row.group_size)  # noqa: E731
    for (shape, n_tokens, group), found in itertools.groupby(rows, key):
        by_width = {row.bits: row for row in found}
        dense = next(iter(by_width.values()))
        int8 = dense.int8_product_microseconds
        cells = [shape.replace("x", " x "), n_tokens, group, f"{dense.bf16_microseconds:.0f}"]
        cells.append("" if int8 is None else f"{int8:.0f}")
        cells += [cell(by_width[bits]) if bits in by_width else "" for bits in widths]
        print("|", " | ".join(map(str, cells)), "|")


def cell(row: Row) -> str:
    ratio = f", {row.ratio:.2f}" if row.ratio else ""
    return f"{row.microseconds:.0f} ({row.roof_fraction:.0%}{ratio})"


def write_times(rows: list[Row], about: dict[str, object], path: Path) -> None:
    """The best times at one token, for allocation."""
    times: dict[Shape, dict[str, float]] = {}
    for row in rows:
        if row.M == 1:
            found = times.setdefault(parse_shape(row.shape), {})
            found[row.scheme] = row.microseconds
            found[QuantScheme(16).label] = row.bf16_microseconds
    write_decode_times(path, times, about)


def main(description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="large shapes, 1 and 8 tokens")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--write", type=Path, help="write a table of decode times here")
    parser.add_argument("--no-peers", action="store_true", help="only torch's bf16 beside ours")
    parser.add_argument("--shapes", help="outputs x inputs, comma-separated")
    parser.add_argument("--tokens", help="comma-separated")
    parser.add_argument("--group-sizes", help=f"comma-separated; {ROW} for whole rows")
    parser.add_argument("--scale-bits", type=int, default=8, choices=SCALE_BITS)
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), help="at every width")
    parser.add_argument(
        "--bf16-inputs", action="store_true", help="of ours; onnxruntime's and ggml's are float32"
    )
    parser.add_argument("--rounds", type=int, help="the same for every number of tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=ops.isa(), help=f"one of {ops.available_isas()}")
    arguments = parser.parse_args()
    shapes: Sequence[Shape] = LARGE if arguments.quick else SHAPES
    if arguments.shapes:
        shapes = [parse_shape(label) for label in arguments.shapes.split(",")]
    tokens: Sequence[int] = QUICK_TOKENS if arguments.quick else TOKENS
    if arguments.tokens:
        tokens = [int(n) for n in arguments.tokens.split(",")]
    groups: Sequence[int] = QUICK_GROUPS if arguments.quick else GROUPS
    if arguments.group_sizes:
        named = arguments.group_sizes.split(",")
        groups = [WHOLE_ROW if label == ROW else int(label) for label in named]
    if arguments.write and 1 not in tokens:
        parser.error("--write needs times at one token: add 1 to --tokens")
    few = QUICK_ROUNDS if arguments.quick else ROUNDS
    rounds = (arguments.rounds,) * 2 if arguments.rounds else (few, MANY_TOKENS_ROUNDS)
    if not arguments.no_peers:
        make_importable(WORK)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    ops.set_isa(arguments.isa)
    schemes = {  # with the zeros and scales of the default menu
        group: Recipe(bits=WIDTHS, group_size=group, scale_bits=arguments.scale_bits).schemes()
        for group in groups
    }
    wanted = Wanted(
        tokens,
        schemes,
        arguments.activation_bits,
        arguments.bf16_inputs,
        rounds,
        with_peers=not arguments.no_peers,
    )
    with_amx = ops.isa() == "amx"
    probes = Probes(WORK, pool_bytes(), torch.get_num_threads(), with_amx)
    about = {
        "cpu": machine(),
        "isa": ops.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peers": [] if arguments.no_peers else list(PACKAGES.values()),
        "pool_bytes": pool_bytes(),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }
    rows = []
    for shape in shapes:
        rows += measure(shape, wanted, probes)
        if arguments.json:  # what is measured is kept should a later shape fail
            result = {"machine": about, "rows": [asdict(row) for row in rows]}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print_tables(rows)
    if arguments.write:
        write_times(rows, about, arguments.write)
