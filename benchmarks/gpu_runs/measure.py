"""Times of the GPU kernels beside F.linear in bf16, and the roofs of the same GPU."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant import ops
from lwquant.ops.activations import LARGEST, span_size
from lwquant.scheme import QuantScheme, row_words

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (28672, 8192))  # outputs, inputs
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
GROUP = 128
REPLAYS = 20
FEWEST_CALLS = 20  # of a graph
COPIED_BYTES = 2**30
SQUARE = 8192


@dataclass(frozen=True)
class Row:
    bits: int
    activation_bits: int
    out_features: int
    in_features: int
    tokens: int
    microseconds: float
    bf16_microseconds: float
    of_copy_bandwidth: float  # bytes of the tiles over the time
    of_matmul_rate: float


def measure(widths: list[int], file: Path | None) -> int:
    if not torch.cuda.is_available():
        print(
            "there is no GPU for torch here; --compile-only needs none",
            file=sys.stderr,
        )
        return 1
    properties = torch.cuda.get_device_properties(0)
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    print(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"copies {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOPS")
    rows = []
    for out_features, in_features in SHAPES:
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
            bf16 = bf16_time(x, out_features, properties.L2_cache_size)
            for bits in widths:
                activation_bits = 8 if bits <= 4 else 16
                scheme = QuantScheme(bits, GROUP)
                layer = random_tiles(scheme, out_features, in_features)
                check(layer, scheme, x, out_features, activation_bits)
                pool = pool_of(layer, properties.L2_cache_size)
                run = partial(ops.linear_tiled, x, activation_bits=activation_bits)
                time = graph_time([partial(run, tiles, None, out_features) for tiles in pool])
                operations = 2 * tokens * out_features * in_features
                row = Row(
                    bits=bits,
                    activation_bits=activation_bits,
                    out_features=out_features,
                    in_features=in_features,
                    tokens=tokens,
                    microseconds=1e6 * time,
                    bf16_microseconds=1e6 * bf16,
                    of_copy_bandwidth=layer.numel() / time / bandwidth,
                    of_matmul_rate=operations / time / rate,
                )
                rows.append(row)
                print(
                    f"{out_features} x {in_features}, {tokens} tokens, {bits} bits:"
                    f" {row.microseconds:.1f} us, bf16 {row.bf16_microseconds:.1f}"
                    f" ({bf16 / time:.2f}x), {100 * row.of_copy_bandwidth:.0f}% of bandwidth,"
                    f" {100 * row.of_matmul_rate:.0f}% of matmul rate",
                    flush=True,
                )
    if file is not None:
        found = {"gpu": properties.name, "copy_bandwidth": bandwidth, "matmul_rate": rate}
        file.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


def random_tiles(scheme: QuantScheme, out_features: int, in_features: int) -> Tensor:
    words = row_words(in_features, scheme.bits)
    n_groups = scheme.n_groups(in_features)
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-(2**31), 2**31, (out_features, words), generator=generator).int()
    scales = (torch.rand(out_features, n_groups, generator=generator) * 0.01 + 0.001).half()
    zeros = torch.randint(0, 2**scheme.bits, (n_groups, out_features), generator=generator)
    packed = ops.pack(zeros.byte(), scheme.bits)
    return ops.make_tiles(scheme, in_features, qweight, scales, packed).cuda()


def check(
    tiles: Tensor, scheme: QuantScheme, x: Tensor, out_features: int, activation_bits: int
) -> None:
    """RuntimeError where the product is further from float64 than rounding explains.

    Half a step of each span's largest activation for every weight, float32 sums, and bf16 outputs;
    with many tokens bf16 weights in place of rounded activations.
    """
    in_features = x.shape[-1]
    weight = ops.dequantize_tiled(tiles.cpu(), out_features, in_features).cuda().double()
    exact = x.double() @ weight.T
    got = ops.linear_tiled(x, tiles, None, out_features, activation_bits=activation_bits)
    size = x.double().abs() @ weight.abs().T
    span = span_size(in_features, scheme.group_size)
    largest = F.pad(x.double().abs(), (0, -in_features % span)).unflatten(-1, (-1, span)).amax(-1)
    steps = 0.51 / LARGEST[activation_bits] * largest.repeat_interleave(span, -1)
    bound = steps[:, :in_features] @ weight.abs().T + exact.abs() * 2**-8
    # Codes and zeros are multiplied before they are subtracted: up to 2^bits larger.
    bound += in_features * 2.0**-24 * 2**scheme.bits * size
    bound += 2**-8 * size if len(x) > 64 else 0
    worst = float(((got.double() - exact).abs() / bound).max())
    if not worst <= 1:
        raise RuntimeError(f"{scheme.label}, {len(x)} tokens: {worst:.3g} times the bound")


def pool_of(tensor: Tensor, cache_bytes: int) -> list[Tensor]:
    """As many copies as are twice the cache, and at least two."""
    n = max(2, -(-2 * cache_bytes // (tensor.numel() * tensor.element_size())))
    return [tensor.clone() for _ in range(n)]


def bf16_time(x: Tensor, out_features: int, cache_bytes: int) -> float:
    weight = torch.randn(out_features, x.shape[-1], device="cuda", dtype=torch.bfloat16)
    pool = pool_of(weight, cache_bytes)
    return graph_time([partial(F.linear, x, one) for one in pool])


def graph_time(calls: list[Callable[[], Tensor]]) -> float:
    """Seconds of one of the calls, in a CUDA graph that makes all of them over and over."""
    rounds = -(-FEWEST_CALLS // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, loads, and reads what tiles say
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return event_time(graph.replay) / (rounds * len(calls))


def event_time(run: Callable[[], object]) -> float:
    """Median seconds of run(), by events."""
    run()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / event_time(lambda: target.copy_(source))


def matmul_rate() -> float:
    """Operations a second."""
    one = torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    return 2 * SQUARE**3 / event_time(lambda: one @ one)
