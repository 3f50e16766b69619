"""Protect the few most sensitive linears, keep the rest uniform: the heuristic exact must beat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lwquant.allocators.problem import Problem
from lwquant.allocators.uniform import uniform


def spikes(problem: Problem, budget: int, *, share: float = 0.03, bits: int = 6) -> list[int]:
    """Raise the costliest rows of the uniform plan to `bits`; where that overspends, the rows that
    are cheapest to lower pay for it by one width each.

    Args:
        budget: stored bits.
        share: fraction of the rows to protect, at least one.
        bits: width of the protected rows; the next narrower one of the menu where it is missing.
    """
    plain = uniform(problem, budget)
    choice = np.array(plain)
    allowed = problem.allowed()
    rows = np.arange(len(choice))
    by_width = sorted(range(len(problem.schemes)), key=lambda c: problem.schemes[c].bits)
    top = max((c for c in by_width if problem.schemes[c].bits <= bits), default=by_width[0])
    free = allowed.sum(1) > 1
    order = np.argsort(-np.where(free, problem.costs[rows, choice], -np.inf), kind="stable")
    protected = [row for row in order[: max(1, round(share * len(choice)))] if allowed[row, top]]
    choice[protected] = np.maximum(choice[protected], top)
    narrower = {wide: narrow for narrow, wide in pairwise(by_width)}
    payers = [
        (problem.costs[row, narrower[choice[row]]] - problem.costs[row, choice[row]], row)
        for row in rows
        if row not in protected and choice[row] in narrower and allowed[row, narrower[choice[row]]]
    ]
    for _, row in sorted(payers):
        if problem.fits(choice, budget):
            break
        choice[row] = narrower[choice[row]]
    for row in reversed(protected):  # nothing left to lower: protect fewer
        if problem.fits(choice, budget):
            break
        choice[row] = plain[row]
    # Narrower is not always faster: the payers alone may be too slow.
    return choice.tolist() if problem.fits(choice, budget) else plain
