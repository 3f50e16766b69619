"""Fitted own and pair terms against a known quadratic, and plans from them against brute force."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import lwquant
from lwquant.allocators import exact
from lwquant.allocators.problem import Problem, neighbours
from lwquant.errors import LwquantError
from lwquant.pair_terms import MOVED, Terms, fit_terms, random_choice
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme

QUIET = {"progress": lambda *_: None}
BITS = (2, 3, 4)


def make_problem(blocks=(0, 0, 1, 1, 2, 2, 3), seed=0):
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 4, len(blocks)) * 64 * 64
    factors = generator.lognormal(0, 0.7, len(blocks))
    return Problem(
        names=tuple((f"{row}",) for row in range(len(blocks))),
        blocks=np.array(blocks),
        weights=weights,
        costs=factors[:, None] * 4.0 ** -np.array(BITS),
        sizes=weights[:, None] * np.array(BITS),
        schemes=tuple(QuantScheme(bits, 32) for bits in BITS),
    )


def make_kl(problem, seed=0):
    """The quadratic from its definition, with its terms: own (rows), pairs by block."""
    generator = np.random.default_rng(seed + 100)
    own = generator.uniform(0.6, 1.4, len(problem.names))
    pairs = {
        pair: generator.normal(0.2, 0.3)
        for pair in product(sorted(set(problem.blocks.tolist())), repeat=2)
        if pair[0] <= pair[1]
    }

    def kl_of(choice):
        costs = [problem.costs[row, column] for row, column in enumerate(choice)]
        total = sum(factor * cost for factor, cost in zip(own, costs, strict=True))
        for r in range(len(choice)):
            for s in range(r):
                pair = tuple(sorted((problem.blocks[r], problem.blocks[s])))
                total += pairs[pair] * np.sqrt(costs[r] * costs[s])
        return total

    return kl_of, own, pairs


def sampled(problem, n_plans, seed=0):
    generator = np.random.default_rng(seed)
    begin = [1] * len(problem.names)
    near = [neighbours(problem, row, column) for row, column in enumerate(begin)]
    return [random_choice(begin, near, generator) for _ in range(n_plans)], begin, near


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 0.3])  # of the metric's costs against nats
def test_a_known_quadratic_is_recovered(seed, scale):
    problem = make_problem(seed=seed)
    kl_of, own, pairs = make_kl(problem, seed)
    choices, _, _ = sampled(problem, 300, seed)
    given = replace(problem, costs=scale * problem.costs)
    terms, error = fit_terms(given, choices, [kl_of(choice) for choice in choices])
    others, _, _ = sampled(problem, 50, seed + 50)
    values = np.array([kl_of(choice) for choice in others])
    predicted = np.array([terms.kl_of(choice) for choice in others])
    assert np.abs(predicted - values).max() < 1e-3 * values.std()
    assert error < 1e-3 * values.std()
    factor = terms.problem.costs[0, 0] / problem.costs[0, 0]
    np.testing.assert_allclose(terms.own * factor, own, atol=0.02)
    for r, s in product(range(7), repeat=2):
        wanted = 0.0 if r == s else pairs[tuple(sorted(problem.blocks[[r, s]].tolist()))]
        assert terms.pairs[r, s] * factor == pytest.approx(wanted, abs=0.02)


def test_few_noisy_measurements_shrink_the_terms_and_still_beat_the_costs_alone():
    problem = make_problem(blocks=np.repeat(np.arange(8), 3))
    kl_of, _, pairs = make_kl(problem)
    choices, _, _ = sampled(problem, 30)  # for 24 own and 36 pair terms
    noise = np.random.default_rng(1).normal(0, 1, 30)
    clean = np.array([kl_of(choice) for choice in choices])
    terms, error = fit_terms(problem, choices, clean + 0.1 * clean.std() * noise)
    others, _, _ = sampled(problem, 200, 9)
    values = np.array([kl_of(choice) for choice in others])
    costs = np.array([terms.problem.cost_of(choice) for choice in others])
    missed = np.sqrt(np.square([terms.kl_of(c) for c in others] - values).mean())
    assert missed < 0.75 * np.sqrt(np.square(costs - values).mean())
    assert 0.4 * missed < error < 2.5 * missed  # what is said of plans not seen is about true
    fitted = np.square(terms.pairs[::3, ::3]).sum() / 2
    known = sum(value**2 for (a, b), value in pairs.items() if a != b)
    assert 0 < fitted < known


def test_pure_noise_leaves_the_costs_as_they_are():
    problem = make_problem()
    choices, _, _ = sampled(problem, 40)
    costs = np.array([problem.cost_of(choice) for choice in choices])
    noise = np.random.default_rng(5).normal(0, 0.3 * costs.std(), 40)
    terms, _ = fit_terms(problem, choices, costs + noise)
    assert np.abs(terms.own - 1).max() < 0.2 and np.abs(terms.pairs).max() < 0.05


def test_the_costs_around_a_plan_say_exactly_what_one_row_alone_changes():
    problem = make_problem()
    problem.costs[3, 0] = np.inf
    generator = np.random.default_rng(3)
    pairs = generator.normal(0, 0.3, (7, 7))
    terms = Terms(problem, generator.uniform(0.5, 1.5, 7), np.triu(pairs, 1) + np.triu(pairs, 1).T)
    begin = [1, 0, 2, 1, 1, 2, 0]
    costs = terms.around(np.sqrt(problem.costs[np.arange(7), begin]))
    assert np.isinf(costs[3, 0]) and np.isfinite(costs).sum() == 20
    for row, column in product(range(7), range(3)):
        if (row, column) == (3, 0):
            continue
        changed = [*begin[:row], column, *begin[row + 1 :]]
        wanted = terms.kl_of(changed) - terms.kl_of(begin)
        assert costs[row, column] - costs[row, begin[row]] == pytest.approx(wanted, abs=1e-12)


def test_plans_are_nearly_always_those_of_brute_force_and_never_worse_than_the_start():
    found_best, gains = 0, []
    for seed in range(20):
        problem = make_problem(seed=seed)
        problem.costs[6, 0] = np.inf
        generator = np.random.default_rng(seed)
        by_block = generator.normal(0.3, 0.5, (4, 4))
        pairs = (by_block + by_block.T)[problem.blocks][:, problem.blocks] / 2
        np.fill_diagonal(pairs, 0)
        terms = Terms(problem, np.ones(7), pairs)
        budget = int(3.1 * problem.n_weights)
        begin = exact(problem, budget)
        near = [neighbours(problem, row, column) for row, column in enumerate(begin)]
        choice = terms.plan(begin, near, budget)
        assert problem.size_of(choice) <= budget
        assert all(column in columns for column, columns in zip(choice, near, strict=True))
        within = [c for c in product(*near) if problem.size_of(c) <= budget]
        best, start, got = min(map(terms.kl_of, within)), terms.kl_of(begin), terms.kl_of(choice)
        assert best - 1e-12 <= got <= start
        found_best += got <= best + 1e-12
        gains.append((start - got) / (start - best) if start > best + 1e-12 else 1.0)
    assert found_best >= 12 and np.mean(gains) > 0.8


def test_plans_go_no_further_than_was_measured_however_large_the_budget():
    problem = make_problem()
    near = [neighbours(problem, row, 0) for row in range(7)]
    terms = Terms(problem, np.ones(7), np.zeros((7, 7)))
    assert terms.plan([0] * 7, near, 100 * problem.n_weights) == [1] * 7


def test_random_plans_move_each_row_by_one_scheme_at_most():
    problem = make_problem()
    problem.costs[2] = [np.inf, 1.0, np.inf]
    choices, begin, near = sampled(problem, 600)
    assert near[2] == [1]
    steps = np.array(choices) - begin
    assert set(np.unique(steps)) == {-1, 0, 1} and not steps[:, 2].any()
    moved = np.delete(steps, 2, axis=1)
    assert (moved == 1).mean() == pytest.approx(MOVED / 2, abs=0.03)
    assert (moved == -1).mean() == pytest.approx(MOVED / 2, abs=0.03)
    widest = [neighbours(problem, row, 2) for row in (0, 1, 3, 4, 5, 6)]
    drawn = random_choice([2] * 6, widest, np.random.default_rng(0))
    assert set(drawn) == {1, 2}


def run(tiny_folder, heldout_text, output, **settings):
    return lwquant.quantize(
        tiny_folder,
        bpw=3.3,
        output=output,
        recipe=Recipe(n_samples=8, seq_len=64, held_out=4, group_size=32),
        calibration=[heldout_text[:12000]],
        quantizer="rtn",
        correction="none",
        pins={"model.layers.0.mlp.up_proj": 4},
        **settings,
        **QUIET,
    )


def test_the_plan_taken_is_the_better_of_two_on_held_out_windows(
    tiny_folder, heldout_text, tmp_path
):
    made = run(tiny_folder, heldout_text, tmp_path / "out", pair_terms=12, tie_fused=True)
    assert made.bpw <= 3.3
    assert made.plan.schemes["model.layers.0.mlp.up_proj"].bits == 4
    assert made.plan.schemes["model.layers.0.mlp.gate_proj"].bits == 4
    (fitted,) = [n for n in made.plan.notes if n.startswith("pair terms from 12 measured plans")]
    if "no other plan" not in fitted:
        (note,) = [n for n in made.plan.notes if n.startswith("held-out KL of candidate plans")]
        values = [float(word.rstrip(",")) for word in note.split() if word[0] == "0"]
        assert len(values) == 2 and values[0] == min(values)
        assert made.held_out.kl_divergence == pytest.approx(values[0], abs=6e-5)
        taken = json.loads((made.folder / "plan.json").read_text())["allocator"]
        assert ("pair_terms" in taken) == ("plans: pair terms" in note)


def test_it_comes_after_remeasuring_and_before_local_search(tiny_folder, heldout_text, tmp_path):
    steps = {"remeasure": 1, "pair_terms": 4, "local_search": 2}
    notes = run(tiny_folder, heldout_text, tmp_path / "out", **steps).plan.notes
    starts = ("held-out KL", "pair terms from 4", "local search:")
    places = [next(i for i, n in enumerate(notes) if n.startswith(start)) for start in starts]
    assert places == sorted(places)


def test_what_cannot_measure_refuses(tiny_folder, tmp_path):
    recipe = Recipe(pair_terms=3)
    with pytest.raises(LwquantError, match="pair_terms=3 needs a budget in bpw or size"):
        lwquant.quantize(tiny_folder, max_kl=0.1, output=tmp_path / "a", recipe=recipe)
    with pytest.raises(LwquantError, match="pair_terms=3 is for one budget"):
        lwquant.sweep(tiny_folder, bpw=[3], output=tmp_path / "b", recipe=recipe)
    with pytest.raises(LwquantError, match="pair_terms=-1 must be at least 0"):
        Recipe(pair_terms=-1)
