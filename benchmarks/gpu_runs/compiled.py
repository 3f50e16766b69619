"""What the compiler makes of the GPU kernels, and the rules for it; no GPU is needed.

Registers, stack, spills and shared memory are what ptxas says; instructions are read from the
machine code by nvdisasm (`pip install nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lwquant.ops.cuda.nvrtc import CompiledKernels, KernelKind, Kind, compile_kernels
from lwquant.scheme import WIDTHS

VERBOSE = ("--ptxas-options=-v",)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
LAYER_KINDS = tuple(
    KernelKind(bits, activation_bits, span)
    for bits in WIDTHS
    for activation_bits in (8, 16)
    for span in (1, 2, 4)
)
# So that 512 threads fit a multiprocessor, or 384 or 256 of the kernels that have most sums.
MOST_REGISTERS, MOST_OF = 128, {"multiply_many_32": 168, "multiply_many_64": 255}
TENSOR_CORES = "IMMA"  # integer products of matrices
LOCAL_MEMORY = ("LDL", "STL")  # what spills and arrays in memory become
MULTIPLIED_BY_TENSOR_CORES = "multiply_many_"
N_KERNELS = {"kernels.cu": 9, "rounding.cu": 1}


@dataclass(frozen=True)
class KernelCode:
    """One kernel of one kind for one architecture."""

    kind: Kind
    architecture: str
    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    local_memory_instructions: int

    def broken_rules(self) -> Iterator[str]:
        most = MOST_OF.get(self.name, MOST_REGISTERS)
        if self.registers > most:
            yield f"{self.registers} registers, more than {most}"
        if self.spill_bytes or self.stack_bytes or self.local_memory_instructions:
            yield (
                f"{self.spill_bytes} bytes spilled, {self.stack_bytes} on the stack,"
                f" {self.local_memory_instructions} accesses to local memory"
            )
        if (self.tensor_core_instructions > 0) != self.name.startswith(MULTIPLIED_BY_TENSOR_CORES):
            yield f"{self.tensor_core_instructions} tensor-core instructions"


def compiled_kernels(kind: Kind, architecture: str) -> list[KernelCode]:
    """All kernels of a kind, as they are compiled for users."""
    return kernels_of(compile_kernels(kind, architecture, VERBOSE), kind, architecture)


def kernels_of(found: CompiledKernels, kind: Kind, architecture: str) -> list[KernelCode]:
    """What there is to say of kernels that were compiled with VERBOSE."""
    resources = read_resources(found.log)
    opcodes = read_opcodes(disassembled(found.code))
    n_kernels = N_KERNELS[kind.source]
    if len(resources) != n_kernels or resources.keys() != opcodes.keys():
        raise RuntimeError(f"not {n_kernels} kernels: {sorted(resources)}, {sorted(opcodes)}")
    return [
        KernelCode(
            kind=kind,
            architecture=architecture,
            name=name,
            **numbers,
            tensor_core_instructions=sum(code.startswith(TENSOR_CORES) for code in opcodes[name]),
            local_memory_instructions=sum(code.startswith(LOCAL_MEMORY) for code in opcodes[name]),
        )
        for name, numbers in sorted(resources.items())
    ]


def read_resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spills and shared memory of each kernel, from what `ptxas -v` prints.

    >>> log = '''ptxas info    : Compiling entry function 'f' for 'sm_80'
    ... ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem'''
    >>> read_resources(log)
    {'f': {'registers': 40, 'stack_bytes': 8, 'spill_bytes': 16, 'shared_bytes': 16}}
    """
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack = _number(r"(\d+) bytes stack frame", part)
        spills = [_number(rf"(\d+) bytes spill {way}", part) for way in ("stores", "loads")]
        if stack is None or None in spills:
            raise RuntimeError(f"ptxas says nothing of the stack:\n{part}")
        found[part.split("'", 1)[0]] = {
            "registers": _number(r"Used (\d+) registers", part) or 0,
            "stack_bytes": stack,
            "spill_bytes": sum(n or 0 for n in spills),
            "shared_bytes": _number(r"(\d+) bytes smem", part) or 0,
        }
    return found


def read_opcodes(disassembly: str) -> dict[str, list[str]]:
    """The instructions of each kernel, without their operands.

    >>> read_opcodes('''.section .text.f,"ax",@progbits
    ...         /*0000*/                   LDG.E.CONSTANT R4, desc[UR4][R2.64] ;
    ...         /*0010*/              @!P0 IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R4 ;''')
    {'f': ['LDG.E.CONSTANT', 'IMMA.16832.U8.S8']}
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in disassembly.splitlines():
        if section := re.search(r"\.section\s+\.text\.(\w+)", line):
            current = found.setdefault(section[1], [])
        elif instruction := re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line
        ):
            current.append(instruction[1])
    return found


def disassembled(code: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(code)
        command = [disassembler(), "--print-code", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassembler() -> str:
    """nvdisasm of its wheel, or on the path; RuntimeError without."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for candidate in (folder / "cu13" / "bin" / "nvdisasm" for folder in folders):
        if candidate.exists():
            return str(candidate)
    found = shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    return found


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
