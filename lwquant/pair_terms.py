"""Plans from costs that know of pairs: how the errors of two blocks meet.

The KL of a plan is taken for a quadratic in the errors of its linears. With e_r = √c_r, the root of
the metric's cost,

    KL = Σ_r own_r e_r² + Σ_{a≤b} pair_ab Σ e_r e_s     (r of block a, s of block b, r ≠ s)

and both kinds of terms are fitted to the measured KL of random plans near the current one, with
weights quantized before (swapped_model.py). CoopQ (arXiv:2509.15455) estimates such terms of blocks
from Shapley values, over permutations in which one block after another is lowered; random subsets
and least squares are ours.

Own terms are one a linear, pair terms one for two blocks: pairs of the 210 linears of a model of 30
blocks would be 22,000 unknowns, pairs of its blocks are 465, and there are about a hundred
measurements. Even these are more unknowns than equations, so both kinds are drawn towards what the
metric says, own terms towards one and pair terms towards zero, by ridge penalties that predict each
measurement best from all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from lwquant.allocators import exact
from lwquant.allocators.plan import choice_of, plan_of
from lwquant.allocators.problem import Array, Problem, menus_of, neighbours
from lwquant.best_plan import best_plan
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.recipe import Recipe
from lwquant.stages import problem_for
from lwquant.swapped_model import swapped_model
from lwquant.types import BitPlan, SensitivityReport

MOVED = 0.5  # share of the linears whose scheme a random plan changes, half of them each way
ROUNDS = 20  # of planning around the mean of the plans so far
# How far the terms may go from what the metric says, in units of the mean square of what they
# explain; 0 leaves them there.
FREEDOMS = (0.0, *(10.0**power for power in range(-3, 7)))


def paired_plan(
    opened: OpenModel,
    report: SensitivityReport,
    start: BitPlan,
    bpw: float,
    recipe: Recipe,
    windows: Windows,
    progress: Progress,
) -> BitPlan:
    """The plan of least KL on the held-out windows, really quantized: the one that terms fitted to
    `recipe.pair_terms` measured plans lead to, or `start`.

    Ties, pins and a limit on decode time hold. A linear moves by one scheme at most, which is how
    far the measured plans go.
    """
    problem = problem_for(report, recipe)
    begin = choice_of(problem, start)
    near = [neighbours(problem, row, column) for row, column in enumerate(begin)]
    model = swapped_model(opened, menus_of(problem, near), start, recipe, windows, progress)
    choices, measured = [begin], [model.kl]
    generator = np.random.default_rng(recipe.seed)
    for number in range(recipe.pair_terms):
        progress("pair terms", f"subset {number + 1}", number, recipe.pair_terms)
        choices.append(random_choice(begin, near, generator))
        measured.append(model.measure(problem.schemes_of(choices[-1])))
    progress("pair terms", "done", recipe.pair_terms, recipe.pair_terms)
    terms, left_out = fit_terms(problem, choices, measured)
    found = terms.plan(begin, near, int(bpw * problem.n_weights))
    fitted = (
        f"pair terms from {recipe.pair_terms} measured plans, each predicted from the others to "
        f"{left_out:.4f} nats (root mean square); their KL is {min(measured):.4f} to "
        f"{max(measured):.4f}, without propagation"
    )
    if found == begin:
        return replace(start, notes=(*start.notes, f"{fitted}; they lead to no other plan"))
    allocator = {**start.allocator, "pair_terms": recipe.pair_terms}
    candidates = {
        "pair terms": plan_of(problem, found, report.linears, allocator, start.notes),
        "the plan it started from": start,
    }
    best, note = best_plan(opened, candidates, recipe.rounding(), windows, progress)
    plan = candidates[best]
    return replace(plan, notes=(*plan.notes, fitted, note))


def random_choice(
    begin: Sequence[int], near: Sequence[Sequence[int]], generator: np.random.Generator
) -> list[int]:
    """A plan in which about MOVED of the rows go one scheme down or up, each by chance.

    Args:
        near: of each row, its columns next to that of `begin` and itself, narrow to wide.
    """
    choice = []
    for column, columns in zip(begin, near, strict=True):
        step = int(generator.choice((-1, 0, 1), p=(MOVED / 2, 1 - MOVED, MOVED / 2)))
        place = columns.index(column) + step
        choice.append(columns[place] if 0 <= place < len(columns) else column)
    return choice


@dataclass(frozen=True)
class Terms:
    """The KL of a plan as the quadratic of this file's head, in nats."""

    problem: Problem  # whose costs are in nats
    own: Array  # (n_rows,) factor of each row's costs
    pairs: Array  # (n_rows, n_rows) pair term of the rows' blocks; symmetric, 0 on the diagonal

    def kl_of(self, choice: Sequence[int]) -> float:
        rows = np.arange(len(choice))
        errors = _errors(self.problem)[rows, list(choice)]
        own = self.own @ self.problem.costs[rows, list(choice)]
        return float(own + errors @ self.pairs @ errors / 2)

    def around(self, errors: Array) -> Array:
        """Costs (n_rows, n_schemes) that add up to the KL near a plan of these errors (n_rows,).

        The own terms, and the gradient of the pair terms: what one row alone changes is exact. Each
        row is moved so that its least cost is 0, which no plan notices.
        """
        own = self.own[:, None] * np.where(self.problem.allowed(), self.problem.costs, 0)
        costs = own + _errors(self.problem) * (self.pairs @ errors)[:, None]
        costs = np.where(self.problem.allowed(), costs, np.inf)
        return costs - costs.min(1, keepdims=True)

    def plan(self, begin: Sequence[int], near: Sequence[Sequence[int]], budget: int) -> list[int]:
        """The plan of least KL that was found, with each row in one of its columns `near`.

        The exact allocator plans with the costs around the mean of the plans so far, again and
        again: around the last plan alone, two that each look good from the other would take turns.
        """
        inside = np.zeros(self.problem.costs.shape, dtype=bool)
        for row, columns in enumerate(near):
            inside[row, list(columns)] = True
        rows, best = np.arange(len(begin)), list(begin)
        total = np.zeros(len(begin))
        choice = list(begin)
        for number in range(1, ROUNDS + 1):
            total += _errors(self.problem)[rows, choice]
            costs = np.where(inside, self.around(total / number), np.inf)
            allowed = replace(self.problem, costs=costs)
            choice = exact(allowed, min(budget, allowed.bounds()[1]))
            if self.kl_of(choice) < self.kl_of(best):
                best = choice
        return best


