"""Passkey texts: what is hidden where, how long they are, and that a seed fixes them."""

import re

import pytest

from lwquant.errors import CalibrationError
from lwquant.evaluation.passkey import DIGITS, FILLER, NEEDLE, passkeys

DEPTHS = (0.0, 0.5, 1.0)


def count_words(text: str) -> int:
    return len(text.split())


def made(length: int = 200, depths=DEPTHS, repeats: int = 3, seed: int = 0):
    return passkeys(count_words, length, depths=depths, repeats=repeats, seed=seed)


def test_the_digits_stand_only_where_they_are_hidden():
    for example in made():
        (answer,) = example.options
        key = answer.removeprefix(" ")
        assert re.fullmatch(rf"\d{{{DIGITS}}}", key)
        assert example.context.count(NEEDLE.format(key=key)) == 1
        rest = example.context.replace(NEEDLE.format(key=key), "")
        assert not re.search(r"\d", rest) and rest.endswith("The passkey is")


@pytest.mark.parametrize("length", [60, 100, 333, 1024])
def test_a_text_is_as_long_as_it_may_be_with_its_answer(length):
    longest_sentence = max(map(count_words, FILLER))
    for example in made(length):
        words = count_words(example.context + example.options[0])
        assert length - longest_sentence < words <= length


def test_the_depth_is_the_share_of_filler_before_the_key():
    for example, depth in zip(made(1000, (0.0, 0.25, 0.5, 1.0), 1), (0, 0.25, 0.5, 1), strict=True):
        before, behind = example.context.split("The passkey is", 1)
        n_before, n_behind = (sum(part.count(line) for line in FILLER) for part in (before, behind))
        assert n_before == round(depth * (n_before + n_behind)) and n_before + n_behind > 80


def test_keys_differ_and_only_the_seed_changes_them():
    keys = [example.options[0] for example in made(repeats=20)]
    assert len(set(keys)) > 55  # of 60
    assert made() == made()
    assert made() != made(seed=1)
    assert made(depths=(0.5,)) == made()[3:6]


def test_lengths_and_depths_out_of_range_are_refused():
    with pytest.raises(CalibrationError, match=r"length=20 must be at least (\d+) tokens") as error:
        made(20)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert all(line not in made(least)[0].context for line in FILLER)
    with pytest.raises(CalibrationError, match="length=-1 must"):
        made(-1)
    with pytest.raises(CalibrationError, match=r"depth=1.5 must be from 0 to 1"):
        made(depths=(1.5,))
