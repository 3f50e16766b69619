"""All that is measured on a GPU, one part after another, in one report."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from gpu_runs.correctness import check_widths
from gpu_runs.decode import BITS, measure_decode
from gpu_runs.peers import measure_peers
from gpu_runs.products import Row, Shape, activation_bits, measure_bf16, measure_products
from gpu_runs.report import GpuLost, Report, header
from gpu_runs.targets import verdicts
from gpu_runs.timing import measured_roofs


def measure(
    parts: Collection[str],
    shapes: Sequence[Shape],
    widths: Sequence[int],
    tokens: Sequence[int],
    file: Path | None,
    commit: str | None,
) -> int:
    """The exit status: 1 where anything failed, whatever the times are."""
    if not torch.cuda.is_available():
        print("there is no GPU for torch here; --compile-only needs none", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    start = time.monotonic()
    report = Report(file, header(commit))
    rows: list[Row] = []
    try:
        broken = check_widths(report, widths) if "correctness" in parts else set()
        if "products" in parts or "peers" in parts:
            roofs = measured_roofs()
            text = (
                f"copies {roofs.copy_bandwidth / 1e9:.0f} GB/s,"
                f" bf16 products {roofs.matmul_rate / 1e12:.0f} TFLOPS"
            )
            report.put("roofs", asdict(roofs), text)
            bf16 = measure_bf16(report, shapes, tokens)
        if "products" in parts:
            for row in measure_products(report, roofs, bf16, shapes, widths, tokens, broken):
                rows.append(row)  # one by one, to have them where the GPU is lost
        if "decode" in parts:
            measure_decode(report, quantized=(BITS, activation_bits(BITS)) not in broken)
        if "peers" in parts:
            measure_peers(report, bf16, shapes, tokens)
    except GpuLost as error:
        report.error("the GPU is lost to this process", f"nothing more was measured: {error}")
    if "products" in parts:
        found = list(verdicts(rows, widths))
        report.put("targets", found, "\n".join(found))
    seconds = time.monotonic() - start
    report.put("seconds", seconds, f"took {seconds:.0f} s")
    return 1 if report.has_errors else 0
