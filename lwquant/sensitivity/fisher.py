"""KL of each linear under each scheme, from squared gradients of one backward pass.

To second order, the KL that a change ΔW of one linear causes is the Fisher information in the
direction of the change of its output (Martens, "New Insights and Perspectives on the Natural
Gradient Method", arXiv:1412.1193). Taking output gradients and inputs as independent of each other,
and outputs and tokens as uncorrelated, it is ½ Σ_o E[g_o²] · E[(ΔW_o x)²]: the Kronecker-factored
form of Martens and Grosse, arXiv:1503.05671, with a diagonal output factor. ΔW is the change that
the chosen quantizer really makes, so errors that cancel in the output count little.

The exact square ⟨G, ΔW⟩² of whole-window gradients needs no independence but one window is one
sample of it; with the 32 windows that the time allows, its plans measured worse on both models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_inputs, block_stats, weight_changes
from lwquant.types import LinearSpec, QuantScheme


def fisher(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Costs (n_linears, n_schemes) in nats of KL per token, for tokens (n_samples, seq_len).

    Holds the inputs of all blocks for all tokens: n_blocks · n_samples · seq_len · hidden floats.
    """
    inputs, last = block_inputs(decoder, tokens)
    gradient = head_gradient(decoder, last, tokens, seed)
    final = decoder.n_blocks - 1
    costs: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        progress("sensitivity", f"block {index}", final - index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            squares = _backward(decoder, index, block, inputs[index], gradient)
            stats = block_stats(decoder, index, block, inputs[index])
            rows = []
            for spec in decoder.block_linears(index):
                module = block.get_submodule(decoder.local_name(spec))
                own = stats[spec.input_group]
                changes = weight_changes(module, own, schemes, quantizer)
                moved = ((changes @ own.hessian) * changes).sum(2).double()  # (schemes, out)
                per_token = moved.clamp(min=0) @ squares[spec].double() / tokens.numel() ** 2
                rows.append(per_token.cpu() / 2)
        costs.append(torch.stack(rows))
        inputs.pop()
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]))


def _backward(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, gradient: Tensor
) -> dict[LinearSpec, Tensor]:
    """Σ over tokens of squared output gradients, (out_features,) per linear of the block.

    `gradient` (n_samples, seq_len, hidden) is of the block's output, and becomes that of its input.
    """
    squares: dict[LinearSpec, Tensor] = {}

    def adder(spec: LinearSpec) -> Callable[..., None]:
        squares[spec] = torch.zeros(spec.out_features, device=hidden.device)

        def keep(gradient: Tensor) -> None:  # returns nothing: the gradient itself stays
            squares[spec] += gradient.reshape(-1, spec.out_features).square().sum(0)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:  # the decoder may run the block once more to learn its calls
                output.register_hook(keep)

        return hook

    handles = [
        block.get_submodule(decoder.local_name(spec)).register_forward_hook(adder(spec))
        for spec in decoder.block_linears(index)
    ]
    try:
        for row in range(len(hidden)):
            rows = slice(row, row + 1)
            leaf = hidden[rows].clone().requires_grad_(True)
            output = decoder.run(index, block, leaf)
            (gradient[rows],) = torch.autograd.grad(output, [leaf], gradient[rows])
    finally:
        for handle in handles:
            handle.remove()
    return squares


def head_gradient(decoder: Decoder, last: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """Gradient of Σ log p(y) in the last block's output, with y drawn from the model.

    Each window's draw is seeded by its own tokens, so that their order does not matter.
    """
    gradient = torch.empty_like(last)
    for sample in range(len(last)):
        generator = torch.Generator().manual_seed(seed + int(tokens[sample].sum()))
        hidden = last[sample : sample + 1].clone().requires_grad_(True)
        log_probs = decoder.head(hidden)[0].log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
        chosen = log_probs.gather(1, drawn.to(log_probs.device)).sum()
        (gradient[sample : sample + 1],) = torch.autograd.grad(chosen, [hidden])
    return gradient
