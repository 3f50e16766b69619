"""Where a transformers model keeps its blocks and projections, found by structure alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lwquant.errors import UnsupportedModelError

# A block with less than this share of its weights in linears (fused experts, state-space kernels)
# would come out mostly unquantized, so it is refused instead.
MIN_LINEAR_SHARE = 0.5


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of decoder blocks: the ModuleList that holds the most linear weights.

    Raises UnsupportedModelError when there is none, when another list holds linear weights too, or
    when most of the blocks' weights are not in linears.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and linear_weights(module)
    }
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if len(outermost) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps its linears in {len(outermost)} module lists "
            f"({', '.join(outermost) or 'none'}), one list of blocks is needed"
        )
    path, blocks = next(iter(outermost.items()))
    total = sum(parameter.numel() for parameter in blocks.parameters())
    share = linear_weights(blocks) / total
    if share < MIN_LINEAR_SHARE:
        raise UnsupportedModelError(
            f"{type(model).__name__}: only {share:.0%} of the blocks' weights are in nn.Linear or "
            f"Conv1D; at least {MIN_LINEAR_SHARE:.0%} must be"
        )
    return path, blocks


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Projections of one block by their name inside it."""
    return {name: m for name, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def features_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def linear_weights(module: nn.Module) -> int:
    linears = block_linears(module).values()
    return sum(outputs * inputs for outputs, inputs in map(features_of, linears))


def as_linear(module: nn.Module, tensor: Tensor) -> Tensor:
    """Turn a tensor shaped like the module's weight into (out_features, in_features), or back."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def get_weight(module: nn.Module) -> Tensor:
    """The weight as (out_features, in_features), whatever the module's own orientation."""
    return as_linear(module, module.weight)  # type: ignore[arg-type]


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Put an (out_features, in_features) weight into the module."""
    module.weight = nn.Parameter(as_linear(module, weight).contiguous(), requires_grad=False)


def trace_input_groups(block: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Number the linears by the tensor they read, in the order in which they are called.

    `run` calls the block once. Linears that read the very same tensor (q, k and v; gate and up)
    get the same number. Raises UnsupportedModelError for a linear that is not called exactly once.
    """
    linears = block_linears(block)
    seen: list[tuple[str, Tensor]] = []  # the tensors are kept alive, so identity is meaningful
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: seen.append((n, args[0])))
        for name, module in linears.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, int] = {}
    inputs: list[tuple[int, tuple[int, ...]]] = []
    for name, tensor in seen:
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if identity not in inputs:
            inputs.append(identity)
        groups[name] = inputs.index(identity)
    calls = [name for name, _ in seen]
    odd = sorted(name for name in linears if calls.count(name) != 1)
    if odd:
        raise UnsupportedModelError(f"linears not called exactly once in a block: {', '.join(odd)}")
    return groups
