"""Reading the inputs of linears while their block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Leaves the block once the inputs are known: what comes after the linears need not run."""


@contextmanager
def catching_inputs(
    modules: Mapping[int, nn.Module], *, stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Fills the yielded dict with the first argument of each module's calls, by the module's key.

    With `stop`, whatever runs inside is left as soon as all inputs are known.
    """
    caught: dict[int, Tensor] = {}

    def catcher(key: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught[key] = args[0]
            if stop and len(caught) == len(modules):
                raise _Stop

        return catch

    handles = [m.register_forward_pre_hook(catcher(key)) for key, m in modules.items()]
    try:
        yield caught
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
