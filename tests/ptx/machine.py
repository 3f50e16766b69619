"""PTX on a CPU: the text that NVRTC makes of csrc/cuda, executed instruction by instruction.

The C++ emulation (tests/kernels/emulated_cuda.h) has bodies of its own for what device.h writes in
assembly; here the assembly itself runs, and what the compiler made of everything around it.
Instructions that kernels do not use are refused by name. Not looked at: the machine code that ptxas
makes of PTX, and how long anything takes.

The threads of a block run side by side, a register being an array. Where they part, those at the
smallest address go first, until they meet the others. Copies to shared memory arrive when they are
waited for, no sooner. Global memory is this process's own.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import COMPUTED, LANES, SIGNED, UNSIGNED, Array, bits_of, dtype_of, matrix_product
from .text import Instruction, Kernel, names_in

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])")
ADDRESS = re.compile(r"\[([%\w$]+)(?:\+(-?\d+))?\]")
JUMPS = ("bra", "ret", "bar")
# From the first address that can be mapped to the last: nothing is touched but what is asked for.
START = 2**16
MEMORY = np.ctypeslib.as_array((ctypes.c_uint8 * (2**47 - START)).from_address(START))
UNWRITTEN = 0xCD  # in shared memory, so that nobody finds zeros there by luck

Threads = Any  # a slice of all, or the numbers of some


def launch(kernel: Kernel, grid: tuple[int, int, int], n_threads: int, arguments: int) -> None:
    """All blocks, one after another; at the address `arguments` lies what the host hands over."""
    if n_threads > kernel.most_threads:
        raise ValueError(f"{kernel.name} takes {kernel.most_threads} threads, not {n_threads}")
    given = ctypes.string_at(arguments, kernel.parameter_bytes)
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Block(kernel, n_threads, {"ctaid": (x, y, z), "nctaid": grid}, given).run()


class Block:
    """The threads of one block; `special` are registers of x, y and z."""

    def __init__(
        self, kernel: Kernel, n_threads: int, special: dict[str, tuple[int, int, int]], given: bytes
    ) -> None:
        self.kernel, self.n = kernel, n_threads
        self.special = {**special, "ntid": (n_threads, 1, 1)}
        self.parameters = np.frombuffer(given, np.uint8)
        self.shared = np.full(-(-kernel.shared_bytes // 16) * 16, UNWRITTEN, np.uint8)
        self.registers: dict[str, Array] = {}
        self.copies: list[tuple[Array, Array, Array, Array]] = []  # thread, its group, to, from
        self.group = np.zeros(n_threads, np.int64)  # that copies of each thread belong to now

    def run(self) -> None:
        """Every thread to its end. RuntimeError where some wait for others that never come."""
        at = {0: np.arange(self.n)}  # who is where
        waiting: dict[int, Array] = {}  # at a barrier, by where they go on
        while at or waiting:
            if not at:
                if sum(map(len, waiting.values())) != self.n:
                    raise RuntimeError(f"{self.kernel.name}: not all threads come to a barrier")
                at, waiting = waiting, {}
            pc = min(at)
            here = at.pop(pc)
            threads: Threads = slice(None) if len(here) == self.n else here
            others = min(at, default=len(self.kernel.instructions))
            while pc < others and self.kernel.instructions[pc].opcode[0] not in JUMPS:
                self.execute(self.kernel.instructions[pc], threads)
                pc += 1
            if pc == others:
                join(at, pc, here)
                continue
            jump = self.kernel.instructions[pc]
            if jump.opcode[0] == "bar":
                join(waiting, pc + 1, here)
                continue
            goes = self.holds(jump.predicate, here)
            if jump.opcode[0] == "bra" and goes.any():
                join(at, self.kernel.labels[jump.operands[0]], here[goes])
            if not goes.all():
                join(at, pc + 1, here[~goes])

    def execute(self, instruction: Instruction, threads: Threads) -> None:
        if instruction.predicate:
            threads = self.numbers(threads)
            threads = threads[self.holds(instruction.predicate, threads)]
            if not len(threads):
                return
        kind, *how = instruction.opcode
        special: Callable[..., None] | None = getattr(self, f"do_{kind}", None)
        if special is not None:
            special(instruction, threads)
        elif kind in COMPUTED:
            to, *sources = instruction.operands
            dtype = dtype_of(how[-1])
            values = [self.value(source, dtype, threads) for source in sources]
            with np.errstate(all="ignore"):
                self.write(to, COMPUTED[kind](tuple(how), *values), threads)
        else:
            raise ValueError(f"{instruction.name} is not known here")

    def holds(self, predicate: str, threads: Array) -> Array:
        if not predicate:
            return np.ones(len(threads), bool)
        found = self.registers[predicate.lstrip("!")][threads]
        return ~found if predicate[0] == "!" else found

    def numbers(self, threads: Threads) -> Array:
        return np.arange(self.n)[threads]

    # Operands.

    def value(self, operand: str, dtype: Any, threads: Threads) -> Array:
        """In `dtype`, of the threads in question; of a wider register its lower part."""
        if operand in self.registers:
            stored = self.registers[operand][threads]
        elif operand[0] == "%":
            stored = self.special_register(operand)[threads]
        elif operand.startswith("0f"):
            stored = np.full(self.n, int(operand[2:], 16), np.uint32)[threads]
        else:
            number = self.kernel.shared.get(operand)
            number = int(operand, 0) if number is None else number
            stored = np.full(self.n, number % 2**64, np.uint64)[threads]
        if dtype is np.bool_:
            return stored.astype(bool)
        if bits_of(stored.dtype) != bits_of(dtype):
            stored = stored.astype(UNSIGNED[bits_of(dtype)])
        return stored.view(dtype)

    def special_register(self, name: str) -> Array:
        found = SPECIAL.fullmatch(name)
        if not found:
            raise ValueError(f"{self.kernel.name}: {name} is read and was never written")
        if found[1] == "tid":
            return np.arange(self.n, dtype=np.uint32) * (found[2] == "x")
        return np.full(self.n, self.special[found[1]]["xyz".index(found[2])], np.uint32)

    def write(self, register: str, values: Array, threads: Threads) -> None:
        """Narrower values are extended, by zeros or by their sign; registers have none."""
        dtype = dtype_of(self.kernel.registers[register.rstrip("0123456789")])
        if register not in self.registers:
            self.registers[register] = np.zeros(self.n, dtype)
        if bits_of(values.dtype) > bits_of(dtype):
            raise ValueError(f"{self.kernel.name}: {values.dtype} in {register}")
        if values.dtype.kind in "iu":
            values = values.astype(
                (SIGNED if values.dtype.kind == "i" else UNSIGNED)[bits_of(dtype)]
            )
        own = self.registers[register]
        own[threads] = values.view(own.dtype)

    def address(self, operand: str, threads: Threads, aligned: int) -> Array:
        found = ADDRESS.fullmatch(operand)
        if not found:
            raise ValueError(f"{self.kernel.name}: {operand!r} is no address")
        base = self.value(found[1], np.uint64, threads).astype(np.int64)
        address: Array = base + int(found[2] or 0)
        if (address % aligned).any():
            raise RuntimeError(f"{self.kernel.name}: {operand} is no multiple of {aligned} bytes")
        return address

    # Instructions that do more than compute.

    def do_selp(self, instruction: Instruction, threads: Threads) -> None:
        to, *both, predicate = instruction.operands
        yes, no = (self.value(each, dtype_of(instruction.opcode[-1]), threads) for each in both)
        chosen = np.where(self.value(predicate, np.bool_, threads), yes, no)
        self.write(to, chosen, threads)

    def do_cvta(self, instruction: Instruction, threads: Threads) -> None:
        to, source = instruction.operands
        if instruction.opcode[1:] != ("to", "global", "u64"):  # which changes nothing
            raise ValueError(f"{instruction.name} is not known here")
        self.write(to, self.value(source, np.uint64, threads), threads)

    def do_ld(self, instruction: Instruction, threads: Threads) -> None:
        to, source = instruction.operands
        registers, dtype = names_in(to), dtype_of(instruction.opcode[-1])
        size = np.dtype(dtype).itemsize
        if instruction.opcode[1] == "param":
            offset = re.search(r"\+(\d+)\]", source)
            start = int(offset[1]) if offset else 0
            found = self.parameters[start : start + len(registers) * size].view(dtype)
            for register, value in zip(registers, found, strict=True):
                self.write(register, np.full(len(self.numbers(threads)), value), threads)
            return
        memory, at = self.elements(instruction, source, len(registers), threads)
        loaded = [memory[at + i] for i in range(len(registers))]  # before one is the next address
        for register, values in zip(registers, loaded, strict=True):
            self.write(register, values, threads)

    def do_st(self, instruction: Instruction, threads: Threads) -> None:
        to, source = instruction.operands
        sources, dtype = names_in(source), dtype_of(instruction.opcode[-1])
        memory, at = self.elements(instruction, to, len(sources), threads)
        for i, name in enumerate(sources):
            memory[at + i] = self.value(name, dtype, threads)

    def elements(
        self, instruction: Instruction, operand: str, n: int, threads: Threads
    ) -> tuple[Array, Array]:
        """Memory in the instruction's type, and where in it the first of n elements lies."""
        dtype = dtype_of(instruction.opcode[-1])
        size = np.dtype(dtype).itemsize
        at = self.address(operand, threads, n * size)
        match instruction.opcode[1]:
            case "global":
                return MEMORY.view(dtype), (at - START) // size
            case "shared":
                return self.shared.view(dtype), at // size
        raise ValueError(f"{instruction.name} is not known here")

    def do_cp(self, instruction: Instruction, threads: Threads) -> None:
        everyone = self.numbers(threads)
        match instruction.opcode[1:], instruction.operands:
            case ("async", "cg", "shared", "global"), (to, source, "16"):
                here, there = self.address(to, threads, 16), self.address(source, threads, 16)
                self.copies.append((everyone, self.group[everyone], here, there))
            case ("async", "commit_group"), ():
                self.group[everyone] += 1
            case ("async", "wait_group"), (under_way,):
                self.finish_copies(everyone, int(under_way))
            case _:
                raise ValueError(f"{instruction.name} is not known here")

    def finish_copies(self, waiting: Array, under_way: int) -> None:
        """The copies of `waiting`, but for those of their newest groups."""
        waits = np.zeros(self.n, bool)
        waits[waiting] = True
        left = []
        for copies in self.copies:
            thread, group, here, there = copies
            done = waits[thread] & (group < self.group[thread] - under_way)
            for i in range(16):
                self.shared[here[done] + i] = MEMORY[there[done] - START + i]
            if not done.all():
                left.append(tuple(each[~done] for each in copies))
        self.copies = left  # type: ignore[assignment]

    def by_warp(self, operand: str, threads: Threads) -> Array:
        """(n_warps, 32) words. RuntimeError where a part of a warp is elsewhere."""
        lanes = self.numbers(threads) % LANES
        if len(lanes) % LANES or (lanes.reshape(-1, LANES) != np.arange(LANES)).any():
            raise RuntimeError(f"{self.kernel.name}: threads of a warp do not act together")
        return self.value(operand, np.uint32, threads).reshape(-1, LANES)

    def do_shfl(self, instruction: Instruction, threads: Threads) -> None:
        to, source, which, clamp, members = instruction.operands
        held, other = self.by_warp(source, threads), self.by_warp(which, threads)
        whole = (self.by_warp(clamp, threads) == LANES - 1) & (
            self.by_warp(members, threads) == 2**32 - 1
        )
        if not whole.all():
            raise ValueError(f"{self.kernel.name}: a shuffle in a part of a warp")
        match instruction.opcode[1:]:
            case ("sync", "idx", "b32"):
                lane = other % LANES
            case ("sync", "bfly", "b32"):
                lane = np.arange(LANES) ^ other
            case _:
                raise ValueError(f"{instruction.name} is not known here")
        register, _, inside = to.partition("|")
        self.write(register, np.take_along_axis(held, lane, 1).reshape(-1), threads)
        if inside:
            self.write(inside, np.ones(held.size, bool), threads)

    def do_mma(self, instruction: Instruction, threads: Threads) -> None:
        if instruction.name != "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32":
            raise ValueError(f"{instruction.name} is not known here")
        to, *sources = instruction.operands
        fragments = [
            np.stack([self.by_warp(name, threads) for name in names_in(source)], -1)
            for source in sources
        ]
        sums = matrix_product(*fragments).reshape(-1, 4)
        for register, values in zip(names_in(to), sums.T, strict=True):
            self.write(register, np.ascontiguousarray(values), threads)


def join(at: dict[int, Array], pc: int, threads: Array) -> None:
    """Threads come to `pc`, where others may be."""
    at[pc] = np.union1d(at[pc], threads) if pc in at else threads
