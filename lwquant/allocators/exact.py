"""The cheapest plan within the budget, exactly: a multiple-choice knapsack by table or by HiGHS."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lwquant.allocators.knapsack_table import fits_table, solve_by_table
from lwquant.allocators.problem import Array, Problem
from lwquant.errors import BudgetError

RELATIVE_GAP = 1e-6
# Enough where the time is up: costs are estimates, and many equal ones make the proof take long.
LAST_GAP = 1e-3
INFEASIBLE = 2  # status of scipy.optimize.milp


def exact(problem: Problem, budget: int, *, seconds: float = 10.0) -> list[int]:
    """Minimize the summed cost subject to summed stored bits ≤ budget, one scheme per row.

    With times, their sum is kept within the problem's limit as well: a second knapsack constraint.

    Args:
        budget: stored bits.
        seconds: that the solver may take to prove the cost least to a relative gap of 1e-6. Then
            a plan proved to be within 1e-3 of the least cost will do.

    Raises BudgetError outside floor and ceiling, where no plan within the budget is fast enough,
    and when nothing is proved in that time.
    """
    problem.check(budget)
    if problem.max_time is None and fits_table(problem, budget):
        return solve_by_table(problem, budget).tolist()
    rows, columns = np.nonzero(problem.allowed())
    costs, sizes = problem.costs[rows, columns], problem.sizes[rows, columns]
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    # Sizes and costs are brought to order one: the solver's feasibility tolerance is absolute.
    bits = csr_array(sizes[None, :] / budget)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits, 0, 1)]
    if problem.times is not None and problem.max_time is not None:
        times = csr_array(problem.times[rows, columns][None, :] / problem.max_time)
        constraints.append(LinearConstraint(times, 0, 1))
    scale = max(costs.max(), np.finfo(float).tiny)
    result = milp(
        costs / scale,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": RELATIVE_GAP},
    )
    if result.status == INFEASIBLE:
        check_time(problem, budget)
    proved = result.status == 0 or (result.mip_gap is not None and result.mip_gap <= LAST_GAP)
    if result.x is None or not proved:
        raise BudgetError(
            f"no plan was proved within {LAST_GAP} of the least cost in {seconds:g} seconds "
            f"({result.message}): give the allocator more, "
            f'allocator={{"name": "exact", "seconds": {6 * seconds:g}}}, or take another'
        )
    picked = np.flatnonzero(result.x > 0.5)
    choice = np.empty(len(problem.names), dtype=int)
    choice[rows[picked]] = columns[picked]
    return _repair(problem, choice, budget).tolist()


def check_time(problem: Problem, budget: int) -> None:
    """BudgetError naming the fastest plan within the budget where that one is too slow.

    Needs no costs but to know what is allowed, so it can be asked before any is measured. Raises
    BudgetError as Problem.check() does too.
    """
    problem.check(budget)
    if problem.times is None or problem.max_time is None:
        return
    times = np.where(problem.allowed(), problem.times, np.inf)
    fastest = problem.time_of(exact(replace(problem, costs=times, max_time=None), budget))
    if fastest > problem.max_time:
        raise problem.too_slow(f"{budget / problem.n_weights:.4f} bits per weight", fastest)


def _repair(problem: Problem, choice: Array, budget: int) -> Array:
    """The solver's tolerance may overspend by a little: step down where that costs least."""
    times = None if problem.max_time is None else problem.times
    while problem.size_of(choice) > budget:
        _step_down(problem, choice, problem.sizes, times)
    while not problem.in_time(choice):
        assert times is not None
        _step_down(problem, choice, times, problem.sizes)
    return choice


def _step_down(problem: Problem, choice: Array, spent: Array, other: Array | None) -> None:
    """Change one row, in place, so that less is spent, and of what `other` counts not more."""
    rows = np.arange(len(choice))
    saved = spent[rows, choice][:, None] - spent
    extra = problem.costs - problem.costs[rows, choice][:, None]
    useful = saved > 0 if other is None else (saved > 0) & (other <= other[rows, choice][:, None])
    rate = np.where(useful, extra / np.where(saved > 0, saved, 1), np.inf)
    if not np.isfinite(rate.min()):
        raise RuntimeError("the solver's plan overspends by its tolerance and cannot be repaired")
    row, column = np.unravel_index(rate.argmin(), rate.shape)
    choice[row] = column
