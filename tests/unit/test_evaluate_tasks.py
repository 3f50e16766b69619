"""evaluate_tasks() on the tiny trained model, beside transformers one text at a time."""

from __future__ import annotations

import importlib
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY_FOLDER
from torch import Tensor
from transformers import AutoModelForCausalLM

from lwquant.errors import CalibrationError, CheckpointError
from lwquant.evaluation.evaluate_tasks import TaskEvaluation, evaluate_tasks
from lwquant.evaluation.measure import Predictions
from lwquant.evaluation.tasks import Answers, TaskScore
from lwquant.export.save import ModelWriter
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.decoder import Decoder
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import plan_bpw

LENGTHS = (110, 130)
N_EXAMPLES = 20
# The package's attribute of this name is the function.
module = importlib.import_module("lwquant.evaluation.evaluate_tasks")


@pytest.fixture(scope="module")
def files(tmp_path_factory, heldout_text) -> dict[str, Path]:
    """Next words of the held-out text; for choices, two of them among words of elsewhere.

    Every other word is "the", so that a model of this size can be right.
    """
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    words = heldout_text.split()
    articles = [i for i in range(20, 3000) if words[i] == "the"]
    places = [*generator.sample(articles, N_EXAMPLES // 2), *range(40, 40 + 5 * N_EXAMPLES, 10)]
    last, questions = [], []
    for place in places:
        context = " ".join(words[place - 15 : place])
        last.append({"context": context, "continuation": words[place]})
        choices = [" ".join(words[i : i + 2]) for i in generator.sample(range(3000), 3)]
        gold = generator.randrange(4)
        choices.insert(gold, " ".join(words[place : place + 2]))
        questions.append({"query": context, "choices": choices, "gold": gold})
    for name, lines in (("lambada", last), ("arc", questions)):
        (folder / name).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {"lambada": folder / "lambada", "arc": folder / "arc"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The tiny model in 3 bits, rounded to nearest."""
    folder = tmp_path_factory.mktemp("packed")
    source = Checkpoint.open(TINY_FOLDER)
    decoder = Decoder.open(source)
    writer = ModelWriter(folder, source, decoder.linears, decoder.model, decoder.key_of)
    scheme = QuantScheme(3, 64)
    for spec in decoder.linears:
        writer.linear(spec, rtn(source.read(decoder.key_of(f"{spec.name}.weight")), None, scheme))
    schemes = {spec.name: scheme for spec in decoder.linears}
    writer.finish(schemes, plan_bpw(schemes, decoder.linears), TINY_FOLDER)
    return folder


@torch.no_grad()
def spelled_out(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability from the text's full logits, and whether greedy decoding writes it."""
    whole = tokenizer(context + continuation, add_special_tokens=False, return_offsets_mapping=True)
    tokens = torch.tensor(whole["input_ids"])
    start = next(i for i, (_, stop) in enumerate(whole["offset_mapping"]) if stop > len(context))
    log_probs = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
    total = sum(log_probs[i - 1, tokens[i]].item() for i in range(start, len(tokens)))
    written = tokens[:start]
    while len(written) < len(tokens) and torch.equal(written, tokens[: len(written)]):
        written = torch.cat([written, model(input_ids=written[None]).logits[0, -1:].argmax(-1)])
    return total, torch.equal(written, tokens)


@pytest.mark.parametrize("name", ["float", "packed"])
def test_each_accuracy_is_what_transformers_gives_one_text_at_a_time(
    name, packed, files, tiny_tokenizer, integer_kernels
):
    folder = TINY_FOLDER if name == "float" else packed
    found = evaluate_tasks(folder, **files, passkey=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if name == "float":
        model = model.double()

    lines = [json.loads(line) for line in files["lambada"].read_text().splitlines()]
    expected = [
        spelled_out(model, tiny_tokenizer, x["context"], " " + x["continuation"]) for x in lines
    ]
    assert found.answers["lambada"].right == tuple(right for _, right in expected)
    assert found.answers["lambada"].log_probs == pytest.approx(
        [log_prob for log_prob, _ in expected], rel=1e-4
    )
    assert 0 < found.tasks["lambada"].correct < found.tasks["lambada"].examples == N_EXAMPLES

    raw, normalized = [], []
    for line in map(json.loads, files["arc"].read_text().splitlines()):
        values = [
            spelled_out(model, tiny_tokenizer, line["query"] + "\nAnswer:", " " + choice)[0]
            for choice in line["choices"]
        ]
        raw.append(max(range(4), key=lambda i: values[i]) == line["gold"])
        per = [value / len(choice) for value, choice in zip(values, line["choices"], strict=True)]
        normalized.append(max(range(4), key=lambda i: per[i]) == line["gold"])
    assert found.answers["arc"].right == tuple(raw) != tuple(normalized)
    assert found.answers["arc-normalized"].right == tuple(normalized)
    assert found.tasks["arc"].correct > N_EXAMPLES / 4 + 2  # beyond chance


def test_a_reference_answers_the_same_examples(packed, files):
    settings = {**files, "passkey_lengths": LENGTHS[:1], "limit": 8}
    mine = evaluate_tasks(packed, **settings)
    theirs = evaluate_tasks(TINY_FOLDER, **settings)
    both = evaluate_tasks(packed, **settings, reference=TINY_FOLDER)
    assert list(both.tasks) == ["lambada", "arc", "arc-normalized", "passkey-110", "passkey"]
    for name, task in both.tasks.items():
        assert task.accuracy == mine.tasks[name].accuracy
        assert task.reference_accuracy == theirs.tasks[name].accuracy
        assert task.difference == pytest.approx(task.accuracy - task.reference_accuracy)
        flips = sum(
            a != b
            for a, b in zip(mine.answers[name].right, theirs.answers[name].right, strict=True)
        )
        assert task.changed == flips / task.examples
    assert any(task.changed for task in both.tasks.values())
    assert both.bpw == mine.bpw < 4 and both.size_bytes == mine.size_bytes < theirs.size_bytes


def test_the_limit_takes_the_first_examples_of_each_file(files):
    few = evaluate_tasks(TINY_FOLDER, **files, passkey=False, limit=3)
    more = evaluate_tasks(TINY_FOLDER, **files, passkey=False, limit=9)
    assert {task.examples for task in few.tasks.values()} == {3}
    for name, answers in few.answers.items():
        assert answers.right == more.answers[name].right[:3]
        assert answers.log_probs == pytest.approx(more.answers[name].log_probs[:3], rel=1e-5)


class Copying:
    """Writes what followed the last two tokens earlier in the text, else token 0."""

    bpw, size_bytes = 3.0, 1
    config = SimpleNamespace(vocab_size=512, max_position_embeddings=256)

    def __init__(self, tokenizer, blind: bool = False) -> None:
        self.tokenizer, self.blind = tokenizer, blind

    def predictions(self, windows: Tensor, cache, progress) -> Predictions:
        hidden = torch.zeros(*windows.shape, 512)
        for row, window in enumerate(windows.tolist()):
            seen: dict[tuple[int, int], int] = {}
            for position in range(1, len(window)):
                pair = (window[position - 1], window[position])
                hidden[row, position, 0 if self.blind else seen.get(pair, 0)] = 20
                if position + 1 < len(window):
                    seen[pair] = window[position + 1]
        return Predictions(hidden, lambda part: part)


def test_a_model_that_copies_finds_every_passkey_and_a_blind_one_none(tiny_tokenizer, monkeypatch):
    found = {}
    for blind in (False, True):
        monkeypatch.setattr(
            module, "open_subject", lambda *_, blind=blind: Copying(tiny_tokenizer, blind)
        )
        found[blind] = evaluate_tasks(TINY_FOLDER, passkey_lengths=LENGTHS).tasks
    # Of the key's pairs of digits one can stand elsewhere in it, so a copy may go astray.
    assert found[False]["passkey"].accuracy > 0.9
    assert found[True]["passkey"].correct == 0 and found[True]["passkey"].examples == 40
    parts = [found[False][f"passkey-{length}"].correct for length in LENGTHS]
    assert sum(parts) == found[False]["passkey"].correct


def test_bad_files_and_settings_are_refused_before_a_model_is_opened(files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_subject", None)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "q", "choices": ["a", "b"], "gold": 2}\n')
    for settings, message in (
        ({"arc": bad}, f"{bad}, line 1: 'gold' 2"),
        ({"lambada": bad}, f"{bad}, line 1: 'context' is missing"),
        ({"lambada": tmp_path / "gone.jsonl"}, "gone.jsonl: "),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"passkey": False}, "no task was given"),
        ({"passkey_lengths": ()}, "no task was given"),
    ):
        with pytest.raises(CalibrationError) as error:
            evaluate_tasks("./no-such-model", **settings)
        assert message in str(error.value)
    with pytest.raises(CheckpointError, match="no-such-reference"):
        evaluate_tasks(TINY_FOLDER, **files, reference="./no-such-reference")


def test_texts_longer_than_the_models_positions_are_refused(tmp_path, heldout_text):
    with pytest.raises(CalibrationError, match="passkey length 257 exceeds the 256 positions"):
        evaluate_tasks(TINY_FOLDER, passkey_lengths=(257,))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": heldout_text[:2000], "continuation": "x"}))
    with pytest.raises(CalibrationError, match=r"long.jsonl, line 1: length \d+ exceeds the 256"):
        evaluate_tasks(TINY_FOLDER, lambada=path, passkey=False)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, files):
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER)
    model.resize_token_embeddings(400)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"gives token \d+, the model knows 400"):
        evaluate_tasks(folder, **files, passkey=False)


def test_the_json_has_every_number_and_null_for_what_no_number_can_say():
    task = TaskScore(2, 1, 0.5, 0.35, -math.inf)
    found = TaskEvaluation({"arc": task}, 3.5, 99, {"arc": Answers((True, False), (-1.0,) * 2)})
    assert json.loads(found.to_json()) == {
        "tasks": {
            "arc": {
                "examples": 2,
                "correct": 1,
                "accuracy": 0.5,
                "standard_error": 0.35,
                "log_prob": None,
                "reference_accuracy": None,
                "difference": None,
                "difference_error": None,
                "changed": None,
            }
        },
        "bpw": 3.5,
        "size_bytes": 99,
    }
