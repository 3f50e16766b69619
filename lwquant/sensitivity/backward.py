"""Gradients of the model's predictions, walked back one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.types import LinearSpec

# Of a linear's inputs (n_tokens, in_features) and output gradients (n_tokens, out_features).
Term = Callable[[Tensor, Tensor], Tensor]


def weight_gradient(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Σ over tokens of g xᵀ, (out_features, in_features)."""
    return gradients.T @ inputs


def backward_block(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    gradient: Tensor,
    term: Term | Mapping[LinearSpec, Term],
    *,
    seen: Callable[[LinearSpec, Tensor], None] | None = None,
) -> dict[LinearSpec, Tensor]:
    """The term of every linear of a loaded block, one for all or each its own, summed over windows.

    Other arguments as for gradients_back(). A term sees one window at a time.
    """
    sums: dict[LinearSpec, Tensor] = {}

    def add(row: int, spec: LinearSpec, inputs: Tensor, gradients: Tensor) -> None:
        own_term = term[spec] if isinstance(term, Mapping) else term
        own = own_term(inputs, gradients)
        sums[spec] = sums[spec] + own if spec in sums else own

    gradients_back(decoder, index, block, hidden, gradient, add, seen=seen)
    return sums


def gradients_back(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    gradient: Tensor,
    caught: Callable[[int, LinearSpec, Tensor, Tensor], None],
    *,
    seen: Callable[[LinearSpec, Tensor], None] | None = None,
) -> None:
    """Walk the gradient back through a loaded block, one window at a time.

    `hidden` and `gradient` are (n_samples, seq_len, hidden); `gradient` is of the block's output,
    and becomes that of its input. `caught` gets a window's number, and a linear with its inputs
    (n_tokens, in_features) and output gradients (n_tokens, out_features); `seen` is shown each
    linear's inputs on the way forward.
    """
    row = 0

    def watch(spec: LinearSpec) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs = args[0].detach().reshape(-1, spec.in_features)

            def take(gradient: Tensor) -> None:  # returns nothing: the gradient itself stays
                caught(row, spec, inputs, gradient.reshape(-1, spec.out_features))

            if output.requires_grad:  # the decoder may run the block once more to learn its calls
                output.register_hook(take)
                if seen is not None:
                    seen(spec, inputs)

        return hook

    handles = [
        block.get_submodule(decoder.local_name(spec)).register_forward_hook(watch(spec))
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


def sampled_gradient(decoder: Decoder, last: Tensor, tokens: Tensor, seed: int) -> Tensor:
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


def text_gradient(decoder: Decoder, last: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of Σ log p(next token of the text) in the last block's output."""
    gradient = torch.empty_like(last)
    for sample in range(len(last)):
        hidden = last[sample : sample + 1].clone().requires_grad_(True)
        log_probs = decoder.head(hidden)[0, :-1].log_softmax(-1)
        following = tokens[sample, 1:, None].to(log_probs.device)
        chosen = log_probs.gather(1, following).sum()
        (gradient[sample : sample + 1],) = torch.autograd.grad(chosen, [hidden])
    return gradient


def kl_gradient(decoder: Decoder, last: Tensor, reference: Tensor) -> Tensor:
    """Gradient of Σ KL(reference ‖ model) in the model's last block output.

    Both are outputs of the last block, (n_samples, seq_len, hidden).
    """
    gradient = torch.empty_like(last)
    for sample in range(len(last)):
        rows = slice(sample, sample + 1)
        with torch.no_grad():
            target = decoder.head(reference[rows])[0].softmax(-1)
        hidden = last[rows].clone().requires_grad_(True)
        # The entropy of the reference does not depend on the model.
        cross_entropy = -(target * decoder.head(hidden)[0].log_softmax(-1)).sum()
        (gradient[rows],) = torch.autograd.grad(cross_entropy, [hidden])
    return gradient
