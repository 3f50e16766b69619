"""The laws of every allocator, and brute force as the oracle of the exact one."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import best_plan

from lwquant.allocators import ALLOCATORS, exact, knapsack_table, ranked, spikes, uniform
from lwquant.allocators.exact import _repair, check_time
from lwquant.allocators.plan import make_plan
from lwquant.allocators.problem import fused_groups, pin, problem_of, tie
from lwquant.errors import BudgetError, PlanError
from lwquant.scheme import QuantScheme
from lwquant.types import LinearSpec, SensitivityReport

every_allocator = pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS)
ROLES = ("q_proj", "k_proj", "gate_proj", "up_proj")


def make_report(n_blocks=3, bits=(2, 3, 4, 8), seed=0):
    generator = np.random.default_rng(seed)
    linears = tuple(
        LinearSpec(f"layers.{block}.{role}", block, 32 * int(generator.integers(1, 4)), 64, 0)
        for block in range(n_blocks)
        for role in ROLES
    )
    factors = generator.lognormal(0, 1.5, len(linears))
    noise = np.array([4.0**-b for b in bits])
    wobble = generator.uniform(0.5, 1.5, (len(linears), len(bits)))
    costs = -np.sort(-factors[:, None] * noise * wobble, axis=1)
    schemes = tuple(QuantScheme(b, 32) for b in bits)
    return SensitivityReport(linears, schemes, torch.tensor(costs), {"name": "test"})


@every_allocator
@pytest.mark.parametrize("bpw", [3.0, 3.6, 4.3, 5.0, 8.4])
def test_the_budget_is_kept_and_every_row_gets_one_scheme(allocate, bpw):
    problem = problem_of(make_report())
    budget = int(bpw * problem.n_weights)
    if allocate is uniform and bpw < 3:
        pytest.skip("uniform needs 3 bits here")
    choice = allocate(problem, budget)
    assert len(choice) == len(problem.names)
    assert all(0 <= column < len(problem.schemes) for column in choice)
    assert problem.size_of(choice) <= budget


@every_allocator
def test_one_linear_gets_the_best_that_fits(allocate):
    report = make_report()
    one = SensitivityReport(report.linears[:1], report.schemes, report.costs[:1], {})
    problem = problem_of(one)
    if allocate is ranked:
        sizes = [problem.sizes[0, 0], problem.sizes[0, 2]]  # its widths are 2 and 4
        assert [allocate(problem, int(s)) for s in sizes] == [[0], [2]]
        return
    for column in range(len(problem.schemes)):
        assert allocate(problem, int(problem.sizes[0, column])) == [column]


@every_allocator
def test_more_budget_never_costs_more(allocate):
    problem = problem_of(make_report())
    bpws = np.linspace(3.0, 8.5, 40)
    costs = [problem.cost_of(allocate(problem, int(b * problem.n_weights))) for b in bpws]
    if allocate is spikes:  # a heuristic: the base width jumps, so only from step to step
        costs = [
            problem.cost_of(allocate(problem, int(b * problem.n_weights))) for b in (3, 4, 5, 8.5)
        ]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(costs))


@every_allocator
def test_an_impossible_budget_is_refused_with_its_limits(allocate):
    problem = problem_of(make_report())
    with pytest.raises(BudgetError, match=r"below the floor.*\d\.\d+"):
        allocate(problem, int(1.5 * problem.n_weights))


@every_allocator
def test_pinned_rows_keep_their_scheme(allocate):
    report = make_report()
    pinned = pin(problem_of(report), {"layers.1.k_proj": report.schemes[2]})
    choice = allocate(pinned, int(4.6 * pinned.n_weights))
    row = pinned.names.index(("layers.1.k_proj",))
    assert choice[row] == 2


def timed(problem, seed=0):
    """The problem with times that mostly grow with the width; no width is always the fastest."""
    wobble = np.random.default_rng(seed).uniform(0.4, 1.6, problem.sizes.shape)
    return replace(problem, times=problem.sizes * wobble / 1e4)


def fastest_time(problem, budget):
    return best_plan(torch.tensor(problem.times), torch.tensor(problem.sizes), budget)


@every_allocator
@pytest.mark.parametrize("bpw", [3.0, 3.6, 5.0, 8.4])
@pytest.mark.parametrize("seed", range(4))
def test_a_limit_on_decode_time_is_kept_or_the_fastest_plan_is_named(allocate, bpw, seed):
    problem = timed(problem_of(make_report(seed=seed)), seed)
    budget = int(bpw * problem.n_weights)
    free = problem.time_of(allocate(problem, budget))
    kept = refused = 0
    for share in (1.5, 1.0, 0.97, 0.9, 0.8, 0.6, 0.04):
        limited = replace(problem, max_time=share * free)
        try:
            choice = allocate(limited, budget)
        except BudgetError as error:
            refused += 1
            assert re.search(r"limit of \d.* µs .*below the floor.*takes \d", str(error))
            continue
        kept += 1
        assert limited.time_of(choice) <= limited.max_time
        assert limited.size_of(choice) <= budget
    assert kept >= 1 and refused >= 1
    slowest = problem.times.max(1).sum()
    assert allocate(replace(problem, max_time=slowest), budget) == allocate(problem, budget)


@every_allocator
def test_rows_pinned_to_a_slow_scheme_count_in_the_time(allocate):
    report = make_report()
    problem = timed(pin(problem_of(report), {"layers.1.k_proj": report.schemes[2]}))
    row = problem.names.index(("layers.1.k_proj",))
    problem.times[row, 2] = 1000.0
    with pytest.raises(BudgetError, match="µs"):
        allocate(replace(problem, max_time=999.0), int(4.6 * problem.n_weights))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_exact_finds_what_brute_force_finds_within_a_limit_on_time(seed, share):
    problem = timed(problem_of(make_report(n_blocks=2, bits=(2, 3, 8), seed=seed)), seed)
    budget = int(4.1 * problem.n_weights)
    free = problem.time_of(exact(problem, budget))
    fastest = fastest_time(problem, budget)
    limited = replace(problem, max_time=fastest + share * (free - fastest))
    choice = exact(limited, budget)
    wanted = best_plan(
        torch.tensor(problem.costs),
        torch.tensor(problem.sizes),
        budget,
        torch.tensor(problem.times),
        limited.max_time,
    )
    assert limited.fits(choice, budget)
    assert problem.cost_of(choice) == pytest.approx(wanted, rel=1e-5)
    assert problem.cost_of(choice) >= problem.cost_of(exact(problem, budget)) * (1 - 1e-6)


def test_a_limit_that_only_plans_above_the_budget_keep_names_the_fastest_within_it():
    report = make_report(n_blocks=2, bits=(2, 3, 8))
    problem = problem_of(report)
    times = np.tile([30.0, 20.0, 1.0], (len(problem.names), 1))  # the widest is the fastest
    problem = replace(problem, times=times)
    budget = int(3.3 * problem.n_weights)
    fastest = fastest_time(problem, budget)
    limited = replace(problem, max_time=fastest - 0.5)
    for ask in (exact, check_time):
        with pytest.raises(BudgetError, match=rf"bits per weight takes {fastest:g} µs"):
            ask(limited, budget)
    check_time(replace(problem, max_time=fastest), budget)
    below = replace(problem, max_time=7.9)  # eight rows
    with pytest.raises(BudgetError, match="this menu takes 8 µs"):
        check_time(below, budget)


def test_what_the_solver_overspends_is_repaired_where_it_costs_least():
    problem = timed(problem_of(make_report(n_blocks=1, bits=(2, 3, 8))))
    wide = np.array([1, 1, 1, 1])
    for time_too in (False, True):
        limit = problem.time_of(wide) * (1 - 1e-9) if time_too else None
        budget = problem.size_of(wide) - (0 if time_too else 1)
        limited = replace(problem, max_time=limit)
        got = _repair(limited, wide.copy(), budget)
        assert limited.fits(got, budget)
        (row,) = np.flatnonzero(got != wide)
        spent = problem.times if time_too else problem.sizes
        rates = {
            r: (problem.costs[r, 0] - problem.costs[r, 1]) / (spent[r, 1] - spent[r, 0])
            for r in range(4)
            if spent[r, 0] < spent[r, 1]
        }
        assert got[row] == 0 and rates[row] == min(rates.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bpw", [2.8, 3.3, 4.1, 6.0])
def test_exact_finds_what_brute_force_finds(seed, bpw):
    report = make_report(n_blocks=2, bits=(2, 3, 8), seed=seed)
    problem = problem_of(report)
    budget = int(bpw * problem.n_weights)
    choice = exact(problem, budget)
    wanted = best_plan(torch.tensor(problem.costs), torch.tensor(problem.sizes), budget)
    assert problem.cost_of(choice) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bpw", [2.8, 3.3, 4.1])
def test_table_and_solver_find_plans_of_the_same_cost(seed, bpw, monkeypatch):
    problem = problem_of(make_report(n_blocks=10, seed=seed))
    budget = int(bpw * problem.n_weights)
    by_table = exact(problem, budget)
    monkeypatch.setattr(knapsack_table, "MOST_CELLS", 0)
    by_solver = exact(problem, budget)
    assert problem.cost_of(by_table) == pytest.approx(problem.cost_of(by_solver), rel=1e-5)
    assert problem.size_of(by_table) <= budget


def test_equal_costs_take_no_time():
    report = make_report(n_blocks=8)
    generator = np.random.default_rng(0)
    nearly = 1 + 1e-3 * generator.random(report.costs.shape)
    alike = torch.tensor(nearly * 4.0 ** -np.array([s.bits for s in report.schemes]))
    problem = problem_of(replace(report, costs=alike))
    for bpw in (2.8, 3.3, 4.1):  # branch and bound runs out of its seconds here
        budget = int(bpw * problem.n_weights)
        choice = exact(problem, budget, seconds=1e-3)
        assert problem.size_of(choice) <= budget


def test_exact_is_never_above_any_other_allocator():
    problem = problem_of(make_report())
    for bpw in (3.0, 3.5, 4.5):
        budget = int(bpw * problem.n_weights)
        best = problem.cost_of(exact(problem, budget))
        for other in (uniform, spikes, ranked):
            assert best <= problem.cost_of(other(problem, budget)) * (1 + 1e-6)


def test_ceiling_is_named_too():
    problem = problem_of(make_report())
    with pytest.raises(BudgetError, match="above the ceiling.*reaches"):
        exact(problem, 20 * problem.n_weights)


def test_tied_linears_get_one_scheme_and_their_costs_add():
    report = make_report()
    groups = fused_groups([spec.name for spec in report.linears])
    assert ["layers.0.q_proj", "layers.0.k_proj"] in groups
    assert ["layers.2.gate_proj", "layers.2.up_proj"] in groups
    plan = make_plan(report, 3.4, exact, ties=groups)
    for group in groups:
        assert len({plan.schemes[name] for name in group}) == 1
    problem = tie(problem_of(report), groups)
    assert problem.costs.sum() == pytest.approx(report.costs.sum().item())
    assert problem.sizes.sum() == problem_of(report).sizes.sum()
    both = timed(problem_of(report))
    tied = tie(both, groups)
    assert tied.times.shape == tied.sizes.shape
    assert tied.times[0] == pytest.approx(both.times[0] + both.times[1])  # q and k


def test_ranked_raises_whole_blocks_in_the_order_of_their_scores():
    report = make_report(n_blocks=4)
    scored = SensitivityReport(
        report.linears, report.schemes, report.costs, {}, scores=(0.1, 0.9, 0.5, 0.3)
    )
    problem = problem_of(scored)
    sizes = [int(problem.sizes[problem.blocks == b, 2].sum()) for b in range(4)]
    lows = [int(problem.sizes[problem.blocks == b, 0].sum()) for b in range(4)]
    budget = sizes[1] + sizes[2] + lows[0] + lows[3]
    choice = np.array(ranked(problem, budget))
    raised = {int(b) for b in problem.blocks[choice == 2]}
    assert raised == {1, 2}
    reverse = np.array(ranked(problem, budget, reverse=True))
    assert 1 not in {int(b) for b in problem.blocks[reverse == 2]}
    three = np.array(ranked(problem, int(6.5 * problem.n_weights), bits=(8, 4, 2)))
    assert {problem.schemes[c].bits for c in three} == {8, 4}


def test_spikes_protects_the_costliest_rows_within_the_budget():
    problem = problem_of(make_report())
    budget = problem.size_of([1] * 12)
    choice = spikes(problem, budget, share=0.1, bits=4)
    costliest = int(problem.costs[:, 1].argmax())
    assert problem.schemes[choice[costliest]].bits == 4
    assert 0 < sum(c == 0 for c in choice) < 6  # a few pay, the rest stays


def test_spikes_is_uniform_where_those_who_pay_would_be_too_slow():
    problem = problem_of(make_report())
    times = np.tile([9.0, 3.0, 20.0, 20.0], (12, 1))  # of all widths, three bits are the fastest
    plain = [1] * 12
    timed_out = replace(problem, times=times, max_time=36.0)
    assert spikes(timed_out, problem.size_of(plain)) == plain
    assert spikes(problem, problem.size_of(plain)) != plain


def test_a_plan_that_cannot_beat_uniform_is_uniform_and_says_so():
    report = make_report()
    flat = SensitivityReport(
        report.linears,
        report.schemes,
        torch.tensor([[8.0, 1.0, 0.9, 0.8]]).double().repeat(12, 1),
        {},
    )
    bpw = problem_of(flat).size_of([1] * 12) / problem_of(flat).n_weights
    plan = make_plan(flat, bpw, ranked)
    assert {scheme.bits for scheme in plan.schemes.values()} == {3}
    assert "not below the uniform" in plan.notes[0]
    kept = make_plan(flat, bpw, ranked, allow_worse=True)
    assert {scheme.bits for scheme in kept.schemes.values()} == {2, 4}


def test_pins_that_cannot_be_are_refused():
    report = make_report()
    problem = problem_of(report)
    with pytest.raises(PlanError, match="no such linear"):
        pin(problem, {"layers.9.q_proj": report.schemes[0]})
    with pytest.raises(PlanError, match="menu"):
        pin(problem, {"layers.0.q_proj": QuantScheme(5, 32)})
    tied = tie(problem, [["layers.0.q_proj", "layers.0.k_proj"]])
    with pytest.raises(PlanError, match="two different schemes"):
        pin(tied, {"layers.0.q_proj": report.schemes[0], "layers.0.k_proj": report.schemes[1]})


def test_a_solver_without_time_says_what_would_help(monkeypatch):
    monkeypatch.setattr(knapsack_table, "MOST_CELLS", 0)
    problem = problem_of(make_report(n_blocks=40))
    with pytest.raises(
        BudgetError, match=r"no plan was proved .* in 1e-09 seconds .*seconds\": 6e-09"
    ):
        exact(problem, int(3.3 * problem.n_weights), seconds=1e-9)