def fit_terms(
    problem: Problem, choices: Sequence[Sequence[int]], measured: Sequence[float]
) -> tuple[Terms, float]:
    """Own and pair terms of least squares, and how well they predict what they have not seen.

    The costs are brought to nats by one factor first. Ridge regression in its dual form, as there
    are fewer measurements than terms; of FREEDOMS of either kind, those with the least error of
    each measurement when it is left out, which has a closed form.

    Args:
        choices: plans (n_plans, n_rows).
        measured: the KL of each.

    Returns the terms and the root mean square of those errors, in nats.
    """
    rows, plans = np.arange(len(problem.names)), np.array(choices)
    target = np.array(measured, dtype=float)
    sums = problem.costs[rows, plans].sum(1)
    scale = sums @ target / (sums @ sums) if sums.any() else 1.0
    problem = replace(problem, costs=problem.costs * scale)
    own, pairs = problem.costs[rows, plans], _pair_products(problem, plans)
    surprise = target - own.sum(1)
    own_kernel, pair_kernel = _normalized(own @ own.T), _normalized(pairs @ pairs.T)
    noise = max(surprise @ surprise / len(target), np.finfo(float).tiny)
    best: tuple[float, float, float, Array] | None = None
    for own_freedom, pair_freedom in product(FREEDOMS, FREEDOMS):
        kernel = own_freedom * own_kernel[0] + pair_freedom * pair_kernel[0]
        inverse = np.linalg.inv(kernel + np.eye(len(target)))
        dual = inverse @ surprise
        error = float(np.square(dual / inverse.diagonal()).mean())
        if best is None or error < best[0] - 1e-9 * noise:
            best = error, own_freedom * own_kernel[1], pair_freedom * pair_kernel[1], dual
    assert best is not None
    error, own_weight, pair_weight, dual = best
    blocks = np.unique(problem.blocks, return_inverse=True)[1]
    by_block = np.zeros((blocks.max() + 1, blocks.max() + 1))
    by_block[np.triu_indices(len(by_block))] = pair_weight * pairs.T @ dual
    by_block = by_block + by_block.T
    by_block[np.diag_indices(len(by_block))] /= 2
    between = by_block[blocks][:, blocks]
    np.fill_diagonal(between, 0)
    return Terms(problem, 1 + own_weight * own.T @ dual, between), error**0.5


def _errors(problem: Problem) -> Array:
    """e of every choice, (n_rows, n_schemes); 0 where it is forbidden."""
    return np.sqrt(np.where(problem.allowed(), problem.costs, 0))


def _pair_products(problem: Problem, plans: Array) -> Array:
    """Σ e_r e_s of every two blocks a ≤ b, (n_plans, n_pairs) in the order of triu_indices."""
    rows = np.arange(len(problem.names))
    errors = _errors(problem)[rows, plans]
    member = np.equal.outer(problem.blocks, np.unique(problem.blocks)).astype(float)
    sums, squares = errors @ member, np.square(errors) @ member
    first, second = np.triu_indices(member.shape[1])
    products = sums[:, first] * sums[:, second]
    inside = (np.square(sums) - squares) / 2  # every two linears of a block once
    return np.where(first == second, inside[:, first], products)


def _normalized(kernel: Array) -> tuple[Array, float]:
    """A kernel with a mean diagonal of one, and the factor that made it so; 0 for no kernel."""
    mean = kernel.diagonal().mean()
    factor = 1 / mean if mean > 0 else 0.0
    return kernel * factor, factor
