"""The multiple-choice knapsack by dynamic programming: exact whatever the costs are like.

A branch-and-bound solver is fast where costs differ, and may take minutes where many are nearly
equal. A table over all capacities never does, but has a cell for each: it is for small models.
"""

from __future__ import annotations

import numpy as np

from lwquant.allocators.problem import Array, Problem

MOST_CELLS = 20_000_000  # rows times capacities; a byte and a few operations per scheme each


def fits_table(problem: Problem, budget: int) -> bool:
    """Whether the table for `budget` stored bits is small enough to be filled."""
    return len(problem.names) * (budget // _unit(problem) + 1) <= MOST_CELLS


def solve_by_table(problem: Problem, budget: int) -> Array:
    """Columns (n_rows,) of least summed cost within `budget` stored bits; times are not looked at.

    The budget must be within the problem's bounds.
    """
    unit = _unit(problem)
    sizes, room = problem.sizes // unit, budget // unit
    least = np.zeros(room + 1)  # cost of the rows so far, by the capacity they may use
    picks = np.zeros((len(sizes), room + 1), dtype=np.uint8)
    allowed = problem.allowed()
    for row, pick in enumerate(picks):
        before, least = least, np.full(room + 1, np.inf)
        for column in np.flatnonzero(allowed[row] & (sizes[row] <= room)):
            size = sizes[row, column]
            cost = before[: room + 1 - size] + problem.costs[row, column]
            better = cost < least[size:]
            least[size:][better] = cost[better]
            pick[size:][better] = column
    choice = np.empty(len(sizes), dtype=int)
    for row in reversed(range(len(sizes))):
        choice[row] = picks[row, room]
        room -= sizes[row, choice[row]]
    return choice


def _unit(problem: Problem) -> int:
    """The bits that all sizes are whole numbers of."""
    return int(np.gcd.reduce(problem.sizes[problem.allowed()]))
