"""Trace-weighted rounding error: mean curvature of the layer's output error times ‖Q(W) − W‖².

Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks",
arXiv:1911.03852, with the Hessian of the layer's own squared output error, Σ x xᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer, rtn
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_stats, walk_blocks, weight_changes


def hessian(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer | None = None,
    *,
    progress: Progress = silent,
) -> Measurement:
    """tr(H)/n · ‖Q(W) − W‖² per token with plain rounding, (n_linears, n_schemes).

    Outliers of a scheme are not looked for.
    """
    costs, plain = [], [scheme.without_outliers for scheme in schemes]
    for visit in walk_blocks(decoder, tokens):
        progress("sensitivity", f"block {visit.index}", visit.index, decoder.n_blocks)
        stats = block_stats(decoder, visit.index, visit.block, visit.inputs)
        for spec in visit.linears:
            module = visit.block.get_submodule(decoder.local_name(spec))
            own = stats[spec.input_group]
            changes = weight_changes(module, own, plain, rtn)
            curvature = own.hessian.diagonal().double().mean().item() / own.n_tokens
            costs.append(curvature * changes.square().sum((1, 2)).double().cpu())
    return Measurement(torch.stack(costs))
