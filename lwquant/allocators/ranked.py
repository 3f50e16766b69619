"""Order whole blocks by importance; the top ones get the wide scheme, the rest the narrow one.

Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs
Beyond Integer Bit-Levels", arXiv:2406.17415. Blocks stay whole, so the paper's schemes are two (or
three) widths out of the menu and the budget decides how many blocks get each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lwquant.allocators.problem import Problem
from lwquant.errors import BudgetError


def ranked(
    problem: Problem,
    budget: int,
    *,
    bits: Sequence[int] = (4, 2),
    order: Sequence[int] | None = None,
    reverse: bool = False,
) -> list[int]:
    """Raise as many blocks as fit, in order of importance.

    Args:
        bits: widths of the menu from high to low, two or three. With three, blocks are first raised
            from the lowest to the middle width, all in order, then from the middle to the highest.
        order: block numbers, most important first; by default from the metric's block scores, or,
            without scores, from the cost of the block's linears at the lowest width.
        reverse: least important first, a check on the order itself.

    Raises BudgetError when even the lowest width everywhere does not fit, or is too slow.
    """
    columns = [_column(problem, width) for width in sorted(bits, reverse=True)]
    if len(columns) not in (2, 3):
        raise BudgetError(f"ranked needs two or three widths, got {list(bits)}")
    order = list(order) if order is not None else block_order(problem, columns[-1])
    if reverse:
        order = order[::-1]
    # A pinned row has one allowed scheme and keeps it whatever happens to its block.
    allowed = problem.allowed()
    fixed = np.where(allowed.sum(1) == 1, allowed.argmax(1), -1)

    def place(choice: np.ndarray, block: int, column: int) -> np.ndarray:
        return np.where((problem.blocks == block) & (fixed < 0), column, choice)

    choice = np.where(fixed >= 0, fixed, columns[-1])
    if problem.size_of(choice) > budget:
        raise BudgetError(
            f"budget of {budget / problem.n_weights:.4f} bits per weight is below the floor of "
            f"{problem.size_of(choice) / problem.n_weights:.4f}, every block at {min(bits)} bits"
        )
    if not problem.in_time(choice):
        raise problem.too_slow(f"every block at {min(bits)} bits", problem.time_of(choice))
    for column in reversed(columns[:-1]):
        for block in order:
            raised = place(choice, block, column)
            if not problem.fits(raised, budget):
                return choice.tolist()
            choice = raised
    return choice.tolist()


def block_order(problem: Problem, lowest: int) -> list[int]:
    """Blocks by descending importance."""
    if problem.scores is not None:
        scores = np.array(problem.scores)
    else:
        scores = np.zeros(int(problem.blocks.max()) + 1)
        np.add.at(scores, problem.blocks, problem.costs[:, lowest])
    return np.argsort(-scores, kind="stable").tolist()


def _column(problem: Problem, width: int) -> int:
    for column, scheme in enumerate(problem.schemes):
        if scheme.bits == width:
            return column
    menu = ", ".join(s.label for s in problem.schemes)
    raise BudgetError(f"ranked: width {width} is not in the menu {menu}")
