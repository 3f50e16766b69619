"""Relevance of each linear for the predicted tokens, times the relative error of its output.

After Ranjan and Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise
Relevance Propagation", arXiv:2401.11243, who rank layers by relevance; importance alone does not
say what a width costs, so it is multiplied by the error that the quantizer really makes. Relevance
is gradient × activation under the rules of AttnLRP (relevance_rules.py), started at the logit of
the most likely token of every position, all positions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.backward import backward_block
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.output_error import relative_errors
from lwquant.sensitivity.relevance_rules import RelevanceRules
from lwquant.sensitivity.walk import block_inputs, block_stats, weight_changes


def relevance(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    progress: Progress = silent,
) -> Measurement:
    """Share of all absolute relevance × tr(ΔW H ΔWᵀ)/tr(W H Wᵀ), (n_linears, n_schemes).

    Holds the inputs of all blocks for tokens (n_samples, seq_len).
    """
    inputs, last = block_inputs(decoder, tokens)
    gradient = _top_logit_gradient(decoder, last)
    final = decoder.n_blocks - 1
    shares: list[Tensor] = []
    errors: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        progress("sensitivity", f"block {index}", final - index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            stats = block_stats(decoder, index, block, inputs[index])
            weights = {
                spec: get_weight(block.get_submodule(decoder.local_name(spec)))
                for spec in decoder.block_linears(index)
            }
            terms = {spec: partial(absolute_relevance, weight) for spec, weight in weights.items()}
            with RelevanceRules():
                found = backward_block(decoder, index, block, inputs[index], gradient, terms)
            rows = []
            for spec, weight in weights.items():
                module = block.get_submodule(decoder.local_name(spec))
                changes = weight_changes(module, stats[spec.input_group], schemes, quantizer)
                rows.append(relative_errors(weight, changes, stats[spec.input_group].hessian))
        shares.append(torch.stack([found[spec] for spec in weights]).double().cpu())
        errors.append(torch.stack(rows))
        inputs.pop()
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    share = torch.cat(shares[::-1])
    return Measurement(torch.cat(errors[::-1]) * (share / share.sum())[:, None])


def absolute_relevance(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Σ over tokens and outputs of |g · Wx|, a scalar.

    Args:
        weight: (out_features, in_features).
        inputs, gradients: of one window, (n_tokens, in_features) and (n_tokens, out_features).
    """
    return ((inputs @ weight.T) * gradients).abs().sum()


def _top_logit_gradient(decoder: Decoder, last: Tensor) -> Tensor:
    """Gradient of Σ largest logit in the last block's output (n_samples, seq_len, hidden)."""
    gradient = torch.empty_like(last)
    for sample in range(len(last)):
        rows = slice(sample, sample + 1)
        hidden = last[rows].clone().requires_grad_(True)
        with RelevanceRules():
            top = decoder.head(hidden).amax(-1).sum()
        (gradient[rows],) = torch.autograd.grad(top, [hidden])
    return gradient
