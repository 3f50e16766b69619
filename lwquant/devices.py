"""Where a run computes, and the memory it has."""

from __future__ import annotations

from pathlib import Path

import torch

from lwquant.errors import LwquantError


def usable(device: str) -> torch.device:
    """The device of that name, such as "cpu" or "cuda:1"; LwquantError where it cannot be used."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise LwquantError(
            f"device {device!r} cannot be used with this torch ({torch.__version__}): {reason}"
        ) from error
    return found


def free_memory() -> int | None:
    """Bytes of the machine's memory that can be had without swapping; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None
