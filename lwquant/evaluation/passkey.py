"""Recall from the context: digits hidden in filler text, to be repeated at its end.

After Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", arXiv:2305.16300, section 4.2, with our own text. No data is needed, and no
knowledge: a model can only know the digits from its context.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence

from lwquant.errors import CalibrationError
from lwquant.evaluation.tasks import Example

DIGITS = 5
INTRODUCTION = "A passkey is hidden in the text below. Find it and keep it in mind.\n\n"
NEEDLE = "The passkey is {key}. Keep it in mind: {key} is the passkey."
QUESTION = "\n\nWhat is the passkey? The passkey is"
FILLER = (
    "The baker opens his shop before the sun is up.",
    "Rain fell on the hills for most of the night.",
    "A grey cat sleeps on the wall behind the school.",
    "The train to the coast was late again.",
    "Two boats lie in the harbour and wait for the wind.",
    "Her brother paints the fence every other summer.",
    "There is a market on the square in front of the church.",
    "The old clock in the hall has stopped.",
    "Most of the leaves have fallen by now.",
    "They walked along the river and talked about the weather.",
    "The teacher put her books on the table near the window.",
    "In winter the road over the mountain is closed.",
)


def passkeys(
    count_tokens: Callable[[str], int],
    length: int,
    *,
    depths: Sequence[float],
    repeats: int,
    seed: int,
) -> list[Example]:
    """`repeats` examples for each depth, each with as much filler as fits.

    Args:
        count_tokens: tokens of a text for the model that will read it.
        length: most tokens of a text, the answer included.
        depths: where among the filler the key stands, 0 is before all of it and 1 behind.

    The same arguments give the same examples, whatever other lengths and depths are asked for.
    Raises CalibrationError for a length that is too short, or a depth outside 0 to 1.
    """
    return [
        _passkey(count_tokens, length, depth, random.Random(f"{seed} {length} {depth} {repeat}"))
        for depth in depths
        for repeat in range(repeats)
    ]


def _passkey(
    count_tokens: Callable[[str], int], length: int, depth: float, generator: random.Random
) -> Example:
    if not 0 <= depth <= 1:
        raise CalibrationError(f"passkey depth={depth} must be from 0 to 1")
    key = "".join(generator.choices("0123456789", k=DIGITS))
    sentences = generator.choices(FILLER, k=max(length, 0))  # none has less than a token

    def context(n_sentences: int) -> str:
        before = round(depth * n_sentences)
        parts = [*sentences[:before], NEEDLE.format(key=key), *sentences[before:n_sentences]]
        return INTRODUCTION + " ".join(parts) + QUESTION

    answer = f" {key}"
    fitting = bisect_right(
        range(len(sentences) + 1), length, key=lambda n: count_tokens(context(n) + answer)
    )
    if fitting == 0:
        least = count_tokens(context(0) + answer)
        raise CalibrationError(f"passkey length={length} must be at least {least} tokens")
    return Example(context(fitting - 1), (answer,), 0, f"passkey of length {length}")
