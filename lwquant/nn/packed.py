"""The modules that hold packed weights, together."""

from __future__ import annotations

from torch import nn

from lwquant import ops
from lwquant.nn.embedding import QuantizedEmbedding, TiedHead
from lwquant.nn.linear import QuantizedLinear
from lwquant.ops.activations import ACTIVATION_BITS

PACKED_MODULES = (QuantizedLinear, QuantizedEmbedding, TiedHead)


def compile_kernels(model: nn.Module) -> None:
    """Lay the quantized linears out, and compile what those on GPUs need, side by side.

    `from_pretrained` does it; after `model.to("cuda")` first calls compile one kind after another,
    and before a CUDA graph is captured all must be there. LwquantError where there is no compiler.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | TiedHead)]
    laid_out = [(layer.prepare(), layer.activation_bits) for layer in layers]
    ops.compile_ahead((kernel, bits) for kernel, bits in laid_out if kernel is not None)


def set_activation_bits(model: nn.Module, bits: int, int8_weights: bool | None = None) -> None:
    """Let the kernels of all quantized linears, and of the head, hold their inputs in 8 or 16 bits.

    With `int8_weights`, beside 8 bits, weights of any width may become int8 where there are many
    tokens, which is fastest and shows; False forbids it, None leaves what each layer was given.
    What was chosen when the model was quantized is in lwquant/activation_choice.py. ValueError for
    other bits, and for int8 weights beside 16.
    """
    if bits not in ACTIVATION_BITS:
        raise ValueError(f"activation bits {bits} are not one of {ACTIVATION_BITS}")
    if int8_weights and bits != 8:
        raise ValueError(f"int8 weights need activations of 8 bits, not {bits}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            module.activation_bits = bits
        if isinstance(module, QuantizedLinear) and int8_weights is not None:
            module.allow_int8_weights(int8_weights)
