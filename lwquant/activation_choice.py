"""Which quantized linears may round their inputs to 8 bits, and which their weights, too.

Kernels multiply codes by activations as integers of 16 bits, which loses nothing that could be
seen, or of 8, which is up to twice as fast with several tokens. An int8 activation is off by up to
1/254 of the largest in its span of up to 128 inputs. That is little beside the rounding of 2- and
3-bit weights, as much as that of 6-bit ones, and a lot where one channel is massive.

With many tokens, AMX is faster still if weights are int8, too, and inputs share a scale in wider
spans, see ops/int8_weights.py. That has to be invisible by itself: it is more than twice the error.
"""

from __future__ import annotations

from torch import Tensor

from lwquant.ops.activations import rounded_activations
from lwquant.ops.int8_weights import int8_inputs, int8_weight, without_outliers
from lwquant.ops.tiles import fits_kernels
from lwquant.types import QuantizedWeight

# Share of the squared output error of the rounded weight that int8 may add.
INVISIBLE = 0.03
SAMPLED_TOKENS = 256


def sample_of(inputs: Tensor) -> Tensor:
    """Some of the tokens of inputs (..., in_features), evenly spread: (n, in_features) float32."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat[:: max(1, len(flat) // SAMPLED_TOKENS)].float().clone()


def activation_bits(inputs: Tensor, target: Tensor, quantized: QuantizedWeight) -> int:
    """8 where int8 activations add at most INVISIBLE to the squared error of the outputs, else 16.

    Args:
        inputs: (n, in_features) that the linear really gets.
        target: (out_features, in_features), the weight that was rounded.
    """
    if not fits_kernels(quantized.scheme, inputs.shape[-1]):
        return 16
    rounded = rounded_activations(inputs, 8, quantized.scheme.group_size)
    added = (rounded - inputs) @ without_outliers(quantized).dequantize().T
    return 8 if _is_invisible(added, inputs, target, quantized) else 16


def takes_int8_weights(inputs: Tensor, target: Tensor, quantized: QuantizedWeight) -> bool:
    """Whether int8 activations and weights together add at most INVISIBLE; arguments as above."""
    if not fits_kernels(quantized.scheme, inputs.shape[-1]):
        return False
    plain = without_outliers(quantized).dequantize()
    added = int8_inputs(inputs) @ int8_weight(quantized).T - inputs @ plain.T
    return _is_invisible(added, inputs, target, quantized)


def _is_invisible(
    added: Tensor, inputs: Tensor, target: Tensor, quantized: QuantizedWeight
) -> bool:
    """Whether an error of the outputs is little beside that of the weight's rounding.

    Outliers have no part in `added`: kernels add them in float32. Inputs of nothing but zeros are
    no evidence.
    """
    of_weights = (inputs @ (quantized.dequantize() - target).T).square().sum()
    return bool((added.square().sum() <= INVISIBLE * of_weights) & (of_weights > 0))
