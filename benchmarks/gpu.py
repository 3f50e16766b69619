"""The GPU kernels: what the compiler makes of them, or how fast they are.

    python benchmarks/gpu.py --compile-only              # all for all architectures, no GPU
    python benchmarks/gpu.py --compile-only --architectures sm_90a --bits 4
    python benchmarks/gpu.py --json FILE                 # on a GPU: correctness, then times

--compile-only prints registers, spills, shared memory and tensor-core instructions of every kernel,
and ends with status 1 where one breaks a rule: more than 128 registers (168 for multiply_many_32),
anything spilled or in local memory, tensor cores where none are meant or none where they are.

Without it every shape and width is checked against a float64 product first. A time is the median
of a CUDA graph's replays, over as many calls as it holds; each call takes the next of a pool of
weights that is larger than the L2 cache. They are set beside F.linear in bf16, the bandwidth of a
copy and the rate of a bf16 product, measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_runs.compiled import ARCHITECTURES, LAYER_KINDS, KernelCode, compiled_kernels

from lwquant.ops.cuda.nvrtc import RoundingKind
from lwquant.scheme import WIDTHS

COLUMNS = ("kernel", "kind", "target", "registers", "spilled", "stack", "shared", "IMMA")
ROW = "{:<17} {:<12} {:<7} {:>9} {:>7} {:>5} {:>6} {:>5}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile-only", action="store_true", help="needs NVRTC, but no GPU")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="sm_N")
    parser.add_argument("--bits", nargs="+", type=int, default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--json", type=Path, help="where measured rows go")
    arguments = parser.parse_args()
    if arguments.compile_only:
        return compile_all(arguments.architectures, arguments.bits)
    from gpu_runs.measure import measure

    return measure(arguments.bits, arguments.json)


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
