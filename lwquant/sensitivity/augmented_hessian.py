"""Second-order KL of all linears changed together: own terms and pair terms, from the Fisher.

Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
Post-Training Quantization", arXiv:2306.04879, have both; only the abstract is known to us, so the
estimate is our own. To second order KL = ½ Σ_lm ΔW_l·F_lm·ΔW_m with the Fisher information F of
all weights. A cost is the linear's own term and half of each pair term, ½ ΔW_l·F·ΔW, where ΔW
changes every linear to the same scheme: the costs of a uniform plan sum to its second-order KL.

F·ΔW needs no pair and no sample. A small step along ΔW moves the model's predictions, and the
gradient of their KL to the original ones, over the step, is F·ΔW: one forward and one backward walk
with a stream for each scheme.

The pair terms of one rounding are partly chance: another plan or propagation rounds otherwise. So
they take away at most half of the own term, as `fisher` has it, and a cost is never 0 by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

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
)
from lwquant.sensitivity.information import block_information
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import InputSums, block_stats, weight_changes
from lwquant.streams import advance
from lwquant.types import LayerStats, LinearSpec

STEP = 0.02  # share of the change at 2 bits; twice that for each further bit, as errors halve


def augmented_hessian(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Costs (n_linears, n_schemes) in nats of KL per token, for tokens (n_samples, seq_len).

    Holds the inputs of all blocks for all tokens, and a stream of hidden states for each scheme.
    """
    rounded = [scheme for scheme in schemes if not scheme.is_float]
    columns = [column for column, scheme in enumerate(schemes) if not scheme.is_float]
    if not rounded:  # nothing changes, so nothing costs
        return Measurement(torch.zeros(len(decoder.linears), len(schemes), dtype=torch.float64))
    inputs, reference, moved = _moved(decoder, tokens, rounded, quantizer, progress)
    sampled = sampled_gradient(decoder, reference, tokens, seed)
    steps = [step_of(scheme) for scheme in rounded]
    pulled = [
        kl_gradient(decoder, last, reference) / step
        for last, step in zip(moved, steps, strict=True)
    ]
    costs: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        done = 2 * decoder.n_blocks - 1 - index
        progress("sensitivity", f"backward, block {index}", done, 2 * decoder.n_blocks)
        with decoder.loaded(index) as block:
            sums = InputSums(decoder.block_linears(index))
            back = partial(backward_block, decoder, index, block, inputs[index])
            information = block_information(
                decoder, index, block, inputs[index], sampled, seen=sums.add
            )
            stats = sums.results()
            # Once more, as on the way forward: to hold the changes of all blocks until here would
            # take four bytes a weight and scheme, twice the model itself for each scheme.
            changes = _changes(decoder, index, block, stats, rounded, quantizer)
            slopes = [
                back(gradient, {spec: partial(slope, own[number]) for spec, own in changes.items()})
                for number, gradient in enumerate(pulled)
            ]
            rows = torch.zeros(len(changes), len(schemes), dtype=torch.float64)
            for row, (spec, own) in enumerate(changes.items()):
                least = information[spec].second_order(own) / 2
                shares = torch.stack([found[spec] for found in slopes]).double().cpu() / 2
                rows[row, columns] = torch.maximum(shares / tokens.numel(), least)
        costs.append(rows)
        inputs.pop()
    progress("sensitivity", "done", 2 * decoder.n_blocks, 2 * decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]))


def step_of(scheme: QuantScheme) -> float:
    """How much of the change to a scheme is small enough to be linear, and not lost in float32."""
    return STEP * 2.0 ** (scheme.bits - 2)


def slope(change: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Σ over tokens of gᵀ ΔW x, a scalar; gradients (n_tokens, out), inputs (n_tokens, in)."""
    return ((inputs @ change.T) * gradients).sum()


@torch.no_grad()
def _moved(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    progress: Progress,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs of all blocks, output of the last, and the same output a step towards each scheme."""
    inputs: list[Tensor] = []
    hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
    streams = [hidden.clone() for _ in schemes]
    for index in range(decoder.n_blocks):
        progress("sensitivity", f"forward, block {index}", index, 2 * decoder.n_blocks)
        inputs.append(hidden)
        hidden = hidden.clone()
        with decoder.loaded(index) as block:
            stats = block_stats(decoder, index, block, hidden, onward=True)
            changes = _changes(decoder, index, block, stats, schemes, quantizer)
            modules = {spec: block.get_submodule(decoder.local_name(spec)) for spec in changes}
            weights = {spec: get_weight(module).clone() for spec, module in modules.items()}
            for position, (scheme, stream) in enumerate(zip(schemes, streams, strict=True)):
                for spec, module in modules.items():
                    step = step_of(scheme) * changes[spec][position]
                    set_weight(module, weights[spec] + step)
                advance(decoder, index, block, stream)
    return inputs, hidden, streams


def _changes(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    stats: Mapping[int, LayerStats],
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
) -> dict[LinearSpec, Tensor]:
    """Ŵ − W of each linear of the block, (n_schemes, out_features, in_features)."""
    return {
        spec: weight_changes(
            block.get_submodule(decoder.local_name(spec)),
            stats[spec.input_group],
            schemes,
            quantizer,
        )
        for spec in decoder.block_linears(index)
    }
