"""Other 4-bit products on the same GPU: torch's own, and bitsandbytes' where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_runs.products import GROUP, Bf16Times, Shape, random_bf16, random_inputs
from gpu_runs.report import Report
from gpu_runs.timing import beyond_cache, graph_time

MOST_ERROR = 0.02  # of a product's norm: further off, a peer is called wrongly
NO_SIMPLE_CALL = ("gptqmodel", "humming")

Product = Callable[[Tensor, Tensor], Tensor]  # of inputs and a packed weight


@dataclass(frozen=True)
class PeerRow:
    peer: str
    out_features: int
    in_features: int
    tokens: int
    microseconds: float
    bf16_microseconds: float
    speedup: float


@dataclass(frozen=True)
class PeerLayer:
    packed: Tensor
    product: Product
    weight: Tensor  # (out_features, in_features) bf16, what is packed


def measure_peers(
    report: Report, bf16: Bf16Times, shapes: Sequence[Shape], tokens: Sequence[int]
) -> None:
    peers: dict[str, Callable[[Shape], PeerLayer]] = {"torch int4": torch_int4}
    if _is_installed("bitsandbytes"):
        peers["bitsandbytes nf4"] = bitsandbytes_nf4
    else:
        report.add("peers", Missing("bitsandbytes", "not installed"), "bitsandbytes: not installed")
    for name in NO_SIMPLE_CALL:
        why = "installed, not measured" if _is_installed(name) else "not installed"
        report.add("peers", Missing(name, why), f"{name}: {why}")
    for name, make in peers.items():
        for shape in shapes:
            what = f"{name}, {shape[0]} x {shape[1]}"
            with report.attempt(what):
                layer = make(shape)
                pool = beyond_cache(layer.packed)
                for n, x in random_inputs(shape, tokens).items():
                    with report.attempt(f"{what}, {n} tokens"):
                        _check(layer, x)
                        seconds = graph_time([partial(layer.product, x, one) for one in pool])
                        base = bf16[shape, n]
                        row = PeerRow(name, *shape, n, 1e6 * seconds, 1e6 * base, base / seconds)
                        text = f"{what}, {n} tokens: {row.microseconds:.1f} us ({row.speedup:.2f}x)"
                        report.add("peers", row, text)


@dataclass(frozen=True)
class Missing:
    peer: str
    why: str


def torch_int4(shape: Shape) -> PeerLayer:
    """tinygemm; two codes a byte, the even input in the high half; w = (code - 8) scale + zero."""
    generator = torch.Generator("cuda").manual_seed(2)
    codes = torch.randint(16, shape, generator=generator, device="cuda", dtype=torch.uint8)
    per_group = (shape[0], shape[1] // GROUP)
    scales = torch.rand(per_group, generator=generator, device="cuda") * 0.01 + 0.001
    zeros = torch.randn(per_group, generator=generator, device="cuda") * 0.01
    scales_and_zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()
    scales, zeros = (
        each.T.repeat_interleave(GROUP, -1).float() for each in scales_and_zeros.unbind(-1)
    )
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    return PeerLayer(
        packed,
        lambda x, one: torch._weight_int4pack_mm(x, one, GROUP, scales_and_zeros),
        ((codes.float() - 8) * scales + zeros).bfloat16(),
    )


def bitsandbytes_nf4(shape: Shape) -> PeerLayer:
    """In blocks of 64, its default; the scales stay in the cache, to its advantage."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random_bf16(shape, torch.Generator("cuda").manual_seed(2))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return PeerLayer(
        packed,
        lambda x, one: bitsandbytes.matmul_4bit(x, one, state),
        dequantize_4bit(packed, state),
    )


def _check(layer: PeerLayer, x: Tensor) -> None:
    exact = F.linear(x.float(), layer.weight.float())
    error = float((layer.product(x, layer.packed).float() - exact).norm() / exact.norm())
    if not error <= MOST_ERROR:
        raise RuntimeError(f"the product is wrong: {error:.3g} of its norm")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
