"""Local search against whole models with weights replaced, and against trying every move."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from oracles import kl_per_token
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.allocators import exact
from lwquant.allocators.problem import Problem
from lwquant.errors import LwquantError
from lwquant.local_search import Search
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers import rtn
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.swapped_model import SwappedModel, quantize_apart

TWO, THREE, SIXTEEN = QuantScheme(2, 32), QuantScheme(3, 32), QuantScheme(16)
QUIET = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer, heldout_text):
    ids = tiny_tokenizer(heldout_text[:3000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 4 * 48]).view(4, 48)


@torch.no_grad()
def test_a_changed_plan_has_the_kl_of_the_model_with_its_weights_replaced(tiny_folder, tokens):
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    menus = {spec.name: (TWO, THREE, SIXTEEN) for spec in decoder.linears}
    weights = quantize_apart(decoder, tokens, menus, rtn)
    original = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    reference = original(tokens).logits.flatten(0, 1)

    def wanted(schemes):
        changed = deepcopy(original)
        for name, scheme in schemes.items():
            weight = changed.get_submodule(name).weight
            if not scheme.is_float:
                weight.copy_(rtn(weight, None, scheme).dequantize())
        return kl_per_token(reference, changed(tokens).logits.flatten(0, 1))

    names = [spec.name for spec in decoder.linears]
    schemes = {name: (TWO, THREE, SIXTEEN)[row % 3] for row, name in enumerate(names)}
    model = SwappedModel(decoder, weights, tokens, schemes)
    assert model.kl == pytest.approx(wanted(schemes), rel=1e-3)
    changes = [
        {names[9]: THREE},  # better, in the second block
        {names[0]: SIXTEEN, names[20]: TWO},
        {names[27]: TWO},  # worse, and must leave nothing behind
        {names[24]: SIXTEEN},
    ]
    outcomes = []
    for change in changes:
        before = model.kl
        assert model.measure({**schemes, **change}) == pytest.approx(
            wanted({**schemes, **change}), rel=1e-3
        )
        assert model.schemes == schemes and model.kl == before == model.measure(schemes)
        kl = model.change(change)
        assert kl == pytest.approx(wanted({**schemes, **change}), rel=1e-3)
        if kl < before:
            schemes = {**schemes, **change}
        outcomes.append(kl < before)
        assert model.schemes == schemes and model.kl == min(before, kl)
    assert outcomes[0] and not outcomes[2]


def make_problem(n_rows=6, seed=0):
    generator = np.random.default_rng(seed)
    weights = np.array([64, 64, 128, 128, 192, 192][:n_rows]) * 64
    costs = generator.lognormal(0, 1, n_rows)[:, None] * 4.0 ** -np.array([2.0, 3, 4, 8])
    return Problem(
        names=tuple((f"{row}",) for row in range(n_rows)),
        blocks=np.zeros(n_rows, dtype=int),
        weights=weights,
        costs=costs,
        sizes=weights[:, None] * np.array([2, 3, 4, 8]),
        schemes=tuple(QuantScheme(bits, 32) for bits in (2, 3, 4, 8)),
    )


def run_search(search, kl_of, moves=10_000):
    """Moves that were measured, in order, with the plan that each led to, and the last KL."""
    steps, kl = [], kl_of(search.choice)
    while len(steps) < moves and (move := search.next_move()) is not None:
        changed = list(search.choice)
        for row, column in move.columns().items():
            changed[row] = column
        steps.append((move, changed))
        after = kl_of(changed)
        search.record(move, after - kl, kept=after < kl)
        kl = min(kl, after)
    return steps, kl


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_where_every_move_within_the_budget_was_tried(seed):
    problem = make_problem(seed=seed)
    budget = int(3.2 * problem.n_weights)
    start = exact(problem, budget)
    pairs = np.random.default_rng(seed + 10).normal(0, 0.3, (6, 6))

    def kl_of(choice):
        own = np.sqrt(problem.costs[np.arange(6), choice])
        return own @ own + own @ (pairs + pairs.T) @ own

    search = Search(problem, start, budget)
    steps, kl = run_search(search, kl_of)
    moves = {move for move, _ in steps}
    assert len(moves) == len(steps)
    assert all(problem.size_of(changed) <= budget for _, changed in steps)
    assert kl == kl_of(search.choice) <= kl_of(start)
    tried = {(move.up, move.wider, move.down, move.narrower) for move in moves}
    for up, down in product(range(6), [*range(6), None]):
        changed = list(search.choice)
        changed[up] += 1
        if down is not None:
            changed[down] -= 1
        inside = all(0 <= c < 4 and abs(c - s) <= 1 for c, s in zip(changed, start, strict=True))
        if up != down and inside and problem.size_of(changed) <= budget:
            narrower = None if down is None else changed[down]
            assert (up, changed[up], down, narrower) in tried


def test_the_first_move_is_the_one_that_promises_most_and_a_surprise_changes_the_next():
    problem = make_problem()
    flat = np.array([[16.0, 8, 4, 2]] * 6)
    flat[0] *= 3  # row 0 would gain 12 by going to four bits
    search = Search(
        Problem(
            problem.names,
            problem.blocks,
            problem.weights,
            flat,
            problem.sizes,
            problem.schemes,
        ),
        [1] * 6,
        problem.size_of([1] * 6),
    )
    first = search.next_move()
    assert (first.up, first.wider, first.narrower) == (0, 2, 0)
    assert first.down in (1, 2, 3, 4, 5)
    search.record(first, 40.0, kept=False)
    second = search.next_move()
    assert second.up != 0 and second.down != first.down
    assert search.choice == [1] * 6
    search.record(second, -1.0, kept=True)
    assert search.choice[second.up] == 2 and search.choice[second.down] == 0


def test_pinned_rows_stay_and_spare_bits_are_used_without_a_payer():
    problem = make_problem()
    problem.costs[2] = [np.inf, 1.0, np.inf, np.inf]
    search = Search(problem, [1] * 6, problem.size_of([1] * 6) + 64 * 64)
    assert search.menus()["2"] == {QuantScheme(3, 32)}
    steps, _ = run_search(search, problem.cost_of)
    assert all(2 not in move.columns() for move, _ in steps)
    assert any(move.down is None for move, _ in steps)


def test_moves_keep_a_limit_on_decode_time():
    problem = make_problem()
    times = np.random.default_rng(2).uniform(1, 9, problem.sizes.shape)
    start, budget = [1] * 6, int(3.5 * problem.n_weights)
    limit = 1.02 * times[:, 1].sum()
    timed = replace(problem, times=times, max_time=limit)
    steps, _ = run_search(Search(timed, start, budget), timed.cost_of)
    assert steps and all(timed.fits(changed, budget) for _, changed in steps)
    free, _ = run_search(Search(problem, start, budget), problem.cost_of)
    assert any(not timed.in_time(changed) for _, changed in free)


def test_the_plan_taken_is_the_best_of_four_on_held_out_windows(
    tiny_folder, heldout_text, tmp_path
):
    result = lwquant.quantize(
        tiny_folder,
        bpw=3.3,
        output=tmp_path / "out",
        recipe=Recipe(n_samples=8, seq_len=64, held_out=6, group_size=32, local_search=6),
        calibration=[heldout_text[:12000]],
        quantizer="rtn",
        correction="none",
        pins={"model.layers.0.mlp.up_proj": 4},
        **QUIET,
    )
    (note,) = [n for n in result.plan.notes if n.startswith("held-out KL of candidate plans")]
    values = [float(word.rstrip(",")) for word in note.split() if word[0] == "0"]
    assert len(values) == 4 and values[0] == min(values)
    assert result.held_out.kl_divergence == pytest.approx(values[0], abs=6e-5)
    assert result.bpw <= 3.3
    assert result.plan.schemes["model.layers.0.mlp.up_proj"].bits == 4
    assert any("of 6 measured moves kept" in n for n in result.plan.notes)


def test_what_cannot_search_refuses(tiny_folder, tmp_path):
    recipe = Recipe(local_search=3)
    with pytest.raises(LwquantError, match="local_search=3 needs a budget in bpw or size"):
        lwquant.quantize(tiny_folder, max_kl=0.1, output=tmp_path / "a", recipe=recipe)
    with pytest.raises(LwquantError, match="local_search=3 is for one budget"):
        lwquant.sweep(tiny_folder, bpw=[3], output=tmp_path / "b", recipe=recipe)
    with pytest.raises(LwquantError, match="local_search=-1 must be at least 0"):
        Recipe(local_search=-1)
