"""The smallest model whose measured KL stays under a limit, by bisection on the bit budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lwquant.allocators.problem import problem_of
from lwquant.held_out import measure_on
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.rounding import Rounding
from lwquant.types import BitPlan, SensitivityReport

TOLERANCE_BPW = 0.03
MAX_TRIALS = 8


def smallest_plan(
    opened: OpenModel,
    report: SensitivityReport,
    plan_at: Callable[[float], BitPlan],
    rounding: Rounding,
    windows: Windows,
    max_kl: float,
    progress: Progress,
) -> BitPlan:
    """The plan of fewest bits found whose measured KL on the held-out windows is ≤ max_kl.

    Every trial quantizes the model for real. Trials are placed where the predicted cost, scaled by
    the last ratio of measured to predicted, meets the limit, inside a bracket that only shrinks;
    it ends when the bracket is TOLERANCE_BPW wide or after MAX_TRIALS. Where no trial met the
    limit, the ceiling of the menu is returned.
    """
    problem = problem_of(report)
    floor, ceiling = (bits / problem.n_weights for bits in problem.bounds())
    # A uniform allocator has nothing below its own floor; the bracket starts where a plan exists.
    low, high = floor, ceiling
    best, ratio = plan_at(ceiling), 1.0
    for trial in range(MAX_TRIALS):
        if high - low <= TOLERANCE_BPW:
            break
        target = where_predicted(plan_at, max_kl / ratio, low, high)
        margin = (high - low) * 0.1
        target = min(max(target, low + margin), high - margin)
        plan = plan_at(target)
        progress("search", f"trial at {plan.bpw:.3f} bits per weight", trial, MAX_TRIALS)
        measured = measure_on(opened, plan, rounding, windows, progress).kl_divergence
        predicted = sum(plan.costs.values())
        if predicted > 0 and measured > 0:
            ratio = measured / predicted
        if measured <= max_kl:
            best, high = plan, plan.bpw
        else:
            low = target
    note = f"smallest plan found with measured KL ≤ {max_kl} on held-out windows"
    return replace(best, notes=(*best.notes, note))


def where_predicted(
    plan_at: Callable[[float], BitPlan], cost: float, low: float, high: float
) -> float:
    """Bits per weight in [low, high] where the plans' summed predicted cost falls to `cost`."""
    for _ in range(12):
        middle = (low + high) / 2
        if sum(plan_at(middle).costs.values()) > cost:
            low = middle
        else:
            high = middle
    return high
