"""Reading task files: JSON lines of last words and of multiple choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwquant.errors import CalibrationError
from lwquant.evaluation.tasks import Example


def read_last_words(path: Path) -> list[Example]:
    """Lines {"context", "continuation"}, as of LAMBADA; a space is put between the two.

    Raises CalibrationError that names file and line where a line is not that, or no line is there.
    """
    return [
        Example(
            _text(line, "context", where), (f" {_text(line, 'continuation', where)}",), 0, where
        )
        for line, where in _lines(path)
    ]


def read_questions(path: Path) -> list[Example]:
    """Lines {"query", "choices", "gold"}, as of ARC; a choice follows the query and "Answer:".

    `gold` counts choices from 0. Raises CalibrationError as read_last_words() does.
    """
    examples = []
    for line, where in _lines(path):
        context = _text(line, "query", where) + "\nAnswer:"
        choices = _value(line, "choices", where)
        if not isinstance(choices, list) or len(choices) < 2:
            raise CalibrationError(f"{where}: 'choices' must be a list of 2 texts or more")
        options = tuple(f" {_stripped(choice, 'a choice', where)}" for choice in choices)
        gold = _value(line, "gold", where)
        if type(gold) is not int or not 0 <= gold < len(choices):
            last = len(choices) - 1
            raise CalibrationError(
                f"{where}: 'gold' {gold!r} is not a whole number from 0 to {last}"
            )
        examples.append(Example(context, options, gold, where))
    return examples


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each object of the file, and where it stands; blank lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"task file {path}: {error}") from error
    if not text.strip():
        raise CalibrationError(f"task file {path} is empty")
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON text may hold other breaks
        if not line.strip():
            continue
        where = f"task file {path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CalibrationError(f"{where}: not a JSON object")
        yield value, where


def _value(line: dict[str, Any], key: str, where: str) -> Any:
    if key not in line:
        raise CalibrationError(f"{where}: {key!r} is missing")
    return line[key]


def _text(line: dict[str, Any], key: str, where: str) -> str:
    return _stripped(_value(line, key, where), repr(key), where)


def _stripped(value: Any, name: str, where: str) -> str:
    """The text without the white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{where}: {name} is {value!r}, not a text, or empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise CalibrationError(f"{where}: {name} holds half a character: {value!r}")
    return value.strip()
