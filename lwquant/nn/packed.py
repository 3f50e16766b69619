"""The modules that hold packed weights, together."""

from __future__ import annotations

from torch import nn

from lwquant import ops
from lwquant.nn.embedding import QuantizedEmbedding, TiedHead
from lwquant.nn.linear import QuantizedLinear

PACKED_MODULES = (QuantizedLinear, QuantizedEmbedding, TiedHead)


def compile_kernels(model: nn.Module) -> None:
    """Lay the quantized linears out, and compile what those on GPUs need, side by side.

    `from_pretrained` does it; after `model.to("cuda")` first calls compile one kind after another,
    and before a CUDA graph is captured all must be there. LwquantError where there is no compiler.
    """
    heads = [module.layer() for module in model.modules() if isinstance(module, TiedHead)]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    laid_out = [(layer.prepare(), layer.activation_bits) for layer in (*layers, *heads)]
    ops.compile_ahead((kernel, bits) for kernel, bits in laid_out if kernel is not None)
