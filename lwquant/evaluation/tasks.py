"""Accuracy on tasks: from the scores of continuations to right, wrong and how sure that is.

Last words: Paperno et al., "The LAMBADA dataset", arXiv:1606.06031. Multiple choice: Clark et al.,
"Think you have Solved Question Answering? Try ARC", arXiv:1803.05457. Two models that answer alike
on average can still answer differently: Dutta et al., "Accuracy is Not All You Need",
arXiv:2407.09141, whose flips are `changed` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lwquant.evaluation.continuation import Score


@dataclass(frozen=True)
class Example:
    """A text and how it may go on."""

    context: str
    options: tuple[str, ...]  # with the space between context and option
    right: int  # which option
    where: str = ""  # file and line, for errors


@dataclass(frozen=True)
class Answers:
    """What a model made of a task, example by example."""

    right: tuple[bool, ...]
    log_probs: tuple[float, ...]  # of the right options, nats


@dataclass(frozen=True)
class TaskScore:
    """A task in numbers; what needs a reference is None without one."""

    examples: int
    correct: int
    accuracy: float  # 0 to 1
    standard_error: float  # of the accuracy, sqrt(p (1 - p) / n)
    log_prob: float  # mean of the right option, nats
    reference_accuracy: float | None = None
    difference: float | None = None  # of the accuracies, model - reference
    difference_error: float | None = None  # its standard error over the shared examples
    changed: float | None = None  # share of examples that only one of both answers right


def judge_greedy(scores: Sequence[Score]) -> Answers:
    """One option per example: right where greedy decoding writes it."""
    return Answers(
        tuple(score.greedy for score in scores), tuple(score.log_prob for score in scores)
    )


def judge_choice(
    examples: Sequence[Example], scores: Sequence[Sequence[Score]], *, per_character: bool = False
) -> Answers:
    """Several options per example: right where the right one has the highest log-probability.

    Args:
        scores: for each example one per option.
        per_character: divide each log-probability by the characters of its option, the space
            before it not counted, so that long options are not at a disadvantage.

    Of equals the first is chosen.
    """
    right = []
    for example, found in zip(examples, scores, strict=True):
        lengths = [len(option.strip()) if per_character else 1 for option in example.options]
        values = [score.log_prob / length for score, length in zip(found, lengths, strict=True)]
        right.append(values.index(max(values)) == example.right)
    chosen = zip(examples, scores, strict=True)
    return Answers(tuple(right), tuple(found[example.right].log_prob for example, found in chosen))


def joined(parts: Sequence[Answers]) -> Answers:
    """Several tasks as one."""
    return Answers(
        tuple(right for part in parts for right in part.right),
        tuple(log_prob for part in parts for log_prob in part.log_probs),
    )


def summarize(answers: Answers, reference: Answers | None = None) -> TaskScore:
    """Accuracy, and how it differs from that of a reference on the same examples.

    ValueError for no examples.
    """
    examples, correct = len(answers.right), sum(answers.right)
    if not examples:
        raise ValueError("a task without examples has no accuracy")
    accuracy = correct / examples
    error = math.sqrt(accuracy * (1 - accuracy) / examples)
    log_prob = sum(answers.log_probs) / examples
    if reference is None:
        return TaskScore(examples, correct, accuracy, error, log_prob)
    difference, difference_error = paired_difference(answers.right, reference.right)
    changed = sum(a != b for a, b in zip(answers.right, reference.right, strict=True))
    return TaskScore(
        examples,
        correct,
        accuracy,
        error,
        log_prob,
        sum(reference.right) / examples,
        difference,
        difference_error,
        changed / examples,
    )


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float]:
    """Accuracy of `ours` less that of `theirs` on the same examples, and its standard error.

    Examples that both answer alike say nothing about which is better, so the error is smaller
    than that of two accuracies measured apart.

    >>> paired_difference([True, True, True, False], [True, True, False, False])
    (0.25, 0.21650635094610965)
    """
    signs = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(signs) / len(signs)
    variance = sum((sign - mean) ** 2 for sign in signs) / len(signs)
    return mean, math.sqrt(variance / len(signs))
