"""encode() at the border of two texts, and score() beside one text at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import KINDS, TINY_FOLDER, random_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwquant.errors import CalibrationError, CheckpointError
from lwquant.evaluation import continuation as module
from lwquant.evaluation.continuation import LEAST_FILL, Continuation, Score, encode, score
from lwquant.evaluation.measure import Predictions
from lwquant.evaluation.subject import PackedModel, open_subject
from lwquant.progress import silent

VOCAB = 11


class Bigram:
    """A model that looks at one token back, by a table of log-probabilities (VOCAB, VOCAB)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, windows: Tensor) -> Predictions:
        self.shapes.append(tuple(windows.shape))
        hidden = torch.nn.functional.one_hot(windows, VOCAB).float()
        return Predictions(hidden, lambda part: part @ self.table)


@pytest.fixture
def bigram() -> Bigram:
    return Bigram((2 * torch.randn(VOCAB, VOCAB)).log_softmax(-1))


def random_continuations(n_texts: int, longest: int = 40, vocab: int = VOCAB):
    for _ in range(n_texts):
        n_tokens = int(torch.randint(2, longest + 1, ()))
        start = int(torch.randint(1, n_tokens, ()))
        yield Continuation(torch.randint(vocab, (n_tokens,)), start, "")


def spelled_out(item: Continuation, logits: Tensor) -> Score:
    """From logits (n_tokens, vocab) of the text alone, token by token."""
    total, greedy = 0.0, True
    for position in range(item.start, len(item.tokens)):
        probabilities = torch.softmax(logits[position - 1].double(), -1)
        token = int(item.tokens[position])
        total += math.log(probabilities[token])
        greedy = greedy and int(probabilities.argmax()) == token
    return Score(total, greedy)


def assert_equal(found: list[Score], expected: list[Score], rel: float = 1e-5) -> None:
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert [s.log_prob for s in found] == pytest.approx([s.log_prob for s in expected], rel)


def test_a_known_model_gives_the_sum_of_its_log_probabilities():
    # After a token comes the next number with probability 0.9, else any other alike.
    table = torch.full((VOCAB, VOCAB), 0.1 / (VOCAB - 1))
    for token in range(VOCAB):
        table[token, (token + 1) % VOCAB] = 0.9
    items = [
        Continuation(torch.tensor([7, 3, 4, 5]), 2, ""),  # 3 -> 4 -> 5
        Continuation(torch.tensor([7, 3, 4, 4]), 2, ""),  # 4 -> 4 is not what it would write
        Continuation(torch.tensor([5, 9, 9, 10]), 3, ""),  # only 9 -> 10 is asked for
        Continuation(torch.tensor([10, 0]), 1, ""),
    ]
    found = score(Bigram(table.log()), items)
    low = math.log(0.1 / (VOCAB - 1))
    expected = [2 * math.log(0.9), math.log(0.9) + low, math.log(0.9), math.log(0.9)]
    assert [s.log_prob for s in found] == pytest.approx(expected, rel=1e-5)
    assert [s.greedy for s in found] == [True, False, True, True]


def test_scores_come_in_the_order_of_the_texts_whatever_their_lengths(bigram):
    items = list(random_continuations(60))
    for item in items[::2]:  # half of them as the model would write them
        for position in range(item.start, len(item.tokens)):
            item.tokens[position] = bigram.table[item.tokens[position - 1]].argmax()
    found = score(bigram, items)
    assert_equal(found, [spelled_out(item, bigram.table[item.tokens]) for item in items])
    assert sum(s.greedy for s in found) >= 30 and not all(s.greedy for s in found)
    backwards = score(bigram, items[::-1])
    assert backwards == found[::-1]


def test_batches_are_bounded_and_of_similar_lengths(bigram, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 200)
    monkeypatch.setattr(module, "CHUNK", 7)
    items = [*random_continuations(60), Continuation(torch.randint(VOCAB, (205,)), 20, "")]
    found = score(bigram, items)
    assert_equal(found, [spelled_out(item, bigram.table[item.tokens]) for item in items])
    lengths = sorted((len(item.tokens) for item in items), reverse=True)
    for n_texts, longest in bigram.shapes:
        members, lengths = lengths[:n_texts], lengths[n_texts:]
        assert members[0] == longest and members[-1] >= LEAST_FILL * longest
        assert n_texts == 1 or n_texts * longest <= 200
    assert not lengths and len(bigram.shapes) < len(items) / 2


