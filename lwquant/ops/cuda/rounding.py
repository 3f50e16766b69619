"""The loop over a block of columns on a GPU, one launch in place of hundreds."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lwquant.errors import LwquantError
from lwquant.ops.cuda import driver
from lwquant.ops.cuda.cache import compiled
from lwquant.ops.cuda.device import architecture, index, stream
from lwquant.ops.cuda.nvrtc import RoundingKind
from lwquant.ops.native import run_on_addresses

if TYPE_CHECKING:
    from lwquant.ops._kernels import GpuRounding


def can_round(*tensors: Tensor | None) -> bool:
    """Whether round_block() serves these tensors; a warning says once why it does not on a GPU."""
    there = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in there):
        return False
    return _loaded(index(there[0].device)) is not None


def round_block(
    targets: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    base: Tensor | None,
) -> Tensor:
    """As lwquant.ops.rounding.round_block_torch(), but that products are added unrounded.

    Up to 128 columns; rows of `feedback` may lie apart.
    """
    device = targets.device
    kernel = _loaded(index(device))
    if kernel is None:
        raise ValueError(f"there is no kernel for {device}")

    launch: Callable[..., None] = kernel.round_block

    def run(*block: float, errors: int) -> None:
        launch(*block, errors, stream(device))

    return run_on_addresses(run, targets, feedback, scales, zeros, max_code, base)


@functools.cache
def _loaded(device_index: int) -> GpuRounding | None:
    try:
        code = compiled(RoundingKind(), architecture(device_index))
        return driver.rounding(code, device_index)
    # What the compiler says, the lack of a driver, and what the driver says.
    except (LwquantError, ValueError, RuntimeError) as error:
        warnings.warn(f"rounding on this GPU takes several times as long: {error}", stacklevel=2)
        return None
