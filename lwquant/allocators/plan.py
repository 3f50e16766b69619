"""From a sensitivity report and a budget to a plan, and plans as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lwquant.allocators.exact import exact
from lwquant.allocators.problem import Problem, pin, problem_of, tie
from lwquant.allocators.uniform import uniform
from lwquant.decode_times import DecodeTimes
from lwquant.errors import BudgetError, PlanError
from lwquant.jsonfile import read_json, write_json
from lwquant.methods import describe
from lwquant.scheme import QuantScheme
from lwquant.types import BitPlan, LinearSpec, SensitivityReport, plan_bpw, plan_bytes

KIND, VERSION = "lwquant-plan", 1


def make_plan(
    report: SensitivityReport,
    bpw: float,
    allocator: Any = exact,
    *,
    ties: Sequence[Sequence[str]] = (),
    pins: Mapping[str, QuantScheme] | None = None,
    allow_worse: bool = False,
    times: DecodeTimes | None = None,
    max_time: float | None = None,
) -> BitPlan:
    """The allocator's plan of at most `bpw` true stored bits per weight.

    Args:
        ties: groups of linears that must share a scheme.
        pins: schemes that the user fixed.
        allow_worse: keep a plan whose predicted cost is not below the uniform one's. By default
            the uniform plan is returned then, with a note that says so.
        times: of every shape and scheme, from which the plan's decode time is predicted.
        max_time: limit on it, microseconds per decoded token; needs `times`.

    Raises BudgetError outside floor and ceiling, PlanError for impossible pins and missing times.
    """
    problem = constrained(report, ties, pins or {}, times, max_time)
    budget = int(bpw * problem.n_weights)
    choice = allocator(problem, budget)
    notes: tuple[str, ...] = ()
    try:
        baseline = uniform(problem, budget)
    except BudgetError:
        baseline = None
    if baseline is not None and choice != baseline and not allow_worse:
        mixed_cost, uniform_cost = problem.cost_of(choice), problem.cost_of(baseline)
        if mixed_cost >= uniform_cost:
            notes = (
                f"uniform: the mixed plan's predicted cost {mixed_cost:.4g} is not below the "
                f"uniform plan's {uniform_cost:.4g}",
            )
            choice = baseline
    how = describe(allocator)
    if max_time is not None:
        how = {**how, "max_decode_us": max_time}
    if times is not None:
        how = {**how, "decode_times": times.machine_label}
    return plan_of(problem, choice, report.linears, how, notes)


def constrained(
    report: SensitivityReport,
    ties: Sequence[Sequence[str]],
    pins: Mapping[str, QuantScheme],
    times: DecodeTimes | None = None,
    max_time: float | None = None,
) -> Problem:
    """The report's problem with pins, ties and times, as for make_plan()."""
    problem = pin(problem_of(report), pins)
    if times is not None:
        measured = times.of(report.linears, report.schemes)
        problem = replace(problem, times=measured, max_time=max_time)
    return tie(problem, ties)


def uniform_plan(linears: Sequence[LinearSpec], scheme: QuantScheme) -> BitPlan:
    """The same scheme for every linear."""
    schemes = {spec.name: scheme for spec in linears}
    return _counted(schemes, linears, allocator={"name": "uniform"})


def plan_of(
    problem: Problem,
    choice: Sequence[int],
    linears: tuple[LinearSpec, ...],
    allocator: Mapping[str, object],
    notes: tuple[str, ...],
) -> BitPlan:
    """The plan of the chosen columns, one of each row of the problem."""
    schemes, costs = {}, {}
    for row, (names, column) in enumerate(zip(problem.names, choice, strict=True)):
        for name in names:
            schemes[name] = problem.schemes[column]
            costs[name] = float(problem.costs[row, column]) / len(names)
    ordered = {spec.name: schemes[spec.name] for spec in linears}
    time = None if problem.times is None else problem.time_of(choice)
    return _counted(ordered, linears, costs, allocator, notes, time)


def choice_of(problem: Problem, plan: BitPlan) -> list[int]:
    """The column of each row that the plan has chosen."""
    return [problem.schemes.index(plan.schemes[names[0]]) for names in problem.names]


def write_plan(plan: BitPlan, path: Path) -> None:
    linears = {
        name: {
            **asdict(scheme),
            **({"cost": plan.costs[name]} if name in plan.costs else {}),
        }
        for name, scheme in plan.schemes.items()
    }
    body: dict[str, object] = {"bpw": plan.bpw, "decode_bytes": plan.decode_bytes}
    if plan.decode_us is not None:
        body["decode_us"] = plan.decode_us
    body |= {"allocator": plan.allocator, "notes": plan.notes, "linears": linears}
    write_json(path, KIND, VERSION, body)


def read_plan(path: Path, linears: Sequence[LinearSpec]) -> BitPlan:
    """A plan, perhaps edited by hand, checked against the model's linears.

    Bits and bytes are counted anew, and a predicted time, which an edit would change, is left out.

    Raises PlanError naming the linear that is unknown, missing, or has an impossible width.
    """
    body = read_json(path, KIND, VERSION)
    entries = body.get("linears")
    if not isinstance(entries, dict):
        raise PlanError(f"{path}: 'linears' is missing")
    known = {spec.name for spec in linears}
    unknown, missing = sorted(entries.keys() - known), sorted(known - entries.keys())
    if unknown:
        raise PlanError(f"{path}: the model has no linear {unknown[0]!r} ({len(unknown)} unknown)")
    if missing:
        raise PlanError(f"{path}: linear {missing[0]!r} is missing ({len(missing)} missing)")
    schemes, costs = {}, {}
    for spec in linears:
        entry = entries[spec.name]
        try:
            scheme = QuantScheme.from_fields(entry)
        except (ValueError, TypeError) as error:
            raise PlanError(f"{path}: {spec.name}: {error}") from error
        schemes[spec.name] = scheme
        if "cost" in entry:
            costs[spec.name] = float(entry["cost"])
    allocator = body.get("allocator") or {"name": "file"}
    notes = tuple(str(note) for note in body.get("notes", ()))
    return _counted(schemes, linears, costs, allocator, notes)


def _counted(
    schemes: Mapping[str, QuantScheme],
    linears: Sequence[LinearSpec],
    costs: Mapping[str, float] | None = None,
    allocator: Mapping[str, object] | None = None,
    notes: tuple[str, ...] = (),
    decode_us: float | None = None,
) -> BitPlan:
    """The plan with its bits and bytes counted."""
    bpw, size = plan_bpw(schemes, tuple(linears)), plan_bytes(schemes, tuple(linears))
    return BitPlan(schemes, bpw, costs or {}, allocator or {}, notes, size, decode_us)
