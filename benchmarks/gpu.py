"""The GPU kernels: what the compiler makes of them, or how fast they are.

    python benchmarks/gpu.py --compile-only              # all for all architectures, no GPU
    python benchmarks/gpu.py --compile-only --architectures sm_90a --bits 4
    python benchmarks/gpu.py --json FILE                 # on a GPU: correctness, then times
    python benchmarks/gpu.py --parts products --shapes 8192x8192 --bits 3 4 --tokens 1 16

--compile-only prints registers, spills, shared memory and tensor-core instructions of every kernel,
and ends with status 1 where one breaks a rule: more than 128 registers (168 for multiply_many_32,
255 for multiply_many_64), anything spilled or in local memory, tensor cores where none are meant or
none where they are.

Without it all widths are checked against float64 products first, each in a process of its own; what
is wrong is named, and times are those of the others. A time is the median of a CUDA graph's
replays, over as many calls as last some milliseconds; each call takes the next of a pool of weights
that is twice the L2 cache. They are set beside F.linear in bf16, the bandwidth of a copy and the
rate of a bf16 product, measured in the same run, and beside 4-bit peers; a random Llama of 7B is
decoded in 4 bits and in bf16. FILE is whole after every row. The status is 1 where anything failed,
not where a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_runs.compiled import ARCHITECTURES, LAYER_KINDS, KernelCode, compiled_kernels

from lwquant.ops.cuda.nvrtc import RoundingKind
from lwquant.scheme import WIDTHS

PARTS = ("correctness", "products", "decode", "peers")
COLUMNS = ("kernel", "kind", "target", "registers", "spilled", "stack", "shared", "IMMA")
ROW = "{:<17} {:<12} {:<7} {:>9} {:>7} {:>5} {:>6} {:>5}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile-only", action="store_true", help="needs NVRTC, but no GPU")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="sm_N")
    parser.add_argument("--bits", nargs="+", type=int, default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="to measure")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N")
    parser.add_argument("--json", type=Path, help="where measured rows go")
    parser.add_argument("--commit", help="of the code, where it is a copy without history")
    parser.add_argument("--check", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile_only:
        return compile_all(arguments.architectures, arguments.bits)
    if arguments.check:
        from gpu_runs.correctness import print_failures

        return print_failures(*arguments.check)
    from gpu_runs.measure import measure
    from gpu_runs.products import SHAPES, TOKENS

    return measure(
        arguments.parts,
        arguments.shapes or SHAPES,
        arguments.bits,
        arguments.tokens or TOKENS,
        arguments.json,
        arguments.commit,
    )


def shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of a layer.

    >>> shape("4096x11008")
    (4096, 11008)
    """
    out_features, in_features = text.split("x")
    return int(out_features), int(in_features)


def compile_all(architectures: list[str], widths: list[int]) -> int:
    print(ROW.format(*COLUMNS, "").rstrip())
    n_broken = 0
    for kind in (*(kind for kind in LAYER_KINDS if kind.bits in widths), RoundingKind()):
        for architecture in architectures:
            for kernel in compiled_kernels(kind, architecture):
                rules = list(kernel.broken_rules())
                n_broken += bool(rules)
                print(ROW.format(*cells(kernel), "; ".join(rules)).rstrip(), flush=True)
    print(f"{n_broken} kernels break a rule", file=sys.stderr)
    return 1 if n_broken else 0


def cells(kernel: KernelCode) -> tuple[str | int, ...]:
    return (
        kernel.name,
        kernel.kind.label,
        kernel.architecture,
        kernel.registers,
        kernel.spill_bytes,
        kernel.stack_bytes,
        kernel.shared_bytes,
        kernel.tensor_core_instructions,
    )


if __name__ == "__main__":
    sys.exit(main())
