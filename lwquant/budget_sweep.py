"""Perplexity and KL against bits: mixed plans at several budgets beside the uniform ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwquant.allocators.plan import uniform_plan
from lwquant.evaluation.plot import plot_agreement, plot_sweep
from lwquant.export.folder import check_output, new_folder, write_manifest
from lwquant.matmul import fast_float32
from lwquant.measured_plans import MeasuredPlan, measure_plans, tested_windows, write_rows
from lwquant.prepare import OpenModel, open_model, prepare_tokens
from lwquant.progress import Progress, StderrProgress
from lwquant.recipe import Recipe, rounding_of
from lwquant.sensitivity.report import write_report
from lwquant.stages import check_budget, measure, merged, plan_report
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
    rounding = rounding_of(chosen.quantizer, chosen.correction, chosen.polish)
    chosen.refuse_remeasure("is for one budget: quantize to each instead of a sweep")
    check_output(output, overwrite)
    with fast_float32(), new_folder(output, overwrite) as folder:
        opened = open_model(model, device, revision)
        for budget in bpw:
            check_budget(opened, chosen, budget)
        drawn = prepare_tokens(opened, chosen, texts, progress)
        tested = tested_windows(opened, drawn, text, windows)
        report = measure(opened, drawn.calibration, chosen, progress)
        write_report(report, folder / "sensitivity.json")
        plans = [("mixed", plan_report(report, budget, recipe=chosen)) for budget in sorted(bpw)]
        plans += [("uniform", plan) for plan in _uniform_plans(opened, chosen, min(bpw), max(bpw))]
        rows = measure_plans(opened, report, plans, rounding, drawn, tested, folder, progress)
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
