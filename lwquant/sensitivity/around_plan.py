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
from lwquant.sensitivity.backward import backward_block, kl_gradient, sampled_gradient
from lwquant.sensitivity.fisher import second_order, squared_gradients
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_stats, weight_changes
from lwquant.sequential import chunks
from lwquant.types import LayerStats, LinearSpec, QuantScheme


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
    inputs, last = _quantized_inputs(decoder, tokens, plan, quantizer, progress)
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
            squares = squared_gradients(decoder, index, block, inputs[index], sampled)
            slopes = _weight_gradients(decoder, index, block, inputs[index], pulled)
            rows = []
            for spec, module in modules.items():
                own, slope = stats[spec.input_group], slopes[spec] / tokens.numel()
                set_weight(module, weights[spec])
                changes = weight_changes(module, own, schemes, quantizer)
                rows.append(shares(changes, current[spec], slope, own, squares[spec]))
        costs.append(torch.stack(rows))
        inputs.pop()
    progress("remeasure", "done", 2 * decoder.n_blocks, 2 * decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]).clamp(min=0))


def shares(
    changes: Tensor, current: Tensor, slope: Tensor, stats: LayerStats, squares: Tensor
) -> Tensor:
    """Own term and half the pair terms of each change, float64, 0 for no change at all.

    Args:
        changes: Ŵ − W of every scheme, (n_schemes, out_features, in_features).
        current: the one that is in the model, (out_features, in_features).
        slope: gradient of the mean KL in the weight as it is in the model.
        stats, squares: of the linear's inputs and output gradients, for second_order().
    """
    candidates = torch.cat([changes, torch.zeros_like(current)[None]])
    steps = candidates - current
    # What the KL changes by when this linear alone goes from its current change to another.
    alone = (slope * steps).sum((1, 2)).double().cpu() + second_order(steps, stats, squares)
    share = (alone + second_order(candidates, stats, squares)) / 2
    return torch.where(changes.flatten(1).any(1).cpu(), share[:-1] - share[-1], 0.0)


@torch.no_grad()
def _quantized_inputs(
    decoder: Decoder,
    tokens: Tensor,
    plan: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    progress: Progress,
) -> tuple[list[Tensor], Tensor]:
    """The input of every block of the quantized model, and the output of the last."""
    hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
    inputs = []
    for index in range(decoder.n_blocks):
        progress("remeasure", f"forward, block {index}", index, 2 * decoder.n_blocks)
        inputs.append(hidden)
        with decoder.loaded(index) as block:
            stats = block_stats(decoder, index, block, hidden)
            _quantize(_modules(decoder, index, block), stats, plan, quantizer)
            output = torch.empty_like(hidden)
            for rows in chunks(*hidden.shape[:2]):
                output[rows] = decoder.run(index, block, hidden[rows])
        hidden = output
    return inputs, hidden


def _weight_gradients(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, gradient: Tensor
) -> dict[LinearSpec, Tensor]:
    """Σ over tokens of g xᵀ, (out_features, in_features) per linear of the block.

    `gradient` is of the block's output, and becomes that of its input: see backward_block().
    """
    sums: dict[LinearSpec, Tensor] = {}

    def keep(spec: LinearSpec, inputs: Tensor, gradients: Tensor) -> None:
        if spec not in sums:
            sums[spec] = gradients.new_zeros(spec.out_features, spec.in_features)
        sums[spec].addmm_(gradients.T, inputs)

    backward_block(decoder, index, block, hidden, gradient, keep)
    return sums


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
