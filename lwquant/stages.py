"""The stages of a run one at a time: model -> sensitivity report, report -> plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lwquant.allocators.exact import check_time
from lwquant.allocators.plan import constrained, make_plan
from lwquant.allocators.problem import Problem, fused_groups, problem_of
from lwquant.capture.tokens import from_tokens
from lwquant.errors import BudgetError, LwquantError, PlanError
from lwquant.matmul import fast_float32
from lwquant.prepare import OpenModel, open_model, prepare_tokens
from lwquant.progress import Progress, StderrProgress
from lwquant.recipe import (
    Recipe,
    allocator_of,
    load_recipe,
    metric_of,
    transform_of,
)
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.report import measure_sensitivity, read_report
from lwquant.types import BitPlan, CalibrationSet, SensitivityReport

EFFORTS = ("fast", "default", "best")


def measure_model(
    model: str | Path,
    *,
    recipe: str | Path | Recipe = "default",
    calibration: str | Sequence[str] | None = None,
    device: str = "cpu",
    revision: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> SensitivityReport:
    """What storing each linear in each scheme of the menu costs the model.

    Arguments as for quantize(). Raises LwquantError as quantize() does.
    """
    progress = progress or StderrProgress()
    chosen, texts = merged(recipe, calibration, settings)
    metric_of(chosen.metric), chosen.cost_quantizer()  # fail here, not later
    with fast_float32():
        opened = open_model(model, device, revision, transform_of(chosen.transform))
        windows = prepare_tokens(opened, chosen, texts, progress)
        return measure(opened, windows.calibration, chosen, progress)


def plan(
    report: str | Path | SensitivityReport,
    *,
    bpw: float,
    recipe: str | Path | Recipe = "default",
    **settings: Any,
) -> BitPlan:
    """The allocator's plan for a report; BudgetError outside floor and ceiling."""
    known = report if isinstance(report, SensitivityReport) else read_report(Path(report))
    chosen, _ = merged(recipe, None, settings)
    chosen.refuse_replanning("needs the model: quantize() does it, a plan from a report cannot")
    return plan_report(known, bpw, recipe=chosen)


def merged(
    recipe: str | Path | Recipe, calibration: str | Sequence[str] | None, settings: dict[str, Any]
) -> tuple[Recipe, list[str] | None]:
    """The recipe with single settings put in, and the texts where they were given themselves.

    The setting "effort" names one of the shipped recipes EFFORTS in place of `recipe`.
    """
    settings = dict(settings)
    effort = settings.pop("effort", None)
    if effort is not None:
        if recipe != "default":
            raise LwquantError(f"effort={effort!r} is a recipe itself: give it or recipe, not both")
        if effort not in EFFORTS:
            raise LwquantError(f"effort={effort!r} is not one of {', '.join(EFFORTS)}")
        recipe = effort
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.changed(**settings)
    chosen = chosen.changed(decode_times=chosen.times())  # a file is read once, and first of all
    if isinstance(calibration, str):
        return chosen.changed(sources=(calibration,)), None
    return chosen, None if calibration is None else list(calibration)


def measure(
    opened: OpenModel, windows: CalibrationSet, recipe: Recipe, progress: Progress
) -> SensitivityReport:
    """Run the recipe's metric on the first `sensitivity_samples` calibration windows."""
    report = measure_sensitivity(
        opened.decoder,
        few_windows(windows, recipe),
        recipe.schemes(),
        metric_of(recipe.metric),
        recipe.cost_quantizer(),
        model=opened.name,
        progress=progress,
    )
    return replace(report, transform=opened.transform)


def few_windows(windows: CalibrationSet, recipe: Recipe) -> CalibrationSet:
    """The first `sensitivity_samples` calibration windows."""
    return from_tokens(windows.tokens[: recipe.sensitivity_samples], windows.source, windows.seed)


def plan_report(report: SensitivityReport, bpw: float, *, recipe: Recipe) -> BitPlan:
    """Run the recipe's allocator with its ties and pins."""
    return make_plan(
        report,
        bpw,
        allocator_of(recipe.allocator),
        ties=_ties(report, recipe),
        pins=_pins(recipe),
        allow_worse=recipe.allow_worse,
        times=recipe.times(),
        max_time=recipe.max_decode_us,
    )


def plans_of_others(
    report: SensitivityReport, bpw: float, recipe: Recipe, allocators: Sequence[str]
) -> dict[str, BitPlan]:
    """Plans of other allocators, by name, to compare with; one that finds no plan is left out."""
    plans = {}
    for name in allocators:
        with suppress(BudgetError):  # a plan of one width may be too slow where a mixed one is not
            plans[name] = plan_report(report, bpw, recipe=recipe.changed(allocator=name))
    return plans


def problem_for(report: SensitivityReport, recipe: Recipe) -> Problem:
    """What plan_report() hands to the allocator."""
    ties, pins = _ties(report, recipe), _pins(recipe)
    return constrained(report, ties, pins, recipe.times(), recipe.max_decode_us)


def _ties(report: SensitivityReport, recipe: Recipe) -> list[list[str]]:
    return fused_groups([spec.name for spec in report.linears]) if recipe.tie_fused else []


def _pins(recipe: Recipe) -> dict[str, QuantScheme]:
    return {name: recipe.scheme(bits) for name, bits in recipe.pins.items()}


def check_budget(opened: OpenModel, recipe: Recipe, bpw: float) -> None:
    """BudgetError naming floor and ceiling or the fastest plan, before anything is measured."""
    blank = _blank_report(opened, recipe)
    problem = problem_of(blank)
    budget = int(bpw * problem.n_weights)
    problem.check(budget)
    if recipe.max_decode_us is not None:
        check_time(problem_for(blank, recipe), budget)


def blank_problem(opened: OpenModel, recipe: Recipe) -> Problem:
    """What is known before anything is measured: all costs are zero."""
    return problem_of(_blank_report(opened, recipe))


def _blank_report(opened: OpenModel, recipe: Recipe) -> SensitivityReport:
    linears, schemes = opened.decoder.linears, recipe.schemes()
    return SensitivityReport(linears, schemes, torch.zeros(len(linears), len(schemes)), {})


def check_times(opened: OpenModel, recipe: Recipe) -> None:
    """PlanError where the recipe's times lack a shape or scheme, before anything is measured."""
    times = recipe.times()
    if times is not None:
        times.of(opened.decoder.linears, recipe.schemes())


def check_report(report: SensitivityReport | None, opened: OpenModel) -> None:
    """PlanError when the report is of a model with other linears, or transformed otherwise."""
    if report is None:
        return
    if report.linears != opened.decoder.linears:
        raise PlanError(
            f"the sensitivity report of {report.model!r} has other linears than the model"
        )
    if report.transform != opened.transform:
        raise PlanError(
            f"the sensitivity report of {report.model!r} was measured with transform "
            f"{_named(report.transform)}, the run has {_named(opened.transform)}"
        )


def _named(transform: Mapping[str, object] | None) -> str:
    return "none" if transform is None else str(dict(transform))
