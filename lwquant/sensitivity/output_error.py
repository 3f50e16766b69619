"""Output error that the chosen quantizer really makes, relative to the layer's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_stats, walk_blocks, weight_changes


def output_error(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    progress: Progress = silent,
) -> Measurement:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) per scheme, (n_linears, n_schemes); 0 for a zero output."""
    costs = []
    for visit in walk_blocks(decoder, tokens):
        progress("sensitivity", f"block {visit.index}", visit.index, decoder.n_blocks)
        stats = block_stats(decoder, visit.index, visit.block, visit.inputs)
        for spec in visit.linears:
            module = visit.block.get_submodule(decoder.local_name(spec))
            own = stats[spec.input_group]
            changes = weight_changes(module, own, schemes, quantizer)
            costs.append(relative_errors(get_weight(module), changes, own.hessian))
    return Measurement(torch.stack(costs))


def relative_errors(weight: Tensor, changes: Tensor, hessian: Tensor) -> Tensor:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of each change (n, out_features, in_features), (n,) float64."""
    energy = ((weight @ hessian) * weight).sum().double().item()
    errors = ((changes @ hessian) * changes).sum((1, 2)).double().cpu().clamp(min=0)
    return errors / energy if energy > 0 else torch.zeros_like(errors)
