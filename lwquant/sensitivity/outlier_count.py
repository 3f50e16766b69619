"""ZD: a block with fewer weights far above their mean is more important; needs no data.

Dumitru et al., "Layer-Wise Quantization", arXiv:2406.17415: ZD = share of a block's weights with
z-score above 1; smaller is more important. One- or two-sided, pooled or per matrix are options,
because the text leaves them open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.block_score import spread
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import BlockVisit


def outlier_count(
    decoder: Decoder,
    tokens: Tensor | None,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer | None = None,
    *,
    two_sided: bool = False,
    pooled: bool = True,
    progress: Progress = silent,
) -> Measurement:
    """Scores −ZD per block, and costs with importance 1 − ZD.

    Args:
        tokens: not looked at.
        two_sided: count |z| > 1 instead of z > 1.
        pooled: one mean and deviation over all weights of the block, instead of averaging the
            shares of its matrices.
    """
    scores, costs = [], []
    empty = torch.empty(0)
    for index in range(decoder.n_blocks):
        progress("sensitivity", f"block {index}", index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            visit = BlockVisit(index, block, decoder.block_linears(index), empty, empty)
            weights = [
                get_weight(block.get_submodule(decoder.local_name(spec))).flatten()
                for spec in visit.linears
            ]
            parts = [torch.cat(weights)] if pooled else weights
            share = sum(share_beyond_one(part, two_sided) for part in parts) / len(parts)
            scores.append(-share)
            costs.append(spread(decoder, visit, 1 - share, schemes))
    return Measurement(torch.cat(costs), tuple(scores))


def share_beyond_one(weights: Tensor, two_sided: bool = False) -> float:
    """Share of (n,) weights whose z-score is above 1; 0 where all are equal."""
    centred = weights.double() - weights.double().mean()
    deviation = centred.square().mean().sqrt()
    if deviation == 0:
        return 0.0
    z = centred.abs() if two_sided else centred
    return (z > deviation).double().mean().item()
