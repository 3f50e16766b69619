"""LIM: a block that turns its input further is more important.

Dumitru et al., "Layer-Wise Quantization", arXiv:2406.17415: LIM = −cos(block input, block output).
Larger is more important. The text leaves open how tokens are averaged; both readings are options.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.block_score import spread
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import walk_blocks


def embedding_delta(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer | None = None,
    *,
    flatten: bool = False,
    skip_first: bool = False,
    progress: Progress = silent,
) -> Measurement:
    """Scores per block, and costs with importance (1 + LIM) / 2, which is 0 for an unmoved input.

    Args:
        flatten: one cosine per sample over all its tokens at once, instead of one per token.
        skip_first: leave out each sample's first token, whose huge norm dominates a flat cosine.
    """
    scores, costs = [], []
    for visit in walk_blocks(decoder, tokens):
        progress("sensitivity", f"block {visit.index}", visit.index, decoder.n_blocks)
        lim = layer_input_modification(
            visit.inputs, visit.outputs, flatten=flatten, skip_first=skip_first
        )
        scores.append(lim)
        costs.append(spread(decoder, visit, (1 + lim) / 2, schemes))
    return Measurement(torch.cat(costs), tuple(scores))


def layer_input_modification(
    inputs: Tensor, outputs: Tensor, *, flatten: bool = False, skip_first: bool = False
) -> float:
    """−cos(input, output) of (n_samples, seq_len, hidden), averaged over tokens or samples."""
    first = 1 if skip_first else 0
    before, after = inputs[:, first:].double(), outputs[:, first:].double()
    if flatten:
        before, after = before.flatten(1), after.flatten(1)
    return -torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
