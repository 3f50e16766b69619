"""Times of products with quantized layers, beside F.linear in bf16 and the roofs of the GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_runs.layers import Layer, random_layer, times_the_bound
from gpu_runs.report import Report
from gpu_runs.timing import Roofs, beyond_cache, graph_time
from lwquant import ops
from lwquant.scheme import QuantScheme

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (28672, 8192))  # outputs, inputs
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
GROUP = 128

Shape = tuple[int, int]
Bf16Times = dict[tuple[Shape, int], float]  # seconds by shape and tokens


@dataclass(frozen=True)
class Row:
    bits: int
    group_size: int
    activation_bits: int
    out_features: int
    in_features: int
    tokens: int
    microseconds: float
    bf16_microseconds: float
    speedup: float
    of_copy_bandwidth: float  # bytes of the tiles over the time
    of_matmul_rate: float


def activation_bits(bits: int) -> int:
    """Of a width: what keeps rounding of activations well below that of weights."""
    return 8 if bits <= 4 else 16


def random_inputs(shape: Shape, tokens: Sequence[int]) -> dict[int, Tensor]:
    """(tokens, in_features) bf16 by number of tokens; from a layer before, so in the cache."""
    generator = torch.Generator("cuda").manual_seed(0)
    return {n: random_bf16((n, shape[1]), generator) for n in tokens}


def random_bf16(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def measure_bf16(report: Report, shapes: Sequence[Shape], tokens: Sequence[int]) -> Bf16Times:
    found: Bf16Times = {}
    for shape in shapes:
        with report.attempt(f"bf16 at {shape[0]} x {shape[1]}"):
            weight = random_bf16(shape, torch.Generator("cuda").manual_seed(1))
            pool = beyond_cache(weight)
            for n, x in random_inputs(shape, tokens).items():
                found[shape, n] = graph_time([partial(F.linear, x, one) for one in pool])
    return found


def measure_products(
    report: Report,
    roofs: Roofs,
    bf16: Bf16Times,
    shapes: Sequence[Shape],
    widths: Sequence[int],
    tokens: Sequence[int],
    broken: Collection[tuple[int, int]],
) -> Iterator[Row]:
    """All but the pairs of widths and activation bits that are known to be broken."""
    for shape in shapes:
        inputs = random_inputs(shape, tokens)
        for bits in widths:
            if (bits, activation_bits(bits)) in broken:
                continue
            what = f"{shape[0]} x {shape[1]}, {bits} bits"
            with report.attempt(what):
                generator = torch.Generator("cuda").manual_seed(bits)
                layer = random_layer(QuantScheme(bits, GROUP), *shape, generator)
                pool = beyond_cache(layer.tiles)
                for n, x in inputs.items():
                    with report.attempt(f"{what}, {n} tokens"):
                        row = _measured(layer, pool, x, bf16[shape, n], roofs)
                        report.add("rows", row, _text(row))
                        yield row


def _measured(layer: Layer, pool: Sequence[Tensor], x: Tensor, bf16: float, roofs: Roofs) -> Row:
    """Checked first; RuntimeError where the product is wrong."""
    bits = layer.scheme.bits
    own = activation_bits(bits)
    worst = times_the_bound(layer, x, None, own)
    if not worst <= 1:
        raise RuntimeError(f"the product is wrong: {worst:.3g} times the bound")
    run = partial(ops.linear_tiled, x, activation_bits=own)
    seconds = graph_time([partial(run, tiles, None, layer.out_features) for tiles in pool])
    operations = 2 * len(x) * layer.out_features * layer.in_features
    return Row(
        bits=bits,
        group_size=GROUP,
        activation_bits=own,
        out_features=layer.out_features,
        in_features=layer.in_features,
        tokens=len(x),
        microseconds=1e6 * seconds,
        bf16_microseconds=1e6 * bf16,
        speedup=bf16 / seconds,
        of_copy_bandwidth=layer.tiles.nbytes / seconds / roofs.copy_bandwidth,
        of_matmul_rate=operations / seconds / roofs.matmul_rate,
    )


def _text(row: Row) -> str:
    return (
        f"{row.out_features} x {row.in_features}, {row.bits} bits, {row.tokens} tokens:"
        f" {row.microseconds:.1f} us, bf16 {row.bf16_microseconds:.1f} ({row.speedup:.2f}x),"
        f" {row.of_copy_bandwidth:.0%} of copy bandwidth, {row.of_matmul_rate:.0%} of matmul rate"
    )
