"""Rules under which gradient × activation is relevance that attention and gates pass on.

The rules of Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", arXiv:2402.05602, as changes of the gradient, found by the function that is called:
a nonlinearity is a gain that stays as it is (f(x)/x), a norm's divisor is a constant, and each
factor of a product of two activations gets half. Attention is two products with a softmax between,
whose own gradient stays: half for the values, a quarter each for queries and keys. Linears follow
the plain gradient, LRP-0, where the paper takes the ε rule; relevance is then kept but for biases
and the softmax. An activation written out in arithmetic is taken apart by the product rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {F.silu, F.gelu, F.relu, torch.relu, torch.tanh, torch.sigmoid, Tensor.tanh}
PRODUCTS = {
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
}
RECIPROCAL_ROOTS = {torch.rsqrt, Tensor.rsqrt}


class RelevanceRules(TorchFunctionMode):
    """What runs forward while it is entered has these rules in its backward pass, equal values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = [name for name in ("query", "key", "value") if name in kwargs]
            query, key, value, *rest = [*args[:3], *(kwargs.pop(n) for n in names), *args[3:]]
            return func(
                _scaled(query, 0.25), _scaled(key, 0.25), _scaled(value, 0.5), *rest, **kwargs
            )
        if func in ACTIVATIONS:
            return _gain(args[0], func(*args, **kwargs))
        if func in RECIPROCAL_ROOTS:
            return func(*args, **kwargs).detach()
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func in PRODUCTS and all(isinstance(a, Tensor) and a.requires_grad for a in args[:2]):
            return func(_scaled(args[0], 0.5), _scaled(args[1], 0.5), *args[2:], **kwargs)
        return func(*args, **kwargs)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x, with `factor` of its gradient."""
    return x * factor + (x * (1 - factor)).detach()


def _gain(x: Tensor, y: Tensor) -> Tensor:
    """y, as x times a constant."""
    constant = torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)).detach()
    return x * constant + (y - x * constant).detach()


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt().detach()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
