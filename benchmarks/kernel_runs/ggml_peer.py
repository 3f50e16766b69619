"""ggml's matmuls as llama.cpp runs them on a CPU, from the libraries of llama-cpp-python.

Each type is measured in every buffer type that takes it: the plain one and the repacked one.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from kernel_runs.candidate import (
    DRAWN_ROWS,
    Call,
    Candidate,
    Shape,
    always,
    pool_size,
    repeated_rows,
)

# ggml.h's numbers of the types.
TYPES = {
    "Q4_0": (2, 4),
    "Q5_0": (6, 5),
    "Q8_0": (8, 8),
    "Q2_K": (10, 2),
    "Q3_K": (11, 3),
    "Q4_K": (12, 4),
    "Q5_K": (13, 5),
    "Q6_K": (14, 6),
}
FLOAT32 = 0
TOLERANCE = 0.03  # int8 activations in blocks
# With several tokens its first tile instruction ends the process (SIGILL), without anything of ours
# in it: ggml of llama-cpp-python 0.3.36 on a Xeon that shows AMX.
CRASHING = ("AMX",)
CONTEXT_BYTES = 2**20  # of descriptions of tensors and graphs


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


@LogCallback
def _say_nothing(level: int, text: bytes, data: int) -> None:
    """ggml tells of every tensor that it repacks."""


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


@dataclass(frozen=True)
class Library:
    """The functions that are used, with their types."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL
    backend: int

    def buffer_types(self) -> list[int]:
        """The plain one and those for repacked weights."""
        register = self.cpu.ggml_backend_cpu_reg()
        device = self.base.ggml_backend_reg_dev_get(register, 0)
        address = self.base.ggml_backend_reg_get_proc_address(
            register, b"ggml_backend_dev_get_extra_bufts"
        )
        found = [self.base.ggml_backend_cpu_buffer_type()]
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            i = 0
            while extra and extra[i]:
                found.append(extra[i])
                i += 1
        return found

    def device(self) -> int:
        found: int = self.base.ggml_backend_reg_dev_get(self.cpu.ggml_backend_cpu_reg(), 0)
        return found

    def context(self) -> int:
        found: int = self.base.ggml_init(InitParams(CONTEXT_BYTES, None, True))
        return found


class Memory:
    """Tensors of one context, and the buffer that they are in; freed with this."""

    def __init__(self, lib: Library) -> None:
        self.library, self.context, self._buffer = lib, lib.context(), 0

    def allocate(self, buffer_type: int) -> None:
        base = self.library.base
        found = base.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not found:
            raise MemoryError("no memory for ggml's tensors")
        self._buffer = found

    def __del__(self) -> None:
        if self._buffer:
            self.library.base.ggml_backend_buffer_free(self._buffer)
        self.library.base.ggml_free(self.context)


@cache
def library() -> Library:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama_cpp is not installed")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    pointers = {
        base: {
            "ggml_init": [InitParams],
            "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
            "ggml_mul_mat": [c_void_p, c_void_p, c_void_p],
            "ggml_new_graph": [c_void_p],
            "ggml_backend_reg_dev_get": [c_void_p, c_size_t],
            "ggml_backend_reg_get_proc_address": [c_void_p, c_char_p],
            "ggml_backend_cpu_buffer_type": [],
            "ggml_backend_alloc_ctx_tensors_from_buft": [c_void_p, c_void_p],
            "ggml_backend_buft_alloc_buffer": [c_void_p, c_size_t],
            "ggml_get_data": [c_void_p],
        },
        cpu: {"ggml_backend_cpu_init": [], "ggml_backend_cpu_reg": []},
    }
    for owner, functions in pointers.items():
        for name, arguments in functions.items():
            function = getattr(owner, name)
            function.restype, function.argtypes = c_void_p, arguments
    base.ggml_backend_buft_name.restype = c_char_p
    base.ggml_backend_buft_name.argtypes = [c_void_p]
    base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
    base.ggml_backend_graph_compute.argtypes = [c_void_p, c_void_p]
    base.ggml_backend_tensor_set.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    base.ggml_backend_dev_supports_op.restype = c_bool
    base.ggml_backend_dev_supports_op.argtypes = [c_void_p, c_void_p]
    base.ggml_quantize_chunk.restype = c_size_t
    base.ggml_quantize_chunk.argtypes = [
        c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
    ]  # fmt: skip
    base.ggml_row_size.restype, base.ggml_row_size.argtypes = c_size_t, [c_int, c_int64]
    base.ggml_blck_size.restype, base.ggml_blck_size.argtypes = c_int64, [c_int]
    base.ggml_get_type_traits.restype = c_void_p
    base.ggml_get_type_traits.argtypes = [c_int]
    base.ggml_free.argtypes = [c_void_p]
    base.ggml_backend_buffer_free.argtypes = [c_void_p]
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]
    base.ggml_log_set.argtypes = [LogCallback, c_void_p]
    base.ggml_log_set(_say_nothing, None)
    return Library(base, cpu, cpu.ggml_backend_cpu_init())


