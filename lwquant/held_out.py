"""Quality of a quantized stream against the float one, on windows that no statistic has seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lwquant.evaluation.measure import Predictions, compare
from lwquant.model.decoder import Decoder


@dataclass(frozen=True)
class Quality:
    """Means over predicted tokens; KL in nats."""

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int


def compare_streams(
    decoder: Decoder, quantized: Tensor, floating: Tensor, tokens: Tensor
) -> Quality:
    """Compare two last-block outputs (n_samples, seq_len, hidden) of the same tokens.

    The head and the final norm are not quantized, so one decoder serves both.
    """
    measured = compare(
        Predictions(quantized, decoder.head),
        tokens,
        reference=Predictions(floating, decoder.head),
    )
    assert measured.reference_perplexity is not None
    assert measured.kl_divergence is not None and measured.top1_agreement is not None
    return Quality(
        measured.perplexity,
        measured.reference_perplexity,
        measured.kl_divergence,
        measured.top1_agreement,
        measured.tokens,
    )
