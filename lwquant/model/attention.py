"""Attention probabilities of one block, which the fused kernels never form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lwquant.errors import UnsupportedModelError
from lwquant.model.decoder import Decoder


class _Found(Exception):
    """Leaves the block once its attention has run."""


@torch.no_grad()
def attention_probabilities(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor
) -> Tensor:
    """Post-softmax attention (n_samples, heads, queries, keys) of a loaded block.

    The block runs with transformers' eager attention, with its weights as they are now, up to the
    first module that returns such a tensor.

    Args:
        hidden: the block's input, (n_samples, seq_len, hidden).

    Raises UnsupportedModelError when no module of the block returns one.
    """
    found: list[Tensor] = []
    n_samples, seq_len = hidden.shape[:2]

    def catch(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in output if isinstance(output, tuple) else ():
            if (
                isinstance(part, Tensor)
                and part.ndim == 4
                and (part.shape[0], *part.shape[2:]) == (n_samples, seq_len, seq_len)
            ):
                found.append(part)
                raise _Found

    handles = [module.register_forward_hook(catch) for module in block.modules()]
    try:
        with decoder.eager_attention():
            decoder.run(index, block, hidden)
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UnsupportedModelError(
            f"{type(block).__name__} gives no attention probabilities, even with eager attention"
        )
    return found[0]
