"""`compare` against the definitions, spelled out in float64 without chunks."""

import math

import pytest
import torch
from torch import Tensor

from lwquant.errors import CheckpointError
from lwquant.evaluation.measure import CHUNK, Comparison, Predictions, compare

N_WINDOWS, SEQ_LEN, HIDDEN, VOCAB = 3, 2 * CHUNK + 50, 16, 37


def predictions(seed: int, n_windows: int = N_WINDOWS, vocab: int = VOCAB) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_windows, SEQ_LEN, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) * 0.5
    return Predictions(hidden, lambda part: part @ weight.T)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (N_WINDOWS, SEQ_LEN))


def oracle(
    model: Predictions, reference: Predictions, windows: Tensor, counted: Tensor | None = None
) -> Comparison:
    losses, reference_losses, divergences, agreed = [], [], [], []
    for row, (ours, theirs) in enumerate(zip(model.hidden, reference.hidden, strict=True)):
        q = torch.softmax(model.head(ours[None])[0].double(), -1)
        p = torch.softmax(reference.head(theirs[None])[0].double(), -1)
        for position in range(windows.shape[1] - 1):
            if counted is not None and not counted[row, position]:
                continue
            target = windows[row, position + 1]
            losses.append(-math.log(q[position, target]))
            reference_losses.append(-math.log(p[position, target]))
            divergences.append((p[position] * (p[position] / q[position]).log()).sum().item())
            agreed.append(float(p[position].argmax() == q[position].argmax()))
    n = len(losses)
    return Comparison(
        math.exp(sum(losses) / n),
        n,
        math.exp(sum(reference_losses) / n),
        sum(divergences) / n,
        sum(agreed) / n,
    )


def assert_equal(found: Comparison, expected: Comparison) -> None:
    assert found.tokens == expected.tokens
    assert found.top1_agreement == pytest.approx(expected.top1_agreement, abs=1e-12)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-6)
    assert found.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-5)


def test_every_number_is_what_its_definition_says(windows):
    model, reference = predictions(1), predictions(2)
    expected = oracle(model, reference, windows)
    assert expected.tokens == N_WINDOWS * (SEQ_LEN - 1)
    assert_equal(compare(model, windows, reference=reference), expected)


def test_only_counted_predictions_enter(windows):
    model, reference = predictions(1), predictions(2)
    counted = torch.rand(N_WINDOWS, SEQ_LEN - 1) < 0.3
    found = compare(model, windows, reference=reference, counted=counted)
    assert_equal(found, oracle(model, reference, windows, counted))


def test_the_divergence_of_a_model_from_itself_is_zero(windows):
    found = compare(predictions(1), windows, reference=predictions(1))
    assert (found.kl_divergence, found.top1_agreement) == (0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_the_order_of_the_windows_does_not_matter(windows):
    model, reference = predictions(1), predictions(2)
    order = torch.tensor([2, 0, 1])
    turned = [Predictions(p.hidden[order], p.head) for p in (model, reference)]
    found = compare(turned[0], windows[order], reference=turned[1])
    assert_equal(found, compare(model, windows, reference=reference))


def test_without_a_reference_the_perplexity_is_the_same_and_the_rest_is_none(windows):
    alone = compare(predictions(1), windows)
    beside = compare(predictions(1), windows, reference=predictions(2))
    assert alone == Comparison(beside.perplexity, beside.tokens)


def test_knowing_nothing_is_a_perplexity_of_the_vocabulary_size(windows):
    flat = Predictions(torch.zeros(N_WINDOWS, SEQ_LEN, 1), lambda h: h.expand(-1, -1, VOCAB))
    assert compare(flat, windows).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_logits_of_more_than_256_tokens_never_exist_at_once(windows):
    seen = []

    def counting(predicted: Predictions) -> Predictions:
        def head(hidden: Tensor) -> Tensor:
            seen.append(hidden.shape[1])
            return predicted.head(hidden)

        return Predictions(predicted.hidden, head)

    compare(counting(predictions(1)), windows, reference=counting(predictions(2)))
    assert max(seen) == 256
    assert sum(seen) == 2 * N_WINDOWS * (SEQ_LEN - 1)  # the last token predicts nothing


def test_half_precision_logits_are_normalized_in_float32(windows):
    wide = predictions(1)
    narrow = Predictions(wide.hidden, lambda hidden: wide.head(hidden).bfloat16())
    exact = oracle(narrow, narrow, windows)
    assert compare(narrow, windows).perplexity == pytest.approx(exact.perplexity, rel=1e-6)


def test_tokens_that_the_reference_excludes_add_nothing_to_the_divergence(windows):
    def without_token_0(hidden: Tensor) -> Tensor:
        logits = predictions(1).head(hidden).clone()
        logits[..., 0] = -math.inf
        return logits

    model = predictions(1)
    windows = windows.clamp(min=1)
    reference = Predictions(model.hidden, without_token_0)
    found = compare(model, windows, reference=reference)
    # Leaving one token out and scaling the rest up: KL = -log(1 - q_0) everywhere.
    q = torch.softmax(model.head(model.hidden)[:, :-1].double(), -1)
    expected = -torch.log1p(-q[..., 0]).mean().item()
    assert found.kl_divergence == pytest.approx(expected, rel=1e-4)


def test_a_model_sure_of_the_wrong_tokens_has_an_infinite_perplexity(windows):
    sure = Predictions(
        torch.ones(N_WINDOWS, SEQ_LEN, 1),
        lambda h: torch.cat([h * 1e4, h.expand(-1, -1, VOCAB - 1)], -1),
    )
    assert compare(sure, windows.clamp(min=1)).perplexity == math.inf


def test_logits_that_are_nan_are_refused_instead_of_averaged(windows):
    broken = Predictions(torch.full((N_WINDOWS, SEQ_LEN, VOCAB), math.nan), lambda hidden: hidden)
    with pytest.raises(CheckpointError, match="NaN"):
        compare(broken, windows)


def test_models_with_different_vocabularies_are_refused(windows):
    with pytest.raises(CheckpointError, match="37 different tokens, the reference 38"):
        compare(predictions(1), windows, reference=predictions(2, vocab=38))
