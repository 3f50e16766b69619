"""The allocation problem: what each choice costs, how large it is, what goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lwquant.errors import BudgetError, PlanError
from lwquant.scheme import QuantScheme
from lwquant.types import SensitivityReport

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
    times: Array | None = None  # (n_rows, n_schemes) microseconds per decoded token
    max_time: float | None = None  # microseconds that a plan may take; needs times

    @property
    def n_weights(self) -> int:
        return int(self.weights.sum())

    def allowed(self) -> Array:
        return np.isfinite(self.costs)

    def size_of(self, choice: Sequence[int] | Array) -> int:
        return int(self.sizes[np.arange(len(choice)), list(choice)].sum())

    def cost_of(self, choice: Sequence[int] | Array) -> float:
        return float(self.costs[np.arange(len(choice)), list(choice)].sum())

    def time_of(self, choice: Sequence[int] | Array) -> float:
        """Microseconds per decoded token; there must be times."""
        assert self.times is not None
        return float(self.times[np.arange(len(choice)), list(choice)].sum())

    def in_time(self, choice: Sequence[int] | Array) -> bool:
        return self.max_time is None or self.time_of(choice) <= self.max_time

    def fits(self, choice: Sequence[int] | Array, budget: int) -> bool:
        """Whether the plan keeps the budget (stored bits) and the limit on decode time."""
        return self.size_of(choice) <= budget and self.in_time(choice)

    def schemes_of(self, choice: Sequence[int] | Array) -> dict[str, QuantScheme]:
        """The scheme of every linear."""
        return {
            name: self.schemes[column]
            for names, column in zip(self.names, choice, strict=True)
            for name in names
        }

    def bounds(self) -> tuple[int, int]:
        """Fewest and most stored bits of any plan."""
        low = np.where(self.allowed(), self.sizes, np.iinfo(np.int64).max).min(1).sum()
        high = np.where(self.allowed(), self.sizes, 0).max(1).sum()
        return int(low), int(high)

    def check(self, budget: int) -> None:
        """BudgetError naming floor and ceiling for a budget (stored bits) outside them, and the
        fastest plan's time for a limit on it that no plan keeps, whatever its size.
        """
        floor, ceiling = self.bounds()
        if not floor <= budget <= ceiling:
            floor_bpw, ceiling_bpw = floor / self.n_weights, ceiling / self.n_weights
            side = "below the floor" if budget < floor else "above the ceiling"
            raise BudgetError(
                f"budget of {budget / self.n_weights:.4f} bits per weight is {side}: this menu "
                f"({', '.join(s.label for s in self.schemes)}) reaches {floor_bpw:.4f} to "
                f"{ceiling_bpw:.4f}"
            )
        if self.max_time is not None:
            assert self.times is not None
            fastest = self.time_of(np.where(self.allowed(), self.times, np.inf).argmin(1))
            if fastest > self.max_time:
                raise self.too_slow("this menu", fastest)

    def too_slow(self, which: str, fastest: float) -> BudgetError:
        """What to raise where the fastest plan of a kind is above the limit on decode time."""
        return BudgetError(
            f"limit of {self.max_time} µs per decoded token is below the floor: the fastest plan "
            f"of {which} takes {fastest:.6g} µs"
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
    """Make the linears of each group share a scheme: their rows become one, with sums of costs,
    sizes and times.
    """
    row_of = {name: row for row, names in enumerate(problem.names) for name in names}
    leader = list(range(len(problem.names)))
    for group in groups:
        rows = sorted(row_of[name] for name in group)
        for row in rows[1:]:
            leader[row] = leader[rows[0]]
    kept = sorted(set(leader))
    members = [[row for row, first in enumerate(leader) if first == head] for head in kept]
    times = problem.times
    return replace(
        problem,
        names=tuple(tuple(n for row in rows for n in problem.names[row]) for rows in members),
        blocks=np.array([problem.blocks[head] for head in kept]),
        weights=np.array([problem.weights[rows].sum() for rows in members]),
        costs=np.stack([problem.costs[rows].sum(0) for rows in members]),
        sizes=np.stack([problem.sizes[rows].sum(0) for rows in members]),
        times=None if times is None else np.stack([times[rows].sum(0) for rows in members]),
    )


def neighbours(problem: Problem, row: int, column: int) -> list[int]:
    """The allowed columns next to `column` by size, and itself, from narrow to wide."""
    sizes, allowed = problem.sizes[row], problem.allowed()[row]
    columns = [c for c in range(len(sizes)) if allowed[c]]
    below = [c for c in columns if sizes[c] < sizes[column]]
    above = [c for c in columns if sizes[c] > sizes[column]]
    narrower = [max(below, key=lambda c: sizes[c])] if below else []
    wider = [min(above, key=lambda c: sizes[c])] if above else []
    return [*narrower, column, *wider]


def menus_of(problem: Problem, columns: Sequence[Sequence[int]]) -> dict[str, set[QuantScheme]]:
    """The schemes that each linear may have, from the columns that its row may."""
    return {
        name: {problem.schemes[column] for column in own}
        for names, own in zip(problem.names, columns, strict=True)
        for name in names
    }


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
