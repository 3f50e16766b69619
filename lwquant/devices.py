"""Where a run computes."""

from __future__ import annotations

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
