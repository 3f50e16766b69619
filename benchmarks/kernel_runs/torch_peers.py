"""torch's own linears: bf16, int4 weights, int8 weights, int8 weights and activations."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_runs.candidate import Call, Candidate, Shape, always, pool_size
from lwquant import ops

BF16_NAME = "torch bf16"
INT8_PRODUCT_NAME = "oneDNN int8 product"
BF16 = 2.0**-6  # of the largest output
INT4_GROUPS = (32, 64, 128)
DYNAMIC_INT8_ENGINES = ("x86", "onednn")  # which is faster differs between processors
INT8_ACTIVATIONS = 0.02  # one scale for all tokens, or one for each, and 8 bits


def candidates(shape: Shape) -> list[Candidate]:
    found = [bf16(shape)]
    if shape[1] % 32 == 0:  # else it is wrong, or ends the process (torch 2.13)
        found.append(_int8_weights(shape))
    found += [_dynamic_int8(shape, engine) for engine in DYNAMIC_INT8_ENGINES]
    out_features, in_features = shape
    groups = [g for g in INT4_GROUPS if in_features % g == 0 and out_features % 16 == 0]
    if groups:
        found.append(_int4(shape, groups[-1]))
    return found


def bf16(shape: Shape) -> Candidate:
    first = torch.randn(shape).bfloat16()
    size = 2 * first.numel()
    pool = [first, *(first.clone() for _ in range(pool_size(size) - 1))]

    def bind(x: Tensor, n: int) -> list[Call]:
        narrow = x.bfloat16()
        return [lambda w=w: F.linear(narrow, w) for w in pool[:n]]  # type: ignore[misc]

    return Candidate(BF16_NAME, 16, size, bind, lambda: first, always(BF16))


def int8_product(shape: Shape) -> Candidate:
    """oneDNN's product of inputs and weights that are int8 before the call, and nothing else.

    It is no linear layer and no peer at any width, but what a library reaches of the int8 rate that
    has nothing to unpack or to round.
    """
    first = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales, zeros = torch.rand(shape[0]) + 0.5, torch.zeros(shape[0], dtype=torch.int64)
    # Without AMX signed inputs are slow in oneDNN, with it unsigned ones.
    dtype, zero = (torch.int8, 0) if ops.isa() == "amx" else (torch.uint8, 128)
    pool = [torch.ops.onednn.qlinear_prepack(first, None) for _ in range(pool_size(first.numel()))]

    def bind(x: Tensor, n: int) -> list[Call]:
        step = float(x.abs().max()) / 127
        codes = ((x / step).round() + zero).to(dtype)
        of_weight, of_result = (scales, zeros, None), (1.0, 0, torch.float32, "none", [], "")
        multiply = torch.ops.onednn.qlinear_pointwise
        return [partial(multiply, codes, step, zero, w, *of_weight, *of_result) for w in pool[:n]]

    def dense() -> Tensor:
        return first.float() * scales[:, None]

    return Candidate(INT8_PRODUCT_NAME, 0, first.numel(), bind, dense, always(INT8_ACTIVATIONS))


def _int8_weights(shape: Shape) -> Candidate:
    """A scale a row; bf16 activations."""
    first = torch.randint(-127, 128, shape).to(torch.int8)
    scales = (torch.rand(shape[0]) + 0.5).bfloat16()
    pool = [first, *(first.clone() for _ in range(pool_size(first.numel()) - 1))]

    def bind(x: Tensor, n: int) -> list[Call]:
        narrow = x.bfloat16()
        return [lambda w=w: torch._weight_int8pack_mm(narrow, w, scales) for w in pool[:n]]  # type: ignore[misc]

    def dense() -> Tensor:
        return first.float() * scales.float()[:, None]

    return Candidate("torch int8 weights", 8, first.numel(), bind, dense, always(BF16))


def _dynamic_int8(shape: Shape, engine: str) -> Candidate:
    """Activations are made int8 in each call."""
    torch.backends.quantized.engine = engine
    drawn = torch.randn(shape).clamp(-4, 4)
    quantized = torch.quantize_per_tensor(drawn, 4 / 127, 0, torch.qint8)
    size = drawn.numel()
    pool = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(pool_size(size))]

    def bind(x: Tensor, n: int) -> list[Call]:
        return [lambda w=w: torch.ops.quantized.linear_dynamic(x, w) for w in pool[:n]]  # type: ignore[misc]

    return Candidate(
        f"torch dynamic int8 ({engine})",
        8,
        size,
        bind,
        quantized.dequantize,
        always(INT8_ACTIVATIONS),
    )


def _int4(shape: Shape, group: int) -> Candidate:
    """bf16 activations, a scale and a zero a group."""
    out_features, in_features = shape
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    scales = (torch.rand(in_features // group, out_features) + 0.5).bfloat16()
    offsets = torch.randn(in_features // group, out_features).bfloat16()
    both = torch.stack([scales, offsets], dim=2).contiguous()
    first = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    size = first.numel() * first.element_size() + both.numel() * 2
    pool = [(first.clone(), both.clone()) for _ in range(pool_size(size))]

    def bind(x: Tensor, n: int) -> list[Call]:
        narrow = x.bfloat16()
        return [
            lambda w=w, s=s: torch._weight_int4pack_mm_for_cpu(narrow, w, group, s)  # type: ignore[misc]
            for w, s in pool[:n]
        ]

    def dense() -> Tensor:
        wide = (t.float().T.repeat_interleave(group, 1) for t in (scales, offsets))
        return (codes - 8) * next(wide) + next(wide)

    return Candidate(f"torch int4 g{group}", 4, size, bind, dense, always(BF16))
