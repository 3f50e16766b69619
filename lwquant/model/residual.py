"""Which linears of a block write straight into the residual stream, found by running the block.

Such a linear's output is added to the stream as it is, so it can also make up for an error that
the stream already carries. Where a norm or a factor lies between, it is not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lwquant.model.structure import block_linears, features_of

# Where the stream that the output is added to can be read off: it is the block's input, or the
# block's output less the linear's own.
Residual = Literal["input", "output"]

TOLERANCE = 1e-3  # relative, in the Frobenius norm; a norm or a factor in between changes far more


@torch.no_grad()
def residual_writers(
    block: nn.Module, hidden: Tensor, run: Callable[[], Tensor]
) -> dict[str, Residual]:
    """Names of the linears that write into the residual stream, and where to read that stream.

    Args:
        hidden: the block's input, (n_samples, seq_len, hidden); a few samples will do.
        run: runs the block on it, and returns its output of the same shape.
    """
    candidates = {
        name: module
        for name, module in block_linears(block).items()
        if features_of(module)[0] == hidden.shape[-1]
    }
    outputs: dict[str, Tensor] = {}
    read_later: dict[str, list[Tensor]] = {name: [] for name in candidates}

    def note_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            if output.numel() == hidden.numel():
                outputs[name] = output.reshape(hidden.shape).clone()  # blocks may add in place

        return hook

    def note_input(_: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == hidden.numel():
            for name in outputs:
                read_later[name].append(args[0].reshape(hidden.shape).clone())

    handles = [m.register_forward_hook(note_output(name)) for name, m in candidates.items()]
    handles += [m.register_forward_pre_hook(note_input) for m in block.modules()]
    try:
        before = run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Residual] = {}
    for name, module in candidates.items():
        own = outputs.get(name)
        if own is None or not own.any():
            continue  # nothing can be told from the output of a zero weight
        if any(_close(later - hidden, own) for later in read_later[name]):
            found[name] = "input"
        elif _close(_shifted(module, run, own) - before, own):
            found[name] = "output"
    return found


def _shifted(module: nn.Module, run: Callable[[], Tensor], shift: Tensor) -> Tensor:
    """The block's output when the linear puts out `shift` on top of its own."""
    handle = module.register_forward_hook(
        lambda _, args, output: output + shift.reshape(output.shape)
    )
    try:
        return run()
    finally:
        handle.remove()


def _close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).norm() <= TOLERANCE * wanted.norm())
