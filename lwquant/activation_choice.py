"""Which quantized linears may round their inputs to 8 bits, by the error that it makes.

Kernels multiply codes by activations as integers of 16 bits, which loses nothing that could be
seen, or of 8, which is up to twice as fast with several tokens. An int8 activation is off by up to
1/254 of the largest in its span of up to 128 inputs. That is little beside the rounding of 2- and
3-bit weights, as much as that of 6-bit ones, and a lot where one channel is massive.
"""

from __future__ import annotations

from torch import Tensor

from lwquant.ops.activations import rounded_activations
from lwquant.ops.tiles import fits_kernels
from lwquant.types import QuantizedWeight

# Share of the squared output error of the rounded weight that int8 activations may add.
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
    weight = quantized.dequantize()
    rounded = rounded_activations(inputs, 8, quantized.scheme.group_size)
    of_activations = ((rounded - inputs) @ weight.T).square().sum()
    of_weights = (inputs @ (weight - target).T).square().sum()
    return 8 if bool(of_activations <= INVISIBLE * of_weights) else 16
