"""Local search on the model's measured loss, from a plan: one linear up, another down.

Costs of single linears miss how errors meet; measuring whole plans does not. A move takes a linear
to the next wider scheme and pays with another at the next narrower one, as in the swap
neighbourhoods of knapsack problems. It is measured with weights quantized before (swapped_model.py)
on calibration windows, and kept where the KL falls.

Which move is next follows the costs: the one that would gain most if they were wrong by OPTIMISM in
its favour. Each measured move corrects the two costs it used by half of the surprise each, so that
a linear that disappointed is not tried with every partner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lwquant.allocators.plan import choice_of, plan_of
from lwquant.allocators.problem import Array, Problem, menus_of, neighbours
from lwquant.best_plan import best_plan
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.stages import plans_of_others, problem_for
from lwquant.swapped_model import swapped_model
from lwquant.types import BitPlan, SensitivityReport

OPTIMISM = 0.5


def searched_plan(
    opened: OpenModel,
    report: SensitivityReport,
    start: BitPlan,
    bpw: float,
    recipe: Recipe,
    windows: Windows,
    progress: Progress,
) -> BitPlan:
    """The plan of least KL on the held-out windows, really quantized: the one that
    `recipe.local_search` measured moves lead to from `start`, `start` itself, uniform or spikes.

    Ties and pins of the recipe hold. A linear moves by one scheme at most.
    """
    problem = problem_for(report, recipe)
    budget = int(bpw * problem.n_weights)
    search = Search(problem, choice_of(problem, start), budget)
    model = swapped_model(opened, search.menus(), start, recipe, windows, progress)
    before = model.kl
    search.scale_costs(model.kl)
    kept: list[bool] = []
    while len(kept) < recipe.local_search and (move := search.next_move()) is not None:
        progress("local search", f"KL {model.kl:.4f}", len(kept), recipe.local_search)
        had = model.kl
        kl = model.change(search.schemes_of(move))
        kept.append(kl < had)
        search.record(move, kl - had, kept=kl < had)
    progress("local search", "done", recipe.local_search, recipe.local_search)
    allocator = {**start.allocator, "local_search": recipe.local_search}
    candidates = {
        "local search": plan_of(problem, search.choice, report.linears, allocator, start.notes),
        "the plan it started from": start,
    }
    candidates |= plans_of_others(report, bpw, recipe, ("uniform", "spikes"))
    best, note = best_plan(opened, candidates, recipe.rounding(), windows, progress)
    found = (
        f"local search: {sum(kept)} of {len(kept)} measured moves kept, KL {before:.4f} to "
        f"{model.kl:.4f} on {model.n_windows} calibration windows, without propagation"
    )
    plan = candidates[best]
    return replace(plan, notes=(*plan.notes, found, note))


@dataclass(frozen=True)
class Move:
    """Row `up` goes to column `wider`; row `down` pays by going to `narrower`, where one must."""

    up: int
    wider: int
    down: int | None
    narrower: int | None

    def columns(self) -> dict[int, int]:
        paying = {} if self.down is None or self.narrower is None else {self.down: self.narrower}
        return {self.up: self.wider, **paying}


class Search:
    """Which moves there are from a plan within a budget, and what is known about them."""

    def __init__(self, problem: Problem, choice: list[int], budget: int) -> None:
        """
        Args:
            choice: column of each row, of at most `budget` stored bits, within the time limit.
        """
        self.problem = problem
        self.choice = list(choice)
        self.budget = budget
        self._costs = problem.costs.copy()
        self._tried: set[Move] = set()
        self._near = [neighbours(problem, row, column) for row, column in enumerate(choice)]

    def menus(self) -> dict[str, set[QuantScheme]]:
        """The schemes that each linear may have during the search."""
        return menus_of(self.problem, self._near)

    def scale_costs(self, measured: float) -> None:
        """Bring the costs to nats: the plan's sum becomes its measured KL."""
        predicted = self.problem.cost_of(self.choice)
        if predicted > 0 and measured > 0:
            self._costs *= measured / predicted

    def next_move(self) -> Move | None:
        """The untried move within the budget that promises most, None where all were tried."""
        rows = np.arange(len(self.choice))
        current = self._costs[rows, self.choice], self.problem.sizes[rows, self.choice]
        wider, narrower = self._beside(1), self._beside(-1)
        gain = np.where(wider >= 0, current[0] - self._costs[rows, wider], -np.inf)
        more = self.problem.sizes[rows, wider] - current[1]
        loss = np.where(narrower >= 0, self._costs[rows, narrower] - current[0], np.inf)
        less = current[1] - self.problem.sizes[rows, narrower]
        slack = self.budget - self.problem.size_of(self.choice)
        # The last column is for moves that nothing needs to pay for.
        loss, less = np.append(loss, 0.0), np.append(less, 0)
        promise = (1 + OPTIMISM) * gain[:, None] - (1 - OPTIMISM) * loss[None]
        promise[more[:, None] - less[None] > slack] = -np.inf
        promise[rows, rows] = -np.inf
        for flat in np.argsort(-promise, axis=None, kind="stable"):
            up, down = (int(i) for i in np.unravel_index(flat, promise.shape))
            if not np.isfinite(promise[up, down]):
                return None
            paid = down < len(rows)
            move = Move(
                up, int(wider[up]), down if paid else None, int(narrower[down]) if paid else None
            )
            if move not in self._tried and self.problem.in_time(self._after(move)):
                return move
        return None

    def _after(self, move: Move) -> list[int]:
        choice = list(self.choice)
        for row, column in move.columns().items():
            choice[row] = column
        return choice

    def schemes_of(self, move: Move) -> dict[str, QuantScheme]:
        return {
            name: self.problem.schemes[column]
            for row, column in move.columns().items()
            for name in self.problem.names[row]
        }

    def record(self, move: Move, change: float, *, kept: bool) -> None:
        """Correct the costs by what the move changed the KL by, and follow it where it was kept."""
        columns = move.columns()
        predicted = sum(
            self._costs[row, column] - self._costs[row, self.choice[row]]
            for row, column in columns.items()
        )
        for row, column in columns.items():
            self._costs[row, column] += (change - predicted) / len(columns)
        self._tried.add(move)
        if kept:
            self.choice = self._after(move)

    def _beside(self, step: int) -> Array:
        """The next wider (1) or narrower (-1) column of each row, -1 where there is none."""
        found = []
        for near, column in zip(self._near, self.choice, strict=True):
            place = near.index(column) + step
            found.append(near[place] if 0 <= place < len(near) else -1)
        return np.array(found)
