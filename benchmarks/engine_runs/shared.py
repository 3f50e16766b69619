"""What the scripts of all engines do with their model: compare it with lwquant's own run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def compare(logits_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Print KL and perplexity as JSON.

    logits_of: tokens (1, seq_len) int64 → (seq_len, vocabulary). The script's second argument is
    the file of windows and of lwquant's log-probabilities there.
    """
    given = np.load(sys.argv[2])
    divergences, losses = [], []
    for ids, own in zip(given["windows"], given["log_probabilities"], strict=True):
        other = log_softmax(logits_of(ids[None]))
        own = own.astype(np.float64)
        divergences.append((np.exp(own) * (own - other)).sum(-1).mean())
        losses.append(-other[np.arange(len(ids) - 1), ids[1:]].mean())
    print(json.dumps({"kl": np.mean(divergences), "perplexity": np.exp(np.mean(losses))}))


def compare_torch(model: Any) -> None:
    """compare() of a causal model of transformers."""
    import torch  # which not every engine has

    def logits_of(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits[0].float().numpy()

    compare(logits_of)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
