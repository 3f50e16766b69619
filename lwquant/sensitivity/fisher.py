"""KL of each linear under each scheme, from one backward pass per calibration window.

To second order the model's KL for a weight change ΔW is ½ E[⟨G, ΔW⟩²], where G is the gradient of
the log-likelihood of tokens drawn from the model itself (the Fisher information as the Hessian of
KL; Martens, "New Insights and Perspectives on the Natural Gradient Method", arXiv:1412.1193).
ΔW is the real change the chosen quantizer makes, so errors that cancel in the output count little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.model.structure import as_linear
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_stats, walk_blocks, weight_changes
from lwquant.types import QuantScheme


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
    inputs = [visit.inputs for visit in walk_blocks(decoder, tokens)]
    with decoder.loaded(decoder.n_blocks - 1) as block, torch.no_grad():
        last = torch.cat([decoder.run(decoder.n_blocks - 1, block, h[None]) for h in inputs[-1]])
    gradient = head_gradient(decoder, last, seed)
    projections = []
    for index in reversed(range(decoder.n_blocks)):
        progress("sensitivity", f"block {index}", decoder.n_blocks - 1 - index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            stats = block_stats(decoder, index, block, inputs[index])
            modules = {
                spec: block.get_submodule(decoder.local_name(spec))
                for spec in decoder.block_linears(index)
            }
            changes = {
                spec: weight_changes(module, stats[spec.input_group], schemes, quantizer)
                for spec, module in modules.items()
            }
            products = torch.zeros(len(modules), len(schemes), len(tokens), dtype=torch.float64)
            for module in modules.values():
                module.weight.requires_grad_(True)
            for sample in range(len(tokens)):
                hidden = inputs[index][sample : sample + 1].clone().requires_grad_(True)
                output = decoder.run(index, block, hidden)
                weights: list[Any] = [module.weight for module in modules.values()]
                grads = torch.autograd.grad(
                    output, [hidden, *weights], gradient[sample : sample + 1]
                )
                gradient[sample : sample + 1] = grads[0]
                for row, (spec, grad) in enumerate(zip(modules, grads[1:], strict=True)):
                    product = changes[spec] * as_linear(modules[spec], grad)
                    products[row, :, sample] = product.sum((1, 2)).double().cpu()
            projections.append(products)
        inputs.pop()
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    per_token = torch.cat(projections[::-1]).square().mean(2) / (2 * tokens.shape[1])
    return Measurement(per_token)


def head_gradient(decoder: Decoder, last: Tensor, seed: int) -> Tensor:
    """Gradient of Σ log p(y) in the last block's output, with y drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.empty_like(last)
    for sample in range(len(last)):
        hidden = last[sample : sample + 1].clone().requires_grad_(True)
        log_probs = decoder.head(hidden)[0].log_softmax(-1)
        with torch.no_grad():
            drawn = torch.multinomial(log_probs.exp().cpu(), 1, generator=generator)
        chosen = log_probs.gather(1, drawn.to(log_probs.device)).sum()
        (gradient[sample : sample + 1],) = torch.autograd.grad(chosen, [hidden])
    return gradient
