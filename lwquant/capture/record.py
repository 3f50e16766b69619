"""Reading the inputs of linears while their block runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Leaves the block once the inputs are known: what comes after the linears need not run."""


def inputs_of(modules: Mapping[int, nn.Module], run: Callable[[], Any]) -> dict[int, Tensor]:
    """The first argument each module is called with inside `run()`, by the module's key.

    The block is left as soon as all inputs are known.
    """
    caught: dict[int, Tensor] = {}

    def catcher(key: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught[key] = args[0]
            if len(caught) == len(modules):
                raise _Stop

        return catch

    handles = [m.register_forward_pre_hook(catcher(key)) for key, m in modules.items()]
    try:
        run()
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught
