"""What torch says of a GPU."""

from __future__ import annotations

import functools

import torch

from lwquant.errors import LwquantError
from lwquant.ops.cuda.nvrtc import HOW_TO_INSTALL, supported


def architecture(device_index: int) -> str:
    """What to compile for, such as "sm_80"; the one that tests compile where there are two.

    LwquantError where the kernels' instructions are missing, or the compiler is older than the GPU.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    name = torch.cuda.get_device_name(device_index)
    if major < 8:
        raise LwquantError(f"{name} is sm_{major}{minor}; quantized layers need sm_80 or newer")
    if (major, minor) == (9, 0):
        return "sm_90a"
    # Machine code runs on later GPUs of its generation, too.
    known = [number for number in supported() if number // 10 == major and number % 10 <= minor]
    if not known:
        raise LwquantError(f"NVRTC does not know {name}, sm_{major}{minor}: {HOW_TO_INSTALL}")
    return f"sm_{max(known)}"


def index(device: torch.device) -> int:
    """Torch's number of a GPU, which is the driver's."""
    return int(device.index)


@functools.cache
def multiprocessors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def stream(device: torch.device) -> int:
    """The one that torch launches on now."""
    return int(torch.cuda.current_stream(device).cuda_stream)
