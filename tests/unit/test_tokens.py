"""Calibration windows: the same for the same seed, and refused in words."""

from dataclasses import replace

import pytest
import torch
from tiny_models import adding_bos

from lwquant.capture.generate import sample_windows
from lwquant.capture.text import read_source
from lwquant.capture.tokens import (
    calibration_set,
    cut_windows,
    opening,
    shifted_around,
    token_hash,
    tokenize,
)
from lwquant.errors import CalibrationError
from lwquant.prepare import open_model, prepare_tokens
from lwquant.recipe import Recipe


def test_windows_are_whole_disjoint_pieces_of_the_text_fixed_by_the_seed():
    tokens = torch.arange(1000)
    windows = cut_windows(tokens, 5, 64, seed=3, source="text")
    assert windows.shape == (5, 64)
    assert all((row == row[0] + torch.arange(64)).all() and row[0] % 64 == 0 for row in windows)
    assert len({int(row[0]) for row in windows}) == 5
    assert torch.equal(windows, cut_windows(tokens, 5, 64, seed=3, source="text"))
    assert not torch.equal(windows, cut_windows(tokens, 5, 64, seed=4, source="text"))


def test_windows_shifted_around_put_each_token_at_every_eighth_of_a_window():
    windows = torch.arange(48).view(2, 24)
    wide = shifted_around(windows, 8)
    assert wide.shape == (16, 24) and torch.equal(wide[:2], windows)
    for k in range(8):
        for sample in range(2):
            row = wide[2 * k + sample].tolist()
            start = row.index(24 * sample)  # of the window, after k times 24/8 places
            assert start == 3 * k
            assert row[start:] + row[:start] == windows[sample].tolist()
    assert torch.equal(shifted_around(windows, 1), windows)
    assert shifted_around(torch.arange(11).view(1, 11), 4)[:, 0].tolist() == [0, 9, 6, 3]


def test_a_text_shorter_than_its_windows_is_refused_with_both_lengths():
    with pytest.raises(CalibrationError, match=r"notes.txt: 100 tokens give 1 windows of 64, 2"):
        cut_windows(torch.arange(100), 2, 64, seed=0, source="notes.txt")


