"""From scores to accuracies, by hand and beside numpy."""

import math

import numpy as np
import pytest

from lwquant.evaluation.continuation import Score
from lwquant.evaluation.tasks import (
    Answers,
    Example,
    joined,
    judge_choice,
    judge_greedy,
    paired_difference,
    summarize,
)


def choice(right: int, *options: str) -> Example:
    return Example("Which?", options, right)


def test_a_last_word_is_right_where_greedy_decoding_writes_it():
    answers = judge_greedy([Score(-3.0, True), Score(-0.1, False)])
    assert answers == Answers((True, False), (-3.0, -0.1))


def test_the_choice_is_the_most_probable_one_or_the_most_probable_per_character():
    examples = [choice(1, " ab", " abcdefgh"), choice(0, " ab", " abcdefgh"), choice(1, " x", " y")]
    scores = [
        [Score(-2.0, True), Score(-4.0, False)],  # -1 and -0.5 per character
        [Score(-2.0, True), Score(-4.0, False)],
        [Score(-1.0, True), Score(-1.0, True)],  # equal: the first is chosen
    ]
    raw = judge_choice(examples, scores)
    normalized = judge_choice(examples, scores, per_character=True)
    assert raw.right == (False, True, False) and normalized.right == (True, False, False)
    assert raw.log_probs == normalized.log_probs == (-4.0, -2.0, -1.0)


def test_characters_are_counted_not_bytes_and_without_the_space_before():
    examples = [choice(0, " éé", " abc")]
    # Per character -1.5 and -1.6; with the space -1.0 and -1.2; per byte -0.75 and -1.6.
    assert judge_choice(
        examples, [[Score(-3.0, False), Score(-4.8, False)]], per_character=True
    ).right == (True,)
    # Per character -1.7 and -1.6, so the second; per byte the first.
    assert judge_choice(
        examples, [[Score(-3.4, False), Score(-4.8, False)]], per_character=True
    ).right == (False,)
    # Per character -1 and -1.1, so the first; with the space -0.67 and -0.55.
    examples = [choice(0, " abc", " a")]
    assert judge_choice(
        examples, [[Score(-3.0, False), Score(-1.1, False)]], per_character=True
    ).right == (True,)


def test_an_impossible_option_is_never_chosen_over_a_possible_one():
    scores = [[Score(-math.inf, False), Score(-900.0, False)]]
    assert judge_choice([choice(1, " a", " b")], scores).right == (True,)


def test_a_summary_is_what_numpy_says():
    generator = np.random.default_rng(0)
    ours, theirs = generator.random(200) < 0.6, generator.random(200) < 0.7
    logs = -generator.random(200)
    found = summarize(
        Answers(tuple(map(bool, ours)), tuple(logs)), Answers(tuple(map(bool, theirs)), tuple(logs))
    )
    differences = ours.astype(float) - theirs
    assert (found.examples, found.correct) == (200, ours.sum())
    assert found.accuracy == pytest.approx(ours.mean())
    assert found.standard_error == pytest.approx(ours.std() / math.sqrt(200))
    assert found.log_prob == pytest.approx(logs.mean())
    assert found.reference_accuracy == pytest.approx(theirs.mean())
    assert found.difference == pytest.approx(differences.mean())
    assert found.difference_error == pytest.approx(differences.std() / math.sqrt(200))
    assert found.changed == pytest.approx((ours != theirs).mean())


def test_without_a_reference_there_is_nothing_to_compare():
    found = summarize(Answers((True, False), (-1.0, -3.0)))
    assert (found.accuracy, found.log_prob) == (0.5, -2.0)
    assert (found.reference_accuracy, found.difference, found.changed) == (None, None, None)


def test_equal_answers_do_not_differ_and_the_sign_is_ours_less_theirs():
    assert paired_difference([True, False], [True, False]) == (0.0, 0.0)
    assert paired_difference([True, True], [False, False]) == (1.0, 0.0)
    assert paired_difference([False, True], [True, True])[0] == -0.5


def test_answers_to_other_examples_and_to_none_are_refused():
    with pytest.raises(ValueError):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="no accuracy"):
        summarize(Answers((), ()))


def test_joined_tasks_keep_their_order():
    parts = [Answers((True,), (-1.0,)), Answers((False, True), (-2.0, -3.0))]
    assert joined(parts) == Answers((True, False, True), (-1.0, -2.0, -3.0))
