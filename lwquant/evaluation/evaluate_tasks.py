"""How many tasks a model gets right, beside its original."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lwquant.capture.tokens import opening, tokenize
from lwquant.errors import CalibrationError, CheckpointError
from lwquant.evaluation.continuation import Continuation, encode, score
from lwquant.evaluation.measure import Predictions
from lwquant.evaluation.passkey import passkeys
from lwquant.evaluation.subject import Subject, open_subject
from lwquant.evaluation.task_files import read_last_words, read_questions
from lwquant.evaluation.tasks import (
    Answers,
    Example,
    TaskScore,
    joined,
    judge_choice,
    judge_greedy,
    summarize,
)
from lwquant.matmul import fast_float32
from lwquant.model.checkpoint import resolve
from lwquant.progress import Progress, silent

LENGTHS = (256, 512, 1024)  # tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS = 4  # keys for each length and depth


@dataclass(frozen=True)
class TaskEvaluation:
    """The tasks by name: lambada; arc (by log-probability, the accuracy usually reported) and
    arc-normalized (by log-probability per character); passkey, and its parts by length."""

    tasks: Mapping[str, TaskScore]
    bpw: float | None  # stored bits per weight of the linears, None for formats of others
    size_bytes: int  # of the weight files
    # The model's own answers, example by example, under the same names; not in the JSON.
    answers: Mapping[str, Answers] = field(repr=False, compare=False)

    def to_json(self) -> str:
        """One object: "tasks" by name, with the fields of TaskScore as keys; "bpw", "size_bytes".

        A log-probability of minus infinity is null.
        """
        tasks = {
            name: {
                key: None if value == -math.inf else value for key, value in asdict(task).items()
            }
            for name, task in self.tasks.items()
        }
        found = {"tasks": tasks, "bpw": self.bpw, "size_bytes": self.size_bytes}
        return json.dumps(found, indent=2, allow_nan=False)


@dataclass(frozen=True)
class _Suite:
    """What is asked, before a tokenizer says how long a passkey's text may be."""

    files: Mapping[str, Sequence[Example]]
    lengths: Sequence[int]
    seed: int


def evaluate_tasks(
    model: str | Path,
    *,
    lambada: str | Path | None = None,
    arc: str | Path | None = None,
    passkey: bool = True,
    limit: int | None = None,
    passkey_lengths: Sequence[int] = LENGTHS,
    reference: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> TaskEvaluation:
    """Measure a model's accuracy on tasks, each text as it is, without a chat template.

    Args:
        model, reference: folder, .gguf file or hub id; the reference, usually the original,
            answers the same examples.
        lambada: file of last words, right where greedy decoding writes the word; task_files.py
            says what a line holds.
        arc: file of multiple choice.
        passkey: five digits to be found in filler text, at five depths and each of
            `passkey_lengths` (tokens); REPEATS of each. `seed` draws them.
        limit: use the first examples of each file only.

    Raises CalibrationError for bad files and settings, before a model is opened, and for texts
    longer than its positions; CheckpointError for models that cannot be read.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit={limit} must be at least 1")
    files: dict[str, Sequence[Example]] = {}
    if lambada is not None:
        files["lambada"] = read_last_words(Path(lambada))[:limit]
    if arc is not None:
        files["arc"] = read_questions(Path(arc))[:limit]
    suite = _Suite(files, tuple(dict.fromkeys(passkey_lengths)) if passkey else (), seed)
    if not suite.files and not suite.lengths:
        raise CalibrationError("no task was given: neither lambada, nor arc, nor passkey lengths")
    paths = [resolve(name) for name in (model, reference) if name is not None]
    with fast_float32():
        subject = open_subject(paths[0], device)
        bpw, size_bytes = subject.bpw, subject.size_bytes
        mine = _answers(subject, suite, str(model), progress)
        del subject  # one model in memory at a time
        theirs: dict[str, Answers] = {}
        if len(paths) == 2:
            theirs = _answers(open_subject(paths[1], device), suite, str(reference), progress)
    scores = {name: summarize(answers, theirs.get(name)) for name, answers in mine.items()}
    return TaskEvaluation(scores, bpw, size_bytes, mine)


def _answers(subject: Subject, suite: _Suite, model: str, progress: Progress) -> dict[str, Answers]:
    """By task; everything is tokenized and checked before the model computes."""
    prefix = len(opening(subject.tokenizer))

    def count_tokens(text: str) -> int:
        return prefix + len(tokenize(text, subject.tokenizer))

    examples = dict(suite.files)
    for length in suite.lengths:
        _check_positions(length, "passkey length", subject, model)
        examples[f"passkey-{length}"] = passkeys(
            count_tokens, length, depths=DEPTHS, repeats=REPEATS, seed=suite.seed
        )
    encoded = {
        name: [
            encode(example.context, option, subject.tokenizer, example.where)
            for example in every
            for option in example.options
        ]
        for name, every in examples.items()
    }
    for continuations in encoded.values():
        _check_fits(continuations, subject, model)

    def predict(windows: Any) -> Predictions:
        return subject.predictions(windows, None, silent)

    found: dict[str, Answers] = {}
    for name, every in examples.items():
        scores = score(predict, encoded[name], name=name, progress=progress)
        if name != "arc":
            found[name] = judge_greedy(scores)
            continue
        remaining = iter(scores)
        choices = [[next(remaining) for _ in example.options] for example in every]
        found["arc"] = judge_choice(every, choices)
        found["arc-normalized"] = judge_choice(every, choices, per_character=True)
    if suite.lengths:
        found["passkey"] = joined([found[f"passkey-{length}"] for length in suite.lengths])
    return found


def _check_fits(continuations: Sequence[Continuation], subject: Subject, model: str) -> None:
    for item in continuations:
        _check_positions(len(item.tokens), f"{item.where}: length", subject, model)
        if int(item.tokens.max()) >= subject.config.vocab_size:
            raise CheckpointError(
                f"{model}: its tokenizer gives token {int(item.tokens.max())}, "
                f"the model knows {subject.config.vocab_size}"
            )


def _check_positions(n_tokens: int, name: str, subject: Subject, model: str) -> None:
    positions: Any = getattr(subject.config, "max_position_embeddings", None)
    if positions is not None and n_tokens > positions:
        raise CalibrationError(f"{name} {n_tokens} exceeds the {positions} positions of {model}")
