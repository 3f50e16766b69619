"""The allocation problem: what each choice costs, how large it is, what goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lwquant.errors import BudgetError, PlanError
from lwquant.types import QuantScheme, SensitivityReport

Array = np.ndarray

# Linears that engines (vLLM, SGLang) fuse into one matrix and that must then share a scheme.
FUSED_ROLES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Problem:
    """One row per free choice: a linear, or several linears tied together."""

    names: tuple[tuple[str, ...], ...]  # the linears of each row
    blocks: Array  # (n_rows,) block of each row
    weights: Array  # (n_rows,) number of weights
    costs: Array  # (n_rows, n_schemes) additive, lower is better; inf forbids
    sizes: Array  # (n_rows, n_schemes) stored bits
    schemes: tuple[QuantScheme, ...]
    scores: tuple[float, ...] | None = None  # importance per block, for ranked allocation

    @property
    def n_weights(self) -> int:
        return int(self.weights.sum())

    def allowed(self) -> Array:
        return np.isfinite(self.costs)

    def size_of(self, choice: Sequence[int] | Array) -> int:
        return int(self.sizes[np.arange(len(choice)), list(choice)].sum())

    def cost_of(self, choice: Sequence[int] | Array) -> float:
        return float(self.costs[np.arange(len(choice)), list(choice)].sum())

    def bounds(self) -> tuple[int, int]:
        """Fewest and most stored bits of any plan."""
        low = np.where(self.allowed(), self.sizes, np.iinfo(np.int64).max).min(1).sum()
        high = np.where(self.allowed(), self.sizes, 0).max(1).sum()
        return int(low), int(high)

    def check(self, budget: int) -> None:
        """BudgetError naming floor and ceiling for a budget (stored bits) outside them."""
        floor, ceiling = self.bounds()
        if not floor <= budget <= ceiling:
            floor_bpw, ceiling_bpw = floor / self.n_weights, ceiling / self.n_weights
            side = "below the floor" if budget < floor else "above the ceiling"
            raise BudgetError(
                f"budget of {budget / self.n_weights:.4f} bits per weight is {side}: this menu "
                f"({', '.join(s.label for s in self.schemes)}) reaches {floor_bpw:.4f} to "
                f"{ceiling_bpw:.4f}"
            )


def problem_of(report: SensitivityReport) -> Problem:
    """One row per linear of the report, every scheme allowed."""
    sizes = [
        [scheme.stored_bits(spec.out_features, spec.in_features) for scheme in report.schemes]
        for spec in report.linears
    ]
    return Problem(
        names=tuple((spec.name,) for spec in report.linears),
        blocks=np.array([spec.block for spec in report.linears]),
        weights=np.array([spec.n_weights for spec in report.linears], dtype=np.int64),
        costs=report.costs.double().numpy().copy(),
        sizes=np.array(sizes, dtype=np.int64),
        schemes=report.schemes,
        scores=report.scores,
    )


def tie(problem: Problem, groups: Sequence[Sequence[str]]) -> Problem:
    """Make the linears of each group share a scheme: their rows become one, costs and sizes add."""
    row_of = {name: row for row, names in enumerate(problem.names) for name in names}
    leader = list(range(len(problem.names)))
    for group in groups:
        rows = sorted(row_of[name] for name in group)
        for row in rows[1:]:
            leader[row] = leader[rows[0]]
    kept = sorted(set(leader))
    members = [[row for row, first in enumerate(leader) if first == head] for head in kept]
    return replace(
        problem,
        names=tuple(tuple(n for row in rows for n in problem.names[row]) for rows in members),
        blocks=np.array([problem.blocks[head] for head in kept]),
        weights=np.array([problem.weights[rows].sum() for rows in members]),
        costs=np.stack([problem.costs[rows].sum(0) for rows in members]),
        sizes=np.stack([problem.sizes[rows].sum(0) for rows in members]),
    )


def fused_groups(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that differ only in a role which engines fuse."""
    known = set(names)
    groups = []
    for name in names:
        parent, _, role = name.rpartition(".")
        for roles in FUSED_ROLES:
            group = [f"{parent}.{r}" for r in roles if f"{parent}.{r}" in known]
            if role == roles[0] and len(group) > 1:
                groups.append(group)
    return groups


def pin(problem: Problem, pins: Mapping[str, QuantScheme]) -> Problem:
    """Allow only the given scheme for the given linears.

    Raises PlanError for an unknown linear, a scheme outside the menu, or tied linears pinned apart.
    """
    row_of = {name: row for row, names in enumerate(problem.names) for name in names}
    costs = problem.costs.copy()
    for name, scheme in pins.items():
        if name not in row_of:
            raise PlanError(f"cannot pin {name!r}: the model has no such linear")
        if scheme not in problem.schemes:
            menu = ", ".join(s.label for s in problem.schemes)
            raise PlanError(f"cannot pin {name} to {scheme.label}: the menu is {menu}")
        row, column = row_of[name], problem.schemes.index(scheme)
        kept = costs[row, column]
        if not np.isfinite(kept):
            raise PlanError(f"{name} is pinned to two different schemes")
        costs[row] = np.inf
        costs[row, column] = kept
    return replace(problem, costs=costs)
