"""The same scheme everywhere: the widest that fits, and the baseline of every other plan."""

from __future__ import annotations

import numpy as np

from lwquant.allocators.problem import Problem
from lwquant.errors import BudgetError


def uniform(problem: Problem, budget: int) -> list[int]:
    """The largest single scheme whose total stays within `budget` stored bits and the time limit.

    Rows where that scheme is not allowed (pinned) keep their own cheapest allowed one.
    """
    problem.check(budget)
    options = [_choice(problem, column) for column in range(len(problem.schemes))]
    small = [choice for choice in options if problem.size_of(choice) <= budget]
    if not small:
        smallest = min(map(problem.size_of, options)) / problem.n_weights
        raise BudgetError(
            f"no single scheme fits {budget / problem.n_weights:.4f} bits per weight; "
            f"the smallest uniform plan has {smallest:.4f}"
        )
    fitting = [choice for choice in small if problem.in_time(choice)]
    if not fitting:
        fastest = min(map(problem.time_of, small))
        raise problem.too_slow("one scheme within the budget", fastest)
    return max(fitting, key=problem.size_of)


def _choice(problem: Problem, column: int) -> list[int]:
    allowed = problem.allowed()
    free = np.where(allowed, problem.costs, np.inf).argmin(1)
    return [column if ok else int(best) for ok, best in zip(allowed[:, column], free, strict=True)]
