"""How a row of inputs is cut into groups of equal size, of which the last may be shorter."""

from __future__ import annotations

import torch
from torch import Tensor


def group_of_inputs(in_features: int, group_size: int, device: torch.device) -> Tensor:
    """The number of each input's group, (in_features,)."""
    return torch.arange(in_features, device=device) // group_size


def by_groups(values: Tensor, group_size: int) -> Tensor:
    """(..., in_features) as (..., n_groups, size), with zeros where the last group is shorter.

    One group of a whole row has the row's size, however large `group_size` is.

    >>> by_groups(torch.tensor([1, 2, 3]), 2)
    tensor([[1, 2],
            [3, 0]])
    """
    in_features = values.shape[-1]
    size = min(group_size, in_features)
    missing = -in_features % size
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(*values.shape[:-1], -1, size)
