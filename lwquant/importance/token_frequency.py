"""TokenFreq: rare tokens matter more."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.importance.view import BlockView


def token_frequency(view: BlockView) -> Tensor:
    """Minus how often the token occurs in all calibration windows."""
    counts = torch.bincount(view.tokens.flatten())
    return -counts[view.tokens].to(view.inputs.device, torch.float32)