def test_of_equally_probable_tokens_greedy_decoding_writes_the_first():
    even = Bigram(torch.full((VOCAB, VOCAB), -math.log(VOCAB)))
    items = [Continuation(torch.tensor([1, token]), 1, "") for token in (0, 1)]
    assert [s.greedy for s in score(even, items)] == [True, False]


def test_progress_ends_with_every_text_and_nothing_is_asked_for_no_texts(bigram):
    seen = []
    score(bigram, list(random_continuations(9)), name="x", progress=lambda *said: seen.append(said))
    counts = [done for _, _, done, _ in seen]
    assert counts == sorted(counts) and set(counts) == set(range(10))
    assert {(stage, total) for stage, _, _, total in seen} == {("x", 9)}
    assert score(bigram, []) == []


def test_logits_that_are_not_numbers_are_refused(bigram):
    bigram.table[3] = math.nan
    with pytest.raises(CheckpointError, match="NaN"):
        score(bigram, [Continuation(torch.tensor([3, 4]), 1, "")])


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_scores_a_padded_batch_as_each_text_alone_in_float64(kind, tmp_path):
    folder = random_model(kind, tmp_path / kind)
    items = list(random_continuations(12, longest=30, vocab=512))
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        for item in items[::2]:  # let some be what the model would write
            for position in range(item.start, len(item.tokens)):
                logits = model(input_ids=item.tokens[None, :position]).logits
                item.tokens[position] = logits[0, -1].argmax()
        expected = [
            spelled_out(item, model(input_ids=item.tokens[None]).logits[0]) for item in items
        ]
    assert {s.greedy for s in expected} == {True, False}
    for subject in (open_subject(folder, "cpu"), PackedModel(folder, {}, "cpu")):
        found = score(lambda w, subject=subject: subject.predictions(w, None, silent), items)
        assert_equal(found, expected, rel=1e-4)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the", " statement"),
        ("the stat", "ement"),  # a token spans the border
        ("the ", "statement"),  # the space belongs to the next word
        ("the", " "),
        ("a name\nAnswer:", " the value of the object"),
        ("x\n", "\ny"),
        ("naïve caf", "é"),
        ("The passkey is", " 48213"),
    ],
)
def test_predicted_are_the_joined_texts_tokens_that_reach_beyond_the_context(
    context, continuation, tiny_tokenizer
):
    found = encode(context, continuation, tiny_tokenizer)
    whole = tiny_tokenizer(
        context + continuation, add_special_tokens=False, return_offsets_mapping=True
    )
    ends = [stop for _, stop in whole["offset_mapping"]]
    assert found.tokens.tolist() == whole["input_ids"]
    assert found.start == next(i for i, stop in enumerate(ends) if stop > len(context))


def test_a_token_over_the_border_is_predicted_whole(tiny_tokenizer):
    names = tiny_tokenizer.convert_ids_to_tokens
    for context, continuation in (("the stat", "ement"), ("the ", "statement")):
        item = encode(context, continuation, tiny_tokenizer)
        assert names(item.tokens[item.start :].tolist()) == ["Ġstatement"]
        assert names(item.tokens[: item.start].tolist()) == ["the"]


def test_a_tokenizer_that_begins_texts_itself_gets_its_token_once(tiny_tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    plain = encode("the", " statement", tiny_tokenizer)
    opened = AutoTokenizer.from_pretrained(TINY_FOLDER)
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = encode("the", " statement", opened)
    assert found.tokens.tolist() == [0, *plain.tokens.tolist()]
    assert found.start == plain.start + 1
    assert encode("the stat", "ement", opened).start == 2
    assert encode("th", "e value", opened).start == 1


def test_a_border_without_a_token_on_both_sides_is_refused(tiny_tokenizer):
    with pytest.raises(CalibrationError, match="line 3: no token of 'th' lies before 'e value'"):
        encode("th", "e value", tiny_tokenizer, "line 3")
    with pytest.raises(CalibrationError, match="'' adds no token"):
        encode("the", "", tiny_tokenizer)
