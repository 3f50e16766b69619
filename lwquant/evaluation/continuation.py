"""How probable a model finds a given continuation of a text, and whether it would write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lwquant.capture.tokens import opening, tokenize
from lwquant.errors import CalibrationError
from lwquant.evaluation.measure import CHUNK, Predictions, next_log_probs
from lwquant.progress import Progress, silent

BATCH_TOKENS = 2**14  # tokens whose hidden states exist at once: 38 MB for SmolLM2-135M
LEAST_FILL = 0.8  # shortest text of a batch, as a share of the longest: the rest is padding

# Predictions on windows (n, seq_len), each by itself.
Predict = Callable[[Tensor], Predictions]


@dataclass(frozen=True, eq=False)
class Continuation:
    """A tokenized text whose end is to be predicted."""

    tokens: Tensor  # (n,) int64
    start: int  # the first token to predict, at least 1
    where: str  # of its example, for errors


@dataclass(frozen=True)
class Score:
    """What a model says about one continuation."""

    log_prob: float  # of the whole continuation, nats
    greedy: bool  # each of its tokens is the most probable one, so greedy decoding writes it


def encode(context: str, continuation: str, tokenizer: Any, where: str = "") -> Continuation:
    """Tokens of both texts together, and where those of the continuation begin.

    A token can span the border ("the stat" + "ement" has the token " statement"). The tokens that
    the joined text shares with the context alone are given; from the first other one on they are
    predicted. Before them come the tokens that the tokenizer itself puts before a text, if any.

    Raises CalibrationError where nothing is left to predict, or to predict it from.
    """
    alone, joined = tokenize(context, tokenizer), tokenize(context + continuation, tokenizer)
    shared = min(len(alone), len(joined))
    differs = (alone[:shared] != joined[:shared]).nonzero()
    start = int(differs[0]) if len(differs) else shared
    if start == len(joined):
        raise CalibrationError(f"{where}: {continuation!r} adds no token to its context")
    before = opening(tokenizer)
    if start + len(before) == 0:
        raise CalibrationError(f"{where}: no token of {context!r} lies before {continuation!r}")
    return Continuation(torch.cat([before, joined]), start + len(before), where)


def score(
    predict: Predict,
    continuations: Sequence[Continuation],
    *,
    name: str = "tasks",
    progress: Progress = silent,
) -> list[Score]:
    """The scores of `continuations`, in their order.

    Texts of similar length are predicted together, padded behind their end: a causal model does
    not look there. Log-probabilities are float32, sums float64. Raises CheckpointError where
    logits are NaN.
    """
    scores: dict[int, Score] = {}
    for batch in _batches([len(item.tokens) for item in continuations]):
        chosen = [continuations[index] for index in batch]
        progress(name, "texts", len(scores), len(continuations))
        predictions = predict(_padded([item.tokens for item in chosen]))
        hidden: list[Tensor] = []
        for item, row in zip(chosen, predictions.hidden, strict=True):
            hidden.append(row[item.start - 1 : len(item.tokens) - 1])
            progress(name, "texts", len(scores) + len(hidden), len(continuations))
        targets = [item.tokens[item.start :] for item in chosen]
        log_probs, best = _judge(predictions, torch.cat(hidden), torch.cat(targets))
        sizes = [len(part) for part in targets]
        parts = zip(batch, log_probs.split(sizes), best.split(sizes), strict=True)
        for index, mine, hits in parts:
            scores[index] = Score(mine.sum().item(), bool(hits.all()))
    return [scores[index] for index in range(len(continuations))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts to predict together, the longest texts first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch:
            longest = lengths[batch[0]]
            full = (len(batch) + 1) * longest > BATCH_TOKENS
            if full or lengths[index] < LEAST_FILL * longest:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (n, longest), each filled up with its own last token: no special one, no warning."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


@torch.no_grad()
def _judge(predictions: Predictions, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of hidden states (m, hidden) and the tokens (m,) that follow: their log-probability (m,)
    float64, and whether each is the most probable one (m,); of equals it is the first."""
    log_probs, best = [], []
    for part, expected in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        found = next_log_probs(predictions.head, part)
        expected = expected.to(found.device)
        log_probs.append(found.gather(-1, expected[:, None])[:, 0].double())
        best.append(found.argmax(-1) == expected)
    return torch.cat(log_probs), torch.cat(best)
