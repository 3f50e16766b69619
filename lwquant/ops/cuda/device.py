"""What torch says of a GPU."""

from __future__ import annotations

import functools

import torch

from lwquant.errors import LwquantError


def architecture(device_index: int) -> str:
    """Such as "sm_90". LwquantError where the kernels' instructions are missing."""
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        name = torch.cuda.get_device_name(device_index)
        raise LwquantError(f"{name} is sm_{major}{minor}; quantized layers need sm_80 or newer")
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def stream(device: torch.device) -> int:
    """The one that torch launches on now."""
    return int(torch.cuda.current_stream(device).cuda_stream)
