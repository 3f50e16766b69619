"""Plans from costs that are measured again around the plan they lead to.

Worth its time where single costs do not add up: plain rounding at about 3 bits. With error
propagation it found no better plan on SmolLM2, so it is off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lwquant.best_plan import best_plan
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.quantizers import Quantizer
from lwquant.recipe import Recipe
from lwquant.sensitivity.around_plan import around_plan
from lwquant.stages import few_windows, plan_report
from lwquant.types import BitPlan, SensitivityReport


def remeasured_plan(
    opened: OpenModel,
    report: SensitivityReport,
    bpw: float,
    recipe: Recipe,
    windows: Windows,
    progress: Progress,
) -> tuple[SensitivityReport, BitPlan]:
    """The plan whose model, really quantized, has the least KL on the held-out windows.

    Candidates are the plan of `report`, the plan of costs measured again around the plan in
    `recipe.remeasure` rounds, and the uniform plan; they are compared without learned rounding.
    Returns the winner and the report it is from.
    """
    rounding = recipe.rounding()
    uniform = plan_report(report, bpw, recipe=recipe.changed(allocator="uniform"))
    again = remeasured(
        opened,
        report,
        uniform,
        lambda costs: plan_report(costs, bpw, recipe=recipe),
        recipe.cost_quantizer(),
        few_windows(windows.calibration, recipe).tokens,
        recipe.remeasure,
        progress,
    )
    candidates = {
        "costs measured one by one": (report, plan_report(report, bpw, recipe=recipe)),
        "costs measured around the plan": (again, plan_report(again, bpw, recipe=recipe)),
        "uniform": (report, uniform),
    }
    plans = {name: plan for name, (_, plan) in candidates.items()}
    best, note = best_plan(opened, plans, rounding, windows, progress)
    chosen, plan = candidates[best]
    return chosen, replace(plan, notes=(*plan.notes, note))


def remeasured(
    opened: OpenModel,
    report: SensitivityReport,
    start: BitPlan,
    plan_of: Callable[[SensitivityReport], BitPlan],
    quantizer: Quantizer,
    tokens: Tensor,
    rounds: int,
    progress: Progress,
) -> SensitivityReport:
    """A report of the same linears and schemes whose costs hold near a plan.

    Costs are measured around `start`, then around the plan that they lead to, and so on; each
    round's plan comes from the mean of all costs so far. Without the mean the plans swing to and
    fro between neighbours.
    """
    plan = start
    sums = torch.zeros_like(report.costs)
    for number in range(1, rounds + 1):
        sums += around_plan(
            opened.decoder, tokens, report.schemes, quantizer, plan.schemes, progress=progress
        ).costs
        metric = {"name": "around_plan", "rounds": number}
        report = replace(report, costs=sums / number, metric=metric, scores=None)
        plan = plan_of(report)
    return report
