"""The laws of every token importance, each one's definition, and the weights made of them."""

from functools import partial

import pytest
import torch
from tiny_models import KINDS, random_model
from transformers import AutoModelForCausalLM

from lwquant.errors import UnsupportedModelError
from lwquant.importance import (
    IMPORTANCES,
    BlockView,
    TokenWeighting,
    activation_difference,
    activation_norm,
    attention_concentration,
    positions,
    token_frequency,
    token_similarity,
    token_weights,
)
from lwquant.model.attention import attention_probabilities
from lwquant.model.checkpoint import open_checkpoint
from lwquant.model.decoder import Decoder

every_importance = pytest.mark.parametrize("score", IMPORTANCES.values(), ids=IMPORTANCES)


def make_view(order=slice(None), seed=0):
    """Four windows of twelve tokens, in chunks of two for the attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, (4, 12), generator=generator)[order]
    inputs = torch.randn(4, 12, 8, generator=generator)[order]
    outputs = inputs + torch.rand(4, 12, 8, generator=generator)[order]
    seen = torch.randn(4, 3, 12, 12, generator=generator)[order]
    hidden = torch.ones(12, 12).triu(1).bool()
    probabilities = seen.masked_fill(hidden, -torch.inf).softmax(-1)
    return BlockView(tokens, inputs, lambda: outputs, lambda: iter(probabilities.split(2)))


@every_importance
def test_scores_are_finite_and_there_is_one_for_each_token(score):
    scores = score(make_view())
    assert scores.shape == (4, 12) and scores.isfinite().all()
    assert (scores.amin(1) < scores.amax(1)).all()


@every_importance
def test_scores_move_with_their_windows_and_nothing_is_changed(score):
    view = make_view()
    before = view.tokens.clone(), view.inputs.clone(), view.outputs().clone()
    scores = score(view)
    assert all(map(torch.equal, (view.tokens, view.inputs, view.outputs()), before))
    order = [2, 0, 3, 1]
    torch.testing.assert_close(score(make_view(order)), scores[order])


@every_importance
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_weights_have_mean_one_and_the_floor_is_the_least_share_of_the_largest(score, floor):
    weights = TokenWeighting(score, floor)(make_view())
    torch.testing.assert_close(weights.mean(1), torch.ones(4))
    torch.testing.assert_close(weights.amin(1) / weights.amax(1), torch.full((4,), floor))
    scores = score(make_view()).double()
    for row in range(4):
        ranked = weights[row][scores[row].argsort()]
        assert (ranked.diff() >= 0).all()


def test_weights_are_the_scores_mapped_window_by_window():
    got = token_weights(torch.tensor([[3.0, 5.0, 4.0], [1.0, 1.0, 1.0]]), 0.2)
    # 0.2, 1 and 0.6 have the mean 0.6; where nothing stands out, all count the same.
    wanted = torch.tensor([[0.2 / 0.6, 1 / 0.6, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_floor_that_is_no_share_is_refused(floor):
    with pytest.raises(ValueError, match=f"floor={floor} must be"):
        TokenWeighting(activation_norm, floor)


def test_attention_concentration_counts_how_often_a_token_is_looked_at():
    view = make_view()
    probabilities = torch.cat(list(view.attention()))
    got = attention_concentration(view)
    for sample in range(4):
        for key in range(12):
            wanted = sum(
                probabilities[sample, head, query, key].item()
                for head in range(3)
                for query in range(12)
            )
            assert got[sample, key].item() == pytest.approx(wanted, rel=1e-5)
    skipping = attention_concentration(view, skip_first=True)
    assert torch.equal(skipping[:, 1:], got[:, 1:])
    assert torch.equal(skipping[:, 0], got[:, 1:].amin(1))


def test_the_other_scores_are_what_they_say_token_by_token():
    view = make_view()
    inputs, outputs, tokens = view.inputs, view.outputs(), view.tokens
    norm, change = activation_norm(view), activation_difference(view)
    rare, unlike = token_frequency(view), token_similarity(view)
    every = tokens.flatten().tolist()
    for sample in range(4):
        for place in range(12):
            own = inputs[sample, place]
            away = [(own - inputs[sample, k]).square().sum().item() for k in range(12)]
            wanted = {
                norm: sum(x * x for x in own.tolist()) ** 0.5,
                change: -(outputs[sample, place] - own).square().sum().sqrt().item(),
                rare: -every.count(tokens[sample, place].item()),
                unlike: sum(away) / 11,
            }
            for scores, value in wanted.items():
                assert scores[sample, place].item() == pytest.approx(value, rel=1e-5)


def test_positions_choose_the_ends_of_every_window():
    view = make_view()
    quarter = positions(view, first=0.25)
    assert quarter[0].tolist() == [1, 1, 1] + [0] * 9 and torch.equal(quarter[0], quarter[3])
    both = positions(view, first=1 / 12, last=1 / 6)
    assert both[1].tolist() == [1] + [0] * 9 + [1, 1]
    with pytest.raises(ValueError, match=r"last=1\.5"):
        positions(view, last=1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_are_those_of_the_whole_model(kind, tmp_path):
    folder = random_model(kind, tmp_path)
    decoder = Decoder.open(open_checkpoint(folder))
    usual = decoder.model.config._attn_implementation
    tokens = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = model(tokens, output_attentions=True).attentions
    hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
    for index in range(decoder.n_blocks):
        with decoder.loaded(index) as block:
            after = decoder.run(index, block, hidden)  # its masks are not those of eager attention
            got = attention_probabilities(decoder, index, block, hidden)
            assert got.shape == (2, 4, 20, 20)
            torch.testing.assert_close(got, wanted[index], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(decoder.run(index, block, hidden), after)
            hidden = after
    assert decoder.model.config._attn_implementation == usual != "eager"


def test_a_block_without_attention_is_refused(tiny_folder, monkeypatch):
    decoder = Decoder.open(open_checkpoint(tiny_folder))
    hidden = decoder.embed(torch.zeros(1, 6, dtype=torch.long))
    with decoder.loaded(0) as block:
        hide = partial(_without_probabilities, block.self_attn.forward)
        monkeypatch.setattr(block.self_attn, "forward", hide)
        with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer gives no attention"):
            attention_probabilities(decoder, 0, block, hidden)
        monkeypatch.undo()
    assert decoder.model.config._attn_implementation != "eager"


def _without_probabilities(forward, *args, **kwargs):
    return forward(*args, **kwargs)[0], None
