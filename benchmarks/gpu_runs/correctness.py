"""Products with small and odd layers against float64: before anything is timed.

A process of its own for every width and kind of activations: they compile side by side, and where
one is lost with its GPU, or does not end, the others are not.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_runs.layers import Layer, random_layer, times_the_bound
from gpu_runs.report import Report
from lwquant import ops
from lwquant.ops.activations import ACTIVATION_BITS
from lwquant.scheme import WHOLE_ROW, QuantScheme

SCRIPT = Path(__file__).resolve().parent.parent / "gpu.py"
# One output, part tiles, part blocks, part groups; enough inputs that they are split 16 ways.
SHAPES = ((1, 32), (16, 128), (33, 700), (70, 129), (264, 4100))  # outputs, inputs
GROUPS = (32, 64, 128, WHOLE_ROW)
TOKENS = (1, 2, 8, 9, 16, 17, 33, 64, 65, 256, 257, 513)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SECONDS = 180  # that a process may take, most of them for three compilations
PRINTED = 10  # failures of each
LAST_LINES = 6  # of what a process said: CUDA's errors take several


@dataclass(frozen=True)
class Checked:
    bits: int
    activation_bits: int
    failures: list[str]


def check_widths(report: Report, widths: Sequence[int]) -> set[tuple[int, int]]:
    """The pairs of widths and activation bits that are not right; all are in the report."""
    pairs = list(itertools.product(widths, ACTIVATION_BITS))
    broken = set()
    with ThreadPoolExecutor(min(len(pairs), os.cpu_count() or 1)) as pool:
        for pair, failures in zip(pairs, pool.map(_run_process, pairs), strict=True):
            name = "{} bits, {}-bit activations".format(*pair)
            report.add("correctness", Checked(*pair, failures), f"{name}: {_summary(failures)}")
            if failures:
                broken.add(pair)
                report.error(name, f"{len(failures)} failures, the first: {failures[0]}")
    return broken


def _summary(failures: Sequence[str]) -> str:
    more = [f"and {len(failures) - PRINTED} more"] if len(failures) > PRINTED else []
    return "\n    ".join(["not right", *failures[:PRINTED], *more]) if failures else "right"


def _run_process(pair: tuple[int, int]) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--check", *map(str, pair)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [f"no end within {SECONDS} s"]
    failures = done.stdout.splitlines()
    said = done.stderr.strip().splitlines()
    if done.returncode and (said or not failures):  # perhaps an end before all was checked
        last = " | ".join(said[-LAST_LINES:]) or "nothing"
        failures.append(f"status {done.returncode}, and it said: {last}")
    return failures


def print_failures(bits: int, activation_bits: int) -> int:
    """The process' own part: a line for every failure, and the exit status."""
    torch.set_grad_enabled(False)
    n_failures = 0
    for failure in failures(bits, activation_bits, torch.Generator("cuda").manual_seed(bits)):
        n_failures += 1
        print(failure, flush=True)
    return 1 if n_failures else 0


def failures(
    bits: int, activation_bits: int, generator: torch.Generator, tokens: Sequence[int] = TOKENS
) -> Iterator[str]:
    """What is wrong on the generator's device, by name."""
    for (out_features, in_features), group_size in itertools.product(SHAPES, GROUPS):
        scheme = QuantScheme(bits, group_size)
        layer = random_layer(scheme, out_features, in_features, generator)
        of_layer = f"{scheme.label}, {out_features} x {in_features}"
        if not torch.equal(
            ops.dequantize_tiled(layer.tiles, out_features, in_features), _dequantized(layer)
        ):
            yield f"{of_layer}: weights differ"
        for n_tokens, dtype in itertools.product(tokens, DTYPES):
            name = f"{of_layer}, {n_tokens} tokens of {str(dtype).removeprefix('torch.')}"
            try:
                x, bias = (
                    torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
                    for shape in ((n_tokens, in_features), (out_features,))
                )
                worst = times_the_bound(layer, x, bias, activation_bits)
            except Exception as error:
                yield f"{name}: {type(error).__name__}: {error}".splitlines()[0]
                if _is_lost():
                    yield "the GPU is lost to this process: nothing after it was checked"
                    return
                continue
            if not worst <= 1:
                yield f"{name}: {worst:.3g} times the bound"


def _dequantized(layer: Layer) -> Tensor:
    """The weight as kernels compute it: exact but for one rounding to float32."""
    return layer.weight.float()


def _is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