class TypeTraits(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("interleave", c_int64),
        ("size", c_size_t),
        ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)),
    )


def candidates(shape: Shape, threads: int) -> list[Candidate]:
    lib = library()
    lib.cpu.ggml_backend_cpu_set_n_threads(lib.backend, threads)
    found = []
    for name, (kind, bits) in TYPES.items():
        if shape[1] % lib.base.ggml_blck_size(kind):
            continue
        for buffer_type in lib.buffer_types():
            label = lib.base.ggml_backend_buft_name(buffer_type).decode()
            if label not in CRASHING and _takes(lib, kind, shape, buffer_type):
                candidate = _candidate(lib, f"ggml {name} {label}", kind, bits, shape, buffer_type)
                found.append(candidate)
    return found


def _takes(lib: Library, kind: int, shape: Shape, buffer_type: int) -> bool:
    """Whether ggml multiplies such a weight from such a buffer."""
    context = lib.context()
    weight = lib.base.ggml_new_tensor_2d(context, kind, shape[1], shape[0])
    x = lib.base.ggml_new_tensor_2d(context, FLOAT32, shape[1], 1)
    y = lib.base.ggml_mul_mat(context, weight, x)
    # The second field of a tensor is its buffer; an empty one tells where it would be.
    field = ctypes.cast(weight + ctypes.sizeof(c_void_p), POINTER(c_void_p))
    field[0] = lib.base.ggml_backend_buft_alloc_buffer(buffer_type, 0)
    taken: bool = lib.base.ggml_backend_dev_supports_op(lib.device(), y)
    lib.base.ggml_free(context)
    return taken


def _candidate(
    lib: Library, name: str, kind: int, bits: int, shape: Shape, buffer_type: int
) -> Candidate:
    out_features, in_features = shape
    drawn = torch.randn(min(DRAWN_ROWS, out_features), in_features)
    row_bytes = lib.base.ggml_row_size(kind, in_features)
    packed = torch.empty(len(drawn), row_bytes, dtype=torch.uint8)
    lib.base.ggml_quantize_chunk(
        kind, drawn.data_ptr(), packed.data_ptr(), 0, len(drawn), in_features, None
    )
    traits = ctypes.cast(lib.base.ggml_get_type_traits(kind), POINTER(TypeTraits))[0]
    traits.to_float(
        packed.data_ptr(), ctypes.cast(drawn.data_ptr(), POINTER(c_float)), drawn.numel()
    )
    stored = repeated_rows(packed, out_features)
    pool = []
    for _ in range(pool_size(stored.numel())):
        memory = Memory(lib)
        weight = lib.base.ggml_new_tensor_2d(memory.context, kind, in_features, out_features)
        memory.allocate(buffer_type)
        lib.base.ggml_backend_tensor_set(weight, stored.data_ptr(), 0, stored.numel())
        pool.append((memory, weight))

    def bind(x: Tensor, n: int) -> list[Call]:
        return [_call(lib, weight, x, out_features) for _, weight in pool[:n]]

    dense = partial(repeated_rows, drawn, out_features)
    return Candidate(name, bits, stored.numel(), bind, dense, always(TOLERANCE))


def _call(lib: Library, weight: int, x: Tensor, out_features: int) -> Call:
    memory = Memory(lib)
    context = memory.context
    inputs = lib.base.ggml_new_tensor_2d(context, FLOAT32, x.shape[1], x.shape[0])
    outputs = lib.base.ggml_mul_mat(context, weight, inputs)
    graph = lib.base.ggml_new_graph(context)
    lib.base.ggml_build_forward_expand(graph, outputs)
    memory.allocate(lib.base.ggml_backend_cpu_buffer_type())
    lib.base.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, 4 * x.numel())
    count = x.shape[0] * out_features
    values = (c_float * count).from_address(lib.base.ggml_get_data(outputs))
    y = torch.frombuffer(values, dtype=torch.float32).view(x.shape[0], out_features)
    compute = lib.base.ggml_backend_graph_compute

    def call() -> Tensor:
        if compute(memory.library.backend, graph):
            raise RuntimeError("ggml's graph failed")
        return y

    return call
