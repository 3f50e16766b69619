"""Quality of a quantized stream against the float one, on windows that no statistic has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder

HEAD_TOKENS = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """Means over predicted tokens; KL in nats."""

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int


@torch.no_grad()
def compare_streams(
    decoder: Decoder, quantized: Tensor, floating: Tensor, tokens: Tensor
) -> Quality:
    """Compare two last-block outputs (n_samples, seq_len, hidden) of the same tokens.

    The head and the final norm are not quantized, so one decoder serves both.
    """
    nll = reference_nll = kl = agreed = 0.0
    for row in range(len(tokens)):
        for start in range(0, tokens.shape[1] - 1, HEAD_TOKENS):
            stop = min(start + HEAD_TOKENS, tokens.shape[1] - 1)
            p = decoder.head(floating[row : row + 1, start:stop])[0].log_softmax(-1)
            q = decoder.head(quantized[row : row + 1, start:stop])[0].log_softmax(-1)
            following = tokens[row, start + 1 : stop + 1, None].to(p.device)
            nll -= q.gather(1, following).sum().item()
            reference_nll -= p.gather(1, following).sum().item()
            kl += (p.exp() * (p - q)).sum().item()
            agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
    n = len(tokens) * (tokens.shape[1] - 1)
    return Quality(math.exp(nll / n), math.exp(reference_nll / n), kl / n, agreed / n, n)
