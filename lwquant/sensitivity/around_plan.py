"""KL of each linear under each scheme while all the others are quantized as a plan says.

Costs measured one linear at a time in the float model do not add up where errors are large: they
meet in the same outputs, and the model bends. To second order around the plan,
KL = Σ_l c_l + Σ_{l<m} x_lm, own terms and pair terms. Changing linear l alone from its width to
another changes its own term and all its pair terms; one gradient of the KL at the quantized model
predicts that for every width. A cost here is the own term and half of each pair term, so that the
two linears of a pair carry it together: the costs of the plan's own choices sum to its KL.

The idea of measuring anew where the plan is, is GEMQ's (progressive estimation) and CoopQ's
(Shapley shares of pairs from sampled subsets); the gradient in place of samples is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.backward import (
    backward_block,
    kl_gradient,
    sampled_gradient,
    weight_gradient,
)
from lwquant.sensitivity.information import Information, block_information
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_inputs, block_stats, weight_changes
from lwquant.types import LayerStats, LinearSpec


def around_plan(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    plan: Mapping[str, QuantScheme],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Costs (n_linears, n_schemes) in nats of KL per token, for tokens (n_samples, seq_len).

    Every linear is quantized by itself on the stream of the blocks before it, without propagation.
    Costs below zero (a coarser linear that would make up for others) count as zero. Holds the
    inputs of all blocks for all tokens, as `fisher` does.

    Args:
        plan: the scheme of every linear.
    """
    reference = decoder.last_hidden(tokens)

    def quantize(index: int, block: nn.Module, hidden: Tensor) -> None:
        progress("remeasure", f"forward, block {index}", index, 2 * decoder.n_blocks)
        stats = block_stats(decoder, index, block, hidden)
        _quantize(_modules(decoder, index, block), stats, plan, quantizer)

    inputs, last = block_inputs(decoder, tokens, quantize)
    sampled = sampled_gradient(decoder, last, tokens, seed)
    pulled = kl_gradient(decoder, last, reference)
    costs: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        done = 2 * decoder.n_blocks - 1 - index
        progress("remeasure", f"backward, block {index}", done, 2 * decoder.n_blocks)
        with decoder.loaded(index) as block:
            stats = block_stats(decoder, index, block, inputs[index])
            modules = _modules(decoder, index, block)
            weights = {spec: get_weight(module).clone() for spec, module in modules.items()}
            current = _quantize(modules, stats, plan, quantizer)
            entry = inputs[index]
            information = block_information(decoder, index, block, entry, sampled)
            slopes = backward_block(decoder, index, block, entry, pulled, weight_gradient)
            rows = []
            for spec, module in modules.items():
                own, slope = stats[spec.input_group], slopes[spec] / tokens.numel()
                set_weight(module, weights[spec])
                changes = weight_changes(module, own, schemes, quantizer)
                rows.append(shares(changes, current[spec], slope, information[spec]))
        costs.append(torch.stack(rows))
        inputs.pop()
    progress("remeasure", "done", 2 * decoder.n_blocks, 2 * decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]).clamp(min=0))


def shares(changes: Tensor, current: Tensor, slope: Tensor, information: Information) -> Tensor:
    """Own term and half the pair terms of each change, float64, 0 for no change at all.

    Args:
        changes: Ŵ − W of every scheme, (n_schemes, out_features, in_features).
        current: the one that is in the model, (out_features, in_features).
        slope: gradient of the mean KL in the weight as it is in the model.
    """
    candidates = torch.cat([changes, torch.zeros_like(current)[None]])
    steps = candidates - current
    # What the KL changes by when this linear alone goes from its current change to another.
    alone = (slope * steps).sum((1, 2)).double().cpu() + information.second_order(steps)
    share = (alone + information.second_order(candidates)) / 2
    return torch.where(changes.flatten(1).any(1).cpu(), share[:-1] - share[-1], 0.0)


def _quantize(
    modules: Mapping[LinearSpec, nn.Module],
    stats: Mapping[int, LayerStats],
    plan: Mapping[str, QuantScheme],
    quantizer: Quantizer,
) -> dict[LinearSpec, Tensor]:
    """Round the linears of a block as the plan says; returns by how much each changed."""
    changes = {}
    for spec, module in modules.items():
        own = stats[spec.input_group]
        changes[spec] = weight_changes(module, own, [plan[spec.name]], quantizer)[0]
    for spec, module in modules.items():
        set_weight(module, get_weight(module) + changes[spec])
    return changes


def _modules(decoder: Decoder, index: int, block: nn.Module) -> dict[LinearSpec, nn.Module]:
    return {
        spec: block.get_submodule(decoder.local_name(spec)) for spec in decoder.block_linears(index)
    }
