"""Task files: what is read from good ones, and which line of a bad one is named."""

import json

import pytest

from lwquant.errors import CalibrationError
from lwquant.evaluation.task_files import read_last_words, read_questions
from lwquant.evaluation.tasks import Example

WORD = {"context": "He said yes, she said", "continuation": "no"}
QUESTION = {"query": "Question: Which?", "choices": ["this", "that one"], "gold": 1}


def write(path, *lines):
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines),
        encoding="utf-8",
    )
    return path


def test_a_last_word_follows_its_context_after_a_space(tmp_path):
    path = write(tmp_path / "w.jsonl", WORD, "", {**WORD, "context": " Nein, \n", "more": 1})
    first, second = read_last_words(path)
    where = f"task file {path}, line "
    assert first == Example("He said yes, she said", (" no",), 0, where + "1")
    assert second == Example("Nein,", (" no",), 0, where + "3")


def test_a_choice_follows_the_query_and_the_word_answer(tmp_path):
    (found,) = read_questions(write(tmp_path / "q.jsonl", QUESTION))
    assert (found.context, found.options) == (
        "Question: Which?\nAnswer:",
        (" this", " that one"),
    )
    assert found.right == 1


def test_only_line_feeds_end_a_line(tmp_path):
    line = json.dumps({**WORD, "context": "one\u2028two"}, ensure_ascii=False)
    (found,) = read_last_words(write(tmp_path / "w.jsonl", line))
    assert found.context == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"context": "a"}, "'continuation' is missing"),
        ({"continuation": "a"}, "'context' is missing"),
        ({**WORD, "context": " \n"}, "'context' is ' \\n', not a text, or empty"),
        ({**WORD, "continuation": 5}, "'continuation' is 5, not a text"),
        ('{"context": "a \\ud800", "continuation": "b"}', "holds half a character"),
    ],
)
def test_a_bad_line_of_last_words_is_named(line, message, tmp_path):
    path = write(tmp_path / "w.jsonl", WORD, line)
    with pytest.raises(CalibrationError) as error:
        read_last_words(path)
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 2}, "'gold' 2 is not a whole number from 0 to 1"),
        ({"gold": -1}, "'gold' -1 is not"),
        ({"gold": "1"}, "'gold' '1' is not"),
        ({"gold": True}, "'gold' True is not"),
        ({"choices": ["one"]}, "list of 2 texts or more"),
        ({"choices": "this or that"}, "list of 2 texts or more"),
        ({"choices": ["a", ""]}, "a choice is '', not a text, or empty"),
        ({"choices": ["a", 7]}, "a choice is 7, not a text"),
        ({"query": ""}, "'query' is ''"),
    ],
)
def test_a_bad_question_is_named(change, message, tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTION, QUESTION, {**QUESTION, **change})
    with pytest.raises(CalibrationError) as error:
        read_questions(path)
    assert f"{path}, line 3: " in str(error.value) and message in str(error.value)


def test_a_question_without_a_key_names_it(tmp_path):
    for key in QUESTION:
        line = {k: v for k, v in QUESTION.items() if k != key}
        with pytest.raises(CalibrationError, match=f"line 1: '{key}' is missing"):
            read_questions(write(tmp_path / "q.jsonl", line))


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("missing.jsonl", "No such file"),
        ("empty.jsonl", "is empty"),
        ("binary.jsonl", "decode"),
    ):
        for read in (read_last_words, read_questions):
            with pytest.raises(CalibrationError, match=message) as error:
                read(tmp_path / name)
            assert name in str(error.value)
