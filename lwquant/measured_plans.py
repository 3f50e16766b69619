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
from lwquant.embedding_choice import check_embeddings, with_embeddings
from lwquant.evaluation.windows import windows_of
from lwquant.held_out import measure_on
from lwquant.massive_channels import check_roles
from lwquant.prepare import OpenModel, Windows, prepare_tokens
from lwquant.progress import Progress
from lwquant.recipe import Recipe
from lwquant.rounding import Rounding
from lwquant.sensitivity.report import write_report
from lwquant.stages import measure
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


@dataclass(frozen=True)
class Bench:
    """A model whose costs are known, ready to measure plans of it, and the folder for results."""

    opened: OpenModel
    report: SensitivityReport
    windows: Windows
    tested: Tensor  # windows (n, seq_len) that plans are measured on
    folder: Path


def bench_for(
    opened: OpenModel,
    recipe: Recipe,
    texts: Sequence[str] | None,
    folder: Path,
    progress: Progress,
    *,
    text: str | Path | None,
    n_windows: int,
) -> Bench:
    """Draw the windows, measure the costs and write them into `folder`.

    Args:
        texts: to calibrate on instead of the recipe's sources.
        text: file to measure plans on, in `n_windows` evenly spread windows; the held-out windows
            where it is None.
    """
    check_roles(opened.decoder.linears, recipe.unclipped_qk)
    check_embeddings(opened, recipe)
    windows = prepare_tokens(opened, recipe, texts, progress)
    opened = with_embeddings(opened, recipe, windows.calibration.tokens, progress)
    tested = windows.held_out
    if text is not None:
        content = read_text_file(Path(text))
        tested = windows_of(content, opened.tokenizer, recipe.seq_len, n_windows)
    report = measure(opened, windows.calibration, recipe, progress)
    write_report(report, folder / "sensitivity.json")
    return Bench(opened, report, windows, tested, folder)


def measure_plans(
    bench: Bench, plans: Sequence[tuple[str, BitPlan]], rounding: Rounding, progress: Progress
) -> list[MeasuredPlan]:
    """Quantize with each (series, plan), write the plan into the folder, and measure."""
    opened, windows, tested = bench.opened, bench.windows, bench.tested
    rows = []
    for series, plan in plans:
        write_plan(plan, bench.folder / f"plan-{series}-{plan.bpw:.3f}.json")
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
                predicted_cost(bench.report, plan),
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
