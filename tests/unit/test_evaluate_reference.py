"""The cache of the reference's predictions, with a model that counts how often it is asked."""

import os

import pytest
import torch
from torch import Tensor

from lwquant.evaluation.reference import reference_predictions
from lwquant.progress import silent

TOKENS = torch.arange(24).view(2, 12)


class Counting:
    """A reference whose hidden states are different each time, so that a cache hit shows."""

    def __init__(self, name: str = "a", hidden: int = 8) -> None:
        self.name, self.hidden, self.calls = name, hidden, 0

    def fingerprint(self) -> str:
        return self.name

    def last_hidden(self, tokens: Tensor, progress=silent) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return torch.randn(*tokens.shape, self.hidden, generator=generator)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def files(folder):
    return sorted(folder.iterdir())


def test_the_second_time_the_very_same_numbers_come_from_the_disk(tmp_path):
    model = Counting()
    first = reference_predictions(model, TOKENS, cache=tmp_path / "new" / "folder")
    again = reference_predictions(model, TOKENS, cache=tmp_path / "new" / "folder")
    assert model.calls == 1
    assert torch.equal(first.hidden, again.hidden)
    assert first.hidden.shape == (2, 12, 8)


def test_another_model_and_other_tokens_are_computed_on_their_own(tmp_path):
    model, other = Counting("a"), Counting("b")
    for each, tokens in ((model, TOKENS), (other, TOKENS), (model, TOKENS + 1)):
        reference_predictions(each, tokens, cache=tmp_path)
    reference_predictions(model, TOKENS.view(4, 6), cache=tmp_path)  # the same tokens, cut apart
    assert (model.calls, other.calls) == (3, 1)
    assert len(files(tmp_path)) == 4


def cut(content: bytes) -> bytes:
    return content[:-100]


def flip_a_bit_of_a_value(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def replace(content: bytes) -> bytes:
    return b"not safetensors at all"


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip_a_bit_of_a_value, replace, empty])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    model = Counting()
    reference_predictions(model, TOKENS, cache=tmp_path)
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    second = reference_predictions(model, TOKENS, cache=tmp_path)
    third = reference_predictions(model, TOKENS, cache=tmp_path)
    assert model.calls == 2
    assert torch.equal(second.hidden, model_output(2))
    assert torch.equal(second.hidden, third.hidden)
    assert files(tmp_path) == [path]


def model_output(call: int) -> Tensor:
    return torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(call))


def test_the_cache_stays_within_its_limit_and_drops_what_was_unused_for_longest(tmp_path):
    models = [Counting(name, hidden=1000) for name in "abcd"]  # 96 kB each
    settings = {"cache": tmp_path, "limit_bytes": 300_000}
    for age, model in enumerate(models[:3]):
        reference_predictions(model, TOKENS, **settings)
        newest = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (10**9 + age, 10**9 + age))
    reference_predictions(models[0], TOKENS, **settings)  # used again, so b is now the oldest
    reference_predictions(models[3], TOKENS, **settings)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 300_000
    for model in (models[0], models[2], models[3], models[1]):
        reference_predictions(model, TOKENS, **settings)
    assert [model.calls for model in models] == [1, 2, 1, 1]


def test_predictions_larger_than_the_whole_limit_are_not_stored_and_push_nothing_out(tmp_path):
    reference_predictions(Counting("small"), TOKENS, cache=tmp_path, limit_bytes=10_000)
    before = files(tmp_path)
    large = Counting("large", hidden=1000)
    assert reference_predictions(large, TOKENS, cache=tmp_path, limit_bytes=10_000).hidden.any()
    assert files(tmp_path) == before


def test_a_cache_that_cannot_be_written_costs_the_file_only_and_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = []
    found = reference_predictions(
        Counting(), TOKENS, cache=tmp_path / "file", progress=lambda *line: said.append(line)
    )
    assert torch.equal(found.hidden, model_output(1))
    assert any("not cached" in item for _, item, _, _ in said)


def test_without_a_cache_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Counting()
    for _ in range(2):
        reference_predictions(model, TOKENS, cache=None)
    assert model.calls == 2
    assert files(tmp_path) == []
