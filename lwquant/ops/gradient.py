"""The gradient of `lwquant::linear` with respect to its input and bias; the codes have none.

The weight stays packed between forward and backward, and is dequantized once in backward.
"""

from typing import Any

import torch
from torch import Tensor

from lwquant.ops.schema import LIBRARY, dequantize

_N_INPUTS = 10


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, zeros, bias, bits, group_size, *outliers = inputs
    ctx.save_for_backward(qweight, scales, zeros, *outliers)
    ctx.layout = (bits, group_size, x.shape[-1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros, *outliers = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * _N_INPUTS
    if ctx.needs_input_grad[0]:
        grads[0] = of_input(grad, dequantize(qweight, scales, zeros, *ctx.layout, *outliers))
    if ctx.needs_input_grad[4]:
        grads[4] = of_bias(grad, ctx.bias_dtype)
    return tuple(grads)


def of_input(grad: Tensor, weight: Tensor) -> Tensor:
    """From (..., out_features) to (..., in_features), in its own dtype."""
    return (grad.float() @ weight).to(grad.dtype)


def of_bias(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """From (..., out_features) to (out_features,)."""
    return grad.float().reshape(-1, grad.shape[-1]).sum(0).to(dtype)


torch.library.register_autograd("lwquant::linear", _backward, setup_context=_setup, lib=LIBRARY)
