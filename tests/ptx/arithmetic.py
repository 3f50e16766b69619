"""What instructions compute, each from its definition in the PTX manual, on arrays of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LANES = 32

Array = np.ndarray[Any, Any]


def dtype_of(name: str) -> Any:
    """
    >>> dtype_of("u8"), dtype_of("b64"), dtype_of("f32")
    (<class 'numpy.uint8'>, <class 'numpy.uint64'>, <class 'numpy.float32'>)
    """
    if name == "pred":
        return np.bool_
    return {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOATS}[name[0]][int(name[1:])]


def bits_of(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def as_bytes(words: Array, dtype: Any) -> Array:
    """(..., n) 32-bit words → (..., 4 n) bytes as wide integers, the lowest of a word first."""
    return np.ascontiguousarray(words).view(dtype).astype(np.int64)


def shift_left(how: tuple[str, ...], value: Array, by: Array) -> Array:
    most = bits_of(value.dtype) - 1
    return np.where(by > most, 0, value << by.clip(max=most)).astype(value.dtype)


def shift_right(how: tuple[str, ...], value: Array, by: Array) -> Array:
    """The sign comes in from the left; by more than there are bits as by all."""
    most = bits_of(value.dtype) - 1
    by = by.view(UNSIGNED[most + 1])
    shifted = value >> by.clip(max=most).view(value.dtype)
    if value.dtype.kind == "i":
        return shifted
    return np.where(by > most, 0, shifted).astype(value.dtype)


def multiply(how: tuple[str, ...], a: Array, b: Array) -> Array:
    if how[0] == "wide":
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits_of(a.dtype)]
        return a.astype(wide) * b.astype(wide)
    _require(how, ("lo", how[-1]), ("rn", "f32"), ("f32",))
    return a * b


def multiply_add(how: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    _require(how, ("lo", how[-1]))
    return a * b + c


def fused(how: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    """Rounded once: float64 holds the product, and its sum with c is rounded to odd first."""
    _require(how, ("rn", "f32"))
    product, other = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + other
    back = total - product
    missed = (product - (total - back)) + (other - back)  # Knuth's TwoSum
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (missed != 0) & (bits % 2 == 0)
    away_from_zero = np.where((missed > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + away_from_zero, bits).view(np.float64).astype(np.float32)


def divide(how: tuple[str, ...], a: Array, b: Array) -> Array:
    _require(how, ("s32",), ("rn", "f32"))
    if how == ("s32",):  # towards zero
        return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(np.int32)
    return a / b


def least(how: tuple[str, ...], a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def most(how: tuple[str, ...], a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def add_four_products(how: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    _require(how, ("u32", "s32"))
    left, right = as_bytes(a[:, None], np.uint8), as_bytes(b[:, None], np.int8)
    return ((left * right).sum(-1) + c).astype(np.int32)


def matrix_product(a: Array, b: Array, c: Array) -> Array:
    """m16n8k32 of unsigned and signed bytes, by the manual's tables of fragments.

    a (n_warps, 32, 4), b (n_warps, 32, 2) and c (n_warps, 32, 4) are words of the lanes' registers.
    """
    lane = np.arange(LANES)[:, None]
    group, thread = lane // 4, lane % 4
    i, j, k = np.arange(16), np.arange(8), np.arange(4)
    left = np.zeros((len(a), 16, 32), np.int64)
    right = np.zeros((len(a), 32, 8), np.int64)
    rows = group + np.where((i < 4) | ((i >= 8) & (i < 12)), 0, 8)
    left[:, rows, thread * 4 + i % 4 + np.where(i < 8, 0, 16)] = as_bytes(a, np.uint8)
    right[:, thread * 4 + j % 4 + np.where(j < 4, 0, 16), group] = as_bytes(b, np.int8)
    sums = (left @ right)[:, group + np.where(k < 2, 0, 8), thread * 2 + k % 2]
    return (sums + c.view(np.int32)).astype(np.int32)


def converted(how: tuple[str, ...], value: Array) -> Array:
    """cvt: `how` ends with the types to and from. Wider integers are cut."""
    match how:
        case ("rn", "bf16", "f32"):
            bits = value.view(np.uint32).astype(np.int64)
            rounded = (bits + 0x7FFF + (bits >> 16) % 2) >> 16  # to even between two
            return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
        case ("rni", "s32", "f32"):
            whole = np.where(np.isnan(value), 0, np.rint(value.astype(np.float64)))
            return whole.clip(-(2**31), 2**31 - 1).astype(np.int32)
        case ("rn", "f16", "f32") | ("f32", "f16") | ("rn", "f32", "u16" | "s32" | "u32"):
            return value.astype(dtype_of(how[-2]))
        case (to, source) if "f" not in to + source:
            return value.astype(dtype_of(to))
    raise ValueError(f"cvt.{'.'.join(how)} is not known here")


def _require(how: tuple[str, ...], *known: tuple[str, ...]) -> None:
    if how not in known:
        raise ValueError(f"{'.'.join(how)} is not known here")


# By the first part of the opcode; a function is given the other parts, and operands in the type
# that the last part names.
COMPUTED: dict[str, Callable[..., Array]] = {
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "mul": multiply,
    "mad": multiply_add,
    "fma": fused,
    "div": divide,
    "neg": lambda _, a: -a,
    "min": least,
    "max": most,
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "not": lambda _, a: ~a,
    "shl": shift_left,
    "shr": shift_right,
    "mov": lambda _, a: a,
    "dp4a": add_four_products,
    "cvt": converted,
    "setp": lambda how, a, b: COMPARISONS[how[0]](a, b),
}
