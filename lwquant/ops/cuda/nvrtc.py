"""CUDA sources to machine code by NVRTC, the compiler as a library: no GPU, driver or toolkit.

NVRTC is called by ctypes. It comes with the CUDA builds of torch and with `pip install
"lwquant[cuda13]"`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import torch

from lwquant.errors import LwquantError

SOURCES = Path(str(files("lwquant") / "csrc")) / "cuda"
# What the kernels need of C's header; NVRTC has none of its own.
STDINT = b"""#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
"""
# Where wheels put it, and what a toolkit leaves on the loader's path.
WHEEL_LIBRARIES = ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12")
SYSTEM_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
HOW_TO_INSTALL = 'pip install "lwquant[cuda13]"'


class Kind(Protocol):
    """One of the modules that csrc/cuda is compiled to."""

    @property
    def label(self) -> str: ...
    @property
    def source(self) -> str: ...  # in SOURCES
    @property
    def definitions(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class KernelKind:
    """Products with the layers of one kind."""

    bits: int
    activation_bits: int
    span_blocks: int  # blocks of 32 inputs that share a scale of activations: 1, 2 or 4

    source = "kernels.cu"

    @property
    def label(self) -> str:
        return f"{self.bits}b-a{self.activation_bits}-s{32 * self.span_blocks}"

    @property
    def definitions(self) -> tuple[str, ...]:
        return (
            f"-DLWQUANT_BITS={self.bits}",
            f"-DLWQUANT_PLANES={self.activation_bits // 8}",
            f"-DLWQUANT_SPAN={self.span_blocks}",
        )


@dataclass(frozen=True)
class RoundingKind:
    """The loop over columns of GPTQ and its descendants, for all widths."""

    source = "rounding.cu"
    label = "rounding"
    definitions = ()


@dataclass(frozen=True)
class CompiledKernels:
    """Machine code of one kind for one architecture, and what it was made of and with."""

    code: bytes
    ptx: str  # the assembly in between
    log: str  # what the compiler said


def options(kind: Kind, architecture: str) -> tuple[str, ...]:
    """What the compiler is told; `architecture` is one such as "sm_90a"."""
    return (
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--include-path={SOURCES}",
        *kind.definitions,
    )


def compile_kernels(
    kind: Kind, architecture: str, extra_options: tuple[str, ...] = ()
) -> CompiledKernels:
    """The sources of one kind for one architecture. LwquantError where NVRTC is missing."""
    nvrtc = library()
    program = ctypes.c_void_p()
    source = (SOURCES / kind.source).read_bytes()
    one_text = ctypes.c_char_p * 1
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source,
            kind.source.encode(),
            1,
            one_text(STDINT),
            one_text(b"stdint.h"),
        )
    )
    try:
        given = [text.encode() for text in (*options(kind, architecture), *extra_options)]
        status = nvrtc.nvrtcCompileProgram(
            program, len(given), (ctypes.c_char_p * len(given))(*given)
        )
        log = _read(program, "ProgramLog").decode(errors="replace").strip("\0\n")
        if status:
            raise LwquantError(
                f"NVRTC cannot compile kernels of {kind.label} for {architecture}:\n{log}"
            )
        ptx = _read(program, "PTX").decode().strip("\0")
        return CompiledKernels(_read(program, "CUBIN"), ptx, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """NVRTC's own, such as "13.5"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def supported() -> tuple[int, ...]:
    """What this NVRTC compiles for: 90 stands for sm_90."""
    n = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(n)))
    numbers = (ctypes.c_int * n.value)()
    _check(library().nvrtcGetSupportedArchs(numbers))
    return tuple(numbers)


def found() -> bool:
    """Whether there is a compiler."""
    try:
        library()
    except LwquantError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC; LwquantError that says how to get it."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    wheels = [folder / name for folder in folders for name in WHEEL_LIBRARIES]
    candidates = [*map(str, filter(Path.exists, wheels)), *SYSTEM_LIBRARIES]
    # First the one of torch's own CUDA: the driver need not be new enough for another's code.
    own = f".so.{(torch.version.cuda or '').partition('.')[0]}"
    for candidate in sorted(candidates, key=lambda name: not name.endswith(own)):
        try:
            loaded = ctypes.CDLL(candidate)
        except OSError:
            continue
        loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
        return loaded
    raise LwquantError(
        f"quantized layers on a GPU need NVRTC to compile their kernels, and there is none:"
        f" {HOW_TO_INSTALL}"
    )


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(status: int) -> None:
    if status:
        raise LwquantError(f"NVRTC: {library().nvrtcGetErrorString(status).decode()}")
