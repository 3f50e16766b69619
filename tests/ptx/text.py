"""PTX as NVRTC writes it: kernels, their instructions, labels and shared variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # ("add", "s32")
    operands: tuple[str, ...]  # the first is mostly what is written
    predicate: str = ""  # "%p1", "!%p1"

    @property
    def name(self) -> str:
        return ".".join(self.opcode)


@dataclass
class Kernel:
    name: str
    parameter_bytes: int
    most_threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # by the start of their names: "b32"
    shared: dict[str, int] = field(default_factory=dict)  # where each variable lies
    shared_bytes: int = 0


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name; ValueError for what is not understood.

    >>> kernel = parse('''.visible .entry f( .param .align 8 .b8 f_param_0[16] )
    ... .maxntid 128, 1, 1
    ... {
    ... .reg .b32 %r<3>;
    ... .shared .align 16 .b8 own[64];
    ... $L_1: @!%p1 bra $L_1; { cp.async.wait_group 1; } ret;
    ... }''')["f"]
    >>> kernel.parameter_bytes, kernel.most_threads, kernel.labels, kernel.shared_bytes
    (16, 128, {'$L_1': 0}, 64)
    >>> kernel.registers
    {'%r': 'b32'}
    >>> [(step.name, step.operands, step.predicate) for step in kernel.instructions]
    [('bra', ('$L_1',), '!%p1'), ('cp.async.wait_group', ('1',), ''), ('ret', (), '')]
    """
    kernels = {}
    pattern = r"\.entry\s+(\w+)\((.*?)\)\s*(.*?)\{(.*?)\n\}"
    for name, parameters, directives, body in re.findall(
        pattern, re.sub(r"//[^\n]*", "", text), re.DOTALL
    ):
        size = re.fullmatch(r"\s*\.param \.align \d+ \.b8 \w+\[(\d+)\]\s*", parameters)
        most = re.search(r"\.maxntid (\d+)", directives)
        if not size or not most:
            raise ValueError(f"{name}: parameters {parameters!r}, {directives!r}")
        kernel = kernels[name] = Kernel(name, int(size[1]), int(most[1]))
        for statement in _statements(body):
            _read(kernel, statement)
    return kernels


def names_in(operand: str) -> list[str]:
    """
    >>> names_in("{%r1, %r2}"), names_in("%r1")
    (['%r1', '%r2'], ['%r1'])
    """
    return operand.strip("{}").replace(",", " ").split()


def _statements(body: str) -> Iterator[str]:
    """Labels, with their colon, and what ends with a semicolon; braces of a block are dropped."""
    for part in body.split(";"):
        rest = part.strip()
        while found := re.match(r"([$\w]+:)(?!:)\s*|[{}]\s*", rest):
            if found[1]:
                yield found[1]
            rest = rest[found.end() :]
        if rest:
            yield rest


def _read(kernel: Kernel, statement: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.instructions)
    elif shared := re.fullmatch(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", statement):
        align, size = int(shared[1]), int(shared[3])
        kernel.shared[shared[2]] = start = -(-kernel.shared_bytes // align) * align
        kernel.shared_bytes = start + size
    elif registers := re.fullmatch(r"\.reg \.(\w+)\s+(%[a-z]+)<\d+>", statement):
        kernel.registers[registers[2]] = registers[1]
    elif not statement.startswith(".pragma"):
        found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
        if not found:
            raise ValueError(f"{kernel.name}: {statement!r}")
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", found[3])
        opcode = tuple(found[2].replace("::", ":").split("."))
        kernel.instructions.append(Instruction(opcode, tuple(operands), found[1] or ""))
