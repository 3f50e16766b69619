"""Skipping what is known of a block: a submodule that hands on the output of one of its linears.

An attention module ends in its output projection. Once the inputs of that projection are recorded
and nothing before it will change, running the module again would only find them again, at the cost
of the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ending:
    """A submodule whose result is the output of the linear, as it is or first in a tuple."""

    module: nn.Module
    linear: nn.Module
    rest: tuple[Any, ...] | None  # what follows the output in the tuple; None: there is no tuple

    def result(self, inputs: Tensor) -> Any:
        output = self.linear(inputs)
        return output if self.rest is None else (output, *self.rest)


@torch.no_grad()
def endings(
    block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], Any]
) -> dict[str, Ending]:
    """The outermost submodule, short of the block, that ends in each linear; few have one.

    Args:
        linears: of the block by their names in it.
        run: runs the block once.
    """
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, Ending] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output, output.clone()

        return hook

    def compare(inside: list[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            if any(value is not None for value in rest):
                return  # a second result would have to be known, too
            for name in set(inside).intersection(outputs):
                own, before = outputs[name]
                # The same tensor, and nobody has added to it in place.
                if first is own and torch.equal(first, before):
                    as_tuple = tuple(rest) if isinstance(output, tuple) else None
                    found[name] = Ending(module, linears[name], as_tuple)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in linears.items()]
    for path, module in block.named_modules():
        inside = [name for name in linears if name.startswith(f"{path}.")]
        if path and inside:
            handles.append(module.register_forward_hook(compare(inside)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def group_endings(
    block: nn.Module, groups: Mapping[int, Mapping[str, nn.Module]], run: Callable[[], Any]
) -> dict[int, Ending]:
    """By input group, the submodule that need not run once the group's inputs are recorded.

    It ends in the group's only linear, and holds none of a later group.

    Args:
        groups: linears of the block by their names in it; groups are recorded in order.
        run: runs the block once.
    """
    linears = {name: module for members in groups.values() for name, module in members.items()}
    found = endings(block, linears, run)
    usable = {}
    for group, members in groups.items():
        ending = found.get(next(iter(members)))
        if ending is None or len(members) > 1:
            continue
        inside = set(ending.module.modules())
        later = (m for other, modules in groups.items() if other > group for m in modules.values())
        if inside.isdisjoint(later):
            usable[group] = ending
    return usable


class Replay:
    """Submodules that need not run any more, with the recorded inputs of the linears they end in.

    Inputs are one tensor per chunk of samples, the same chunks in every pass through the block.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Ending, list[Tensor]]] = []

    def add(self, ending: Ending, inputs: list[Tensor]) -> None:
        """From now on the ending's module is skipped. The linear may still change."""
        self._known.append((ending, inputs))

    @contextmanager
    def chunk(self, number: int) -> Iterator[None]:
        """The block may run on this chunk inside."""
        try:
            for ending, inputs in self._known:
                ending.module.forward = _answer(ending, inputs[number])  # type: ignore[method-assign]
            yield
        finally:
            for ending, _ in self._known:
                ending.module.__dict__.pop("forward", None)


def _answer(ending: Ending, inputs: Tensor) -> Callable[..., Any]:
    return lambda *args, **kwargs: ending.result(inputs)
