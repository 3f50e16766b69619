"""Perplexity and KL against bits: mixed plans at several budgets beside the uniform ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwquant.allocators.plan import uniform_plan
from lwquant.evaluation.plot import plot_agreement, plot_sweep
from lwquant.export.folder import check_output, new_folder, write_manifest
from lwquant.matmul import fast_float32
from lwquant.measured_plans import MeasuredPlan, bench_for, measure_plans, write_rows
from lwquant.prepare import OpenModel, open_model
from lwquant.progress import Progress, StderrProgress
from lwquant.recipe import Recipe, transform_of
from lwquant.stages import check_budget, merged, plan_report
from lwquant.types import BitPlan


def sweep(
    model: str | Path,
    *,
    bpw: Sequence[float],
    output: str | Path,
    text: str | Path | None = None,
    windows: int = 12,
    recipe: str | Path | Recipe = "default",
    calibration: str | Sequence[str] | None = None,
    device: str = "cpu",
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> list[MeasuredPlan]:
    """Quantize at each budget and at each uniform width in their range, and measure.

    Writes sweep.csv, sweep.png (quality against bits), agreement.png (measured against predicted
    loss), sensitivity.json and a plan per budget into `output`.

    Args:
        bpw: budgets in bits per weight.
        text: file to measure on, in `windows` evenly spread windows of the recipe's seq_len; by
            default the held-out windows of the calibration texts.

    Raises LwquantError as quantize() does.
    """
    progress = progress or StderrProgress()
    chosen, texts = merged(recipe, calibration, settings)
    rounding = chosen.rounding()
    chosen.refuse_replanning(
        "is for one budget: quantize to each instead of a sweep", "max_decode_us"
    )
    check_output(output, overwrite)
    with fast_float32(), new_folder(output, overwrite) as folder:
        opened = open_model(model, device, revision, transform_of(chosen.transform))
        for budget in bpw:
            check_budget(opened, chosen, budget)
        bench = bench_for(opened, chosen, texts, folder, progress, text=text, n_windows=windows)
        plans = [("mixed", plan_report(bench.report, b, recipe=chosen)) for b in sorted(bpw)]
        plans += [("uniform", plan) for plan in _uniform_plans(opened, chosen, min(bpw), max(bpw))]
        rows = measure_plans(bench, plans, rounding, progress)
        write_rows(rows, folder / "sweep.csv")
        plot_agreement(rows, folder / "agreement.png", model=opened.name)
        plot_sweep(rows, folder / "sweep.png", model=opened.name, text=str(text or "held-out"))
        write_manifest(folder)
    return rows


def _uniform_plans(opened: OpenModel, recipe: Recipe, low: float, high: float) -> list[BitPlan]:
    """Uniform plans inside the range of budgets, and the nearest one on each side of it."""
    plans = [
        uniform_plan(opened.decoder.linears, scheme)
        for scheme in recipe.schemes()
        if not scheme.is_float
    ]
    below = [plan for plan in plans if plan.bpw < low][-1:]
    above = [plan for plan in plans if plan.bpw > high][:1]
    return [*below, *(plan for plan in plans if low <= plan.bpw <= high), *above]
