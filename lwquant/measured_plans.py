"""Plans measured one after another on the same windows, as rows of a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lwquant.allocators.plan import write_plan
from lwquant.capture.text import read_text_file
from lwquant.capture.tokens import tokenize
from lwquant.evaluation.windows import evenly_spread_windows
from lwquant.held_out import measure_on
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.recipe import Rounding
from lwquant.types import BitPlan, SensitivityReport


@dataclass(frozen=True)
class MeasuredPlan:
    """What a plan predicts and what its model, really quantized, does."""

    series: str  # the curve it is a point of
    bpw: float
    megabytes: float  # all weight files
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    predicted_cost: float  # sum of the metric's costs of the plan's choices; KL in nats for some


def tested_windows(
    opened: OpenModel, windows: Windows, text: str | Path | None, n_windows: int
) -> Tensor:
    """What to measure on: `n_windows` of a text file, evenly spread, or the held-out windows."""
    if text is None:
        return windows.held_out
    tokens = tokenize(read_text_file(Path(text)), opened.tokenizer)
    return evenly_spread_windows(tokens, windows.held_out.shape[1], n_windows)


def measure_plans(
    opened: OpenModel,
    report: SensitivityReport,
    plans: Sequence[tuple[str, BitPlan]],
    rounding: Rounding,
    windows: Windows,
    tested: Tensor,
    folder: Path,
    progress: Progress,
) -> list[MeasuredPlan]:
    """Quantize with each (series, plan), write the plan into `folder`, and measure on `tested`."""
    rows = []
    for series, plan in plans:
        write_plan(plan, folder / f"plan-{series}-{plan.bpw:.3f}.json")
        quality = measure_on(opened, plan, rounding, windows, progress, tested=tested)
        rows.append(
            MeasuredPlan(
                series,
                plan.bpw,
                (opened.other_bytes + plan.bpw * opened.n_weights / 8) / 1e6,
                quality.perplexity,
                quality.reference_perplexity,
                quality.kl_divergence,
                quality.top1_agreement,
                quality.tokens,
                predicted_cost(report, plan),
            )
        )
    return rows


def predicted_cost(report: SensitivityReport, plan: BitPlan) -> float:
    """What the metric says the plan costs: the sum over its linears."""
    column = {scheme: number for number, scheme in enumerate(report.schemes)}
    return sum(
        report.costs[row, column[plan.schemes[spec.name]]].item()
        for row, spec in enumerate(report.linears)
    )


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """CSV of records of one dataclass."""
    names = [field.name for field in fields(rows[0])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
