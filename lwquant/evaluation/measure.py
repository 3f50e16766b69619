"""Perplexity, divergence and agreement of next-token predictions, a few tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lwquant.errors import CheckpointError
from lwquant.progress import Progress, silent

CHUNK = 256  # tokens whose logits exist at once: 150 MB in float32 for a vocabulary of 150,000

# Logits (1, m, vocab) of hidden states (1, m, hidden); every token by itself.
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """What a model predicts, in a form small enough to keep: `hidden` numbers per token."""

    hidden: Iterable[Tensor]  # per window (seq_len, hidden)
    head: Head


@dataclass(frozen=True)
class Comparison:
    """Means over the predicted tokens; None where there was no reference."""

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl_divergence: float | None = None  # KL(reference || model), nats per token
    top1_agreement: float | None = None  # share of tokens, 0 to 1


@torch.no_grad()
def compare(
    model: Predictions,
    windows: Tensor,
    *,
    reference: Predictions | None = None,
    counted: Tensor | None = None,
    progress: Progress = silent,
) -> Comparison:
    """How well the model predicts each token of the windows from those before it.

    Args:
        windows: tokens (n, seq_len); each gives seq_len - 1 predictions.
        reference: predictions on the same windows, to compare with.
        counted: (n, seq_len - 1) bool, which predictions count; all by default.

    Log-probabilities are float32, sums float64. Raises CheckpointError where the logits of model
    and reference differ in width, and where they are NaN.
    """
    sums = _Sums()
    n_windows, n_predicted = len(windows), windows.shape[1] - 1
    others: Iterable[Tensor | None] = [None] * n_windows if reference is None else reference.hidden
    for row, (hidden, other) in enumerate(zip(model.hidden, others, strict=True)):
        progress("evaluate", f"window {row + 1}", row, n_windows)
        for part in _chunks(n_predicted):
            keep = slice(None) if counted is None else counted[row, part]
            targets = windows[row, 1:][part][keep]
            log_probs = next_log_probs(model.head, hidden[part])[keep]
            sums.add_model(log_probs, targets)
            if reference is not None and other is not None:
                sums.add_reference(
                    log_probs, next_log_probs(reference.head, other[part])[keep], targets
                )
    progress("evaluate", "done", n_windows, n_windows)
    return sums.means(with_reference=reference is not None)


class _Sums:
    """Running totals over the predicted tokens."""

    def __init__(self) -> None:
        self.tokens = self.agreed = 0
        self.loss = self.reference_loss = self.divergence = 0.0

    def add_model(self, log_probs: Tensor, targets: Tensor) -> None:
        self.tokens += targets.numel()
        self.loss += _loss(log_probs, targets)

    def add_reference(self, log_probs: Tensor, expected: Tensor, targets: Tensor) -> None:
        """Both (m, vocab)."""
        if log_probs.shape != expected.shape:
            raise CheckpointError(
                f"the model predicts {log_probs.shape[-1]} different tokens, "
                f"the reference {expected.shape[-1]}"
            )
        expected = expected.to(log_probs.device)
        self.reference_loss += _loss(expected, targets)
        self.agreed += int((log_probs.argmax(-1) == expected.argmax(-1)).sum())
        # A token that the reference excludes (log-probability -inf) adds 0, not NaN.
        terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - log_probs))
        self.divergence += terms.sum(-1).double().sum().item()

    def means(self, with_reference: bool) -> Comparison:
        perplexity = _exp(self.loss / self.tokens)
        if not with_reference:
            return Comparison(perplexity, self.tokens)
        return Comparison(
            perplexity,
            self.tokens,
            _exp(self.reference_loss / self.tokens),
            self.divergence / self.tokens,
            self.agreed / self.tokens,
        )


def _chunks(n_tokens: int) -> Iterator[slice]:
    for start in range(0, n_tokens, CHUNK):
        yield slice(start, min(start + CHUNK, n_tokens))


def next_log_probs(head: Head, hidden: Tensor) -> Tensor:
    """(m, vocab) for hidden states (m, hidden)."""
    log_probs = head(hidden[None])[0].float().log_softmax(-1)
    if log_probs.isnan().any():
        raise CheckpointError("the model's logits are NaN or infinite")
    return log_probs


def _loss(log_probs: Tensor, targets: Tensor) -> float:
    chosen = log_probs.gather(-1, targets.to(log_probs.device)[:, None])
    return -chosen.double().sum().item()


def _exp(loss: float) -> float:
    """A model can be so broken that its perplexity exceeds every float."""
    return math.exp(loss) if loss < 700 else math.inf