def test_empty_and_missing_texts_are_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="empty.txt is empty"):
        read_source(str(tmp_path / "empty.txt"))
    with pytest.raises(CalibrationError, match=r"gone.txt"):
        read_source(str(tmp_path / "gone.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="binary.txt"):
        read_source(str(tmp_path / "binary.txt"))
    with pytest.raises(CalibrationError, match="is empty"):
        calibration_set([("mine", "")], tiny_tokenizer, n_samples=1, seq_len=8, seed=0)
    with pytest.raises(CalibrationError, match="no calibration text"):
        calibration_set([], tiny_tokenizer, n_samples=1, seq_len=8, seed=0)


def test_sources_share_the_windows_equally(tiny_tokenizer, heldout_text):
    texts = [("first", heldout_text[:9000]), ("second", heldout_text[9000:20000])]
    made = calibration_set(texts, tiny_tokenizer, n_samples=7, seq_len=32, seed=0)
    assert made.tokens.shape == (7, 32) and made.source == "first + second"
    first = tokenize(texts[0][1], tiny_tokenizer)
    pieces = {tuple(row.tolist()) for row in first[: len(first) // 32 * 32].view(-1, 32)}
    assert sum(tuple(row.tolist()) in pieces for row in made.tokens) == 4


def test_the_hash_tells_content_and_shape_apart():
    tokens = torch.arange(12)
    assert token_hash(tokens.view(3, 4)) == token_hash(tokens.view(3, 4).clone())
    assert token_hash(tokens.view(3, 4)) != token_hash(tokens.view(4, 3))
    assert token_hash(tokens.view(3, 4)) != token_hash(tokens.view(3, 4) + 1)


def test_the_interpreters_english_is_there_offline():
    assert len(read_source("builtin")) > 300_000


def test_text_sampled_from_the_model_is_likely_under_it_and_fixed_by_the_seed(tiny_folder):
    nothing = torch.zeros(0, dtype=torch.long)
    windows = sample_windows(tiny_folder, 3, 24, 1, nothing)
    assert windows.shape == (3, 24)
    assert torch.equal(windows, sample_windows(tiny_folder, 3, 24, 1, nothing))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        sampled = model(windows, labels=windows).loss
        noise = torch.randint(512, windows.shape)
        assert sampled < model(noise, labels=noise).loss - 1


def test_sampled_text_goes_on_from_what_every_text_begins_with(tiny_folder):
    from transformers import AutoModelForCausalLM

    before = torch.tensor([7, 30])
    windows = sample_windows(tiny_folder, 200, 2, 1, before)
    assert windows.shape == (200, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = model(before[None]).logits[0, -1].softmax(-1)
    likely = expected.topk(20).indices
    share = torch.isin(windows[:, 0], likely).double().mean()
    assert abs(share - expected[likely].sum()) < 0.15  # four deviations of 200 draws


def test_the_opening_is_what_the_tokenizer_itself_puts_before_a_text(tiny_tokenizer):
    assert opening(tiny_tokenizer).tolist() == []  # it has the token, and adds none
    assert opening(adding_bos(tiny_tokenizer)).tolist() == [tiny_tokenizer.bos_token_id]


def test_all_windows_of_a_run_begin_with_the_opening_and_hold_text_behind_it(
    tiny_folder, tiny_tokenizer, heldout_text
):
    opened = open_model(tiny_folder)
    recipe = Recipe(n_samples=4, seq_len=32, held_out=2, tune=1, expand=2)
    plain = prepare_tokens(opened, recipe.changed(seq_len=31), [heldout_text])
    bos = replace(opened, tokenizer=adding_bos(tiny_tokenizer))
    found = prepare_tokens(bos, recipe, [heldout_text])
    for before, after in (
        (plain.calibration.tokens, found.calibration.tokens),
        (plain.held_out, found.held_out),
        (plain.tuning, found.tuning),
    ):
        assert (after[:, 0] == tiny_tokenizer.bos_token_id).all()
        assert torch.equal(after[:, 1:], before)
    assert found.calibration.tokens.shape == (8, 32)
    assert found.calibration.sha256 == token_hash(found.calibration.tokens)


def test_windows_the_model_writes_are_mixed_with_those_of_a_text(tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    opened = open_model(tiny_folder)
    recipe = Recipe(
        sources=("self", str(tmp_path / "text.txt")), n_samples=5, held_out=2, seq_len=16
    )
    mixed = prepare_tokens(opened, recipe)
    assert mixed.calibration.source == f"self + {tmp_path / 'text.txt'}"
    windows = {tuple(w.tolist()) for w in (*mixed.calibration.tokens, *mixed.held_out)}
    nothing = torch.empty(0, dtype=torch.long)
    written = sample_windows(tiny_folder, 4, 16, 0, nothing)
    text = tokenize((tmp_path / "text.txt").read_text(), opened.tokenizer)
    cut = cut_windows(text, 3, 16, 0, "text")
    assert windows == {tuple(w.tolist()) for w in (*written, *cut)}


def test_a_short_text_is_refused_before_the_model_writes(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("a")
    monkeypatch.setattr("lwquant.prepare.sample_windows", lambda *_: pytest.fail("it wrote"))
    recipe = Recipe(sources=("self", str(tmp_path / "short.txt")), n_samples=4, seq_len=16)
    with pytest.raises(CalibrationError, match=r"short.txt: 1 tokens give 0 windows of 16"):
        prepare_tokens(open_model(tiny_folder), recipe)


def test_a_model_too_large_to_write_its_own_text_is_refused_by_its_size(tiny_folder, monkeypatch):
    monkeypatch.setattr("lwquant.prepare.free_memory", lambda: 10**6)
    opened = open_model(tiny_folder)
    with pytest.raises(
        CalibrationError, match=r"needs the float model in memory, 0.\d GB, and 0.0"
    ):
        prepare_tokens(opened, Recipe(n_samples=4, seq_len=16))


def test_a_model_that_hands_no_cache_on_writes_the_same(tiny_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    nothing = torch.zeros(0, dtype=torch.long)
    expected = sample_windows(tiny_folder, 3, 24, 1, nothing)
    whole, read = LlamaForCausalLM.forward, []

    def forward(self, input_ids, **_):
        read.append(input_ids.shape[1])
        return whole(self, input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert torch.equal(sample_windows(tiny_folder, 3, 24, 1, nothing), expected)
    assert read == list(range(1, 24))
