"""The cheapest plan within the budget, exactly: a multiple-choice knapsack solved by HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lwquant.allocators.problem import Problem

RELATIVE_GAP = 1e-6


def exact(problem: Problem, budget: int, *, seconds: float = 60.0) -> list[int]:
    """Minimize the summed cost subject to summed stored bits ≤ budget, one scheme per row.

    Args:
        budget: stored bits.
        seconds: time limit of the solver; optimality is proved to a relative gap of 1e-6.

    Raises BudgetError outside floor and ceiling, RuntimeError when the solver proves no optimum.
    """
    problem.check(budget)
    rows, columns = np.nonzero(problem.allowed())
    costs, sizes = problem.costs[rows, columns], problem.sizes[rows, columns]
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    # Sizes and costs are brought to order one: the solver's feasibility tolerance is absolute.
    bits = csr_array(sizes[None, :] / budget)
    scale = max(costs.max(), np.finfo(float).tiny)
    result = milp(
        costs / scale,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits, 0, 1)],
        options={"time_limit": seconds, "mip_rel_gap": RELATIVE_GAP},
    )
    if result.x is None or result.status != 0:
        raise RuntimeError(f"the solver found no optimal plan: {result.message}")
    picked = np.flatnonzero(result.x > 0.5)
    choice = np.empty(len(problem.names), dtype=int)
    choice[rows[picked]] = columns[picked]
    return _repair(problem, choice, budget).tolist()


def _repair(problem: Problem, choice: np.ndarray, budget: int) -> np.ndarray:
    """The solver's tolerance may overspend by a few bits: step down where that costs least."""
    while problem.size_of(choice) > budget:
        saved = problem.sizes[np.arange(len(choice)), choice][:, None] - problem.sizes
        extra = problem.costs - problem.costs[np.arange(len(choice)), choice][:, None]
        rate = np.where(saved > 0, extra / np.maximum(saved, 1), np.inf)
        row, column = np.unravel_index(rate.argmin(), rate.shape)
        choice[row] = column
    return choice
