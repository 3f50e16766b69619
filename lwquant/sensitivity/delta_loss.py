"""First-order change of the loss: the gradient of each linear's weight times its change.

The score of LLM-MQ (Li et al., 2023) and of AutoRound's AutoScheme. The KL of a model to itself has
no gradient, so the loss is the cross-entropy of the calibration text's next tokens, or of tokens
drawn from the model, whose squares are the Fisher information. A linear's products have either
sign from window to window and would cancel in a sum, so their absolute values are summed.

The loss of a trained model is nearly flat: single products are noise around a small mean, and the
mean of their absolute values grows with the size of ΔW, where the loss grows with its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.backward import backward_block, sampled_gradient, text_gradient
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_inputs, block_stats, weight_changes


def delta_loss(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    labels: Literal["text", "sampled"] = "text",
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Σ over windows of |⟨G, ΔW⟩| per token, (n_linears, n_schemes), G of one window's summed loss.

    Holds the inputs of all blocks for tokens (n_samples, seq_len), and the changes of one block's
    weights under all schemes.

    Args:
        labels: next tokens of the text, or tokens drawn from the model by `seed`.
    """
    inputs, last = block_inputs(decoder, tokens)
    if labels == "text":
        gradient = text_gradient(decoder, last, tokens)
    else:
        gradient = sampled_gradient(decoder, last, tokens, seed)
    final = decoder.n_blocks - 1
    costs: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        progress("sensitivity", f"block {index}", final - index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            # A pass of its own: each window's product needs ΔW, and that the inputs of them all.
            stats = block_stats(decoder, index, block, inputs[index])
            terms = {}
            for spec in decoder.block_linears(index):
                module = block.get_submodule(decoder.local_name(spec))
                changes = weight_changes(module, stats[spec.input_group], schemes, quantizer)
                terms[spec] = partial(first_order, changes)
            found = backward_block(decoder, index, block, inputs[index], gradient, terms)
        costs.append(torch.stack([found[spec] for spec in terms]).double().cpu())
        inputs.pop()
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]) / tokens.numel())


def first_order(changes: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """|Σ over tokens of gᵀ ΔW x| of each change, (n_schemes,).

    Args:
        changes: ΔW of every scheme, (n_schemes, out_features, in_features).
        inputs, gradients: of one window, (n_tokens, in_features) and (n_tokens, out_features).
    """
    return torch.einsum("soi,oi->s", changes, gradients.T @ inputs).abs()
