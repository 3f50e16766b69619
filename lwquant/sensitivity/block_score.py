"""Spreading one importance score per block over its linears and the schemes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight
from lwquant.quantizers import rtn
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.walk import BlockVisit


def spread(
    decoder: Decoder, visit: BlockVisit, importance: float, schemes: Sequence[QuantScheme]
) -> Tensor:
    """Costs (n_linears, n_schemes) of one block: importance × rounding noise × share of weights.

    The papers rank blocks and stop there; the product makes a score comparable across widths. The
    noise is the relative squared error of plain rounding.
    """
    modules = [visit.block.get_submodule(decoder.local_name(spec)) for spec in visit.linears]
    total = sum(spec.n_weights for spec in visit.linears)
    shares = torch.tensor([spec.n_weights / total for spec in visit.linears], dtype=torch.float64)
    noise = torch.stack([rounding_noise(module, schemes) for module in modules])
    return importance * noise * shares[:, None]


def rounding_noise(module: nn.Module, schemes: Sequence[QuantScheme]) -> Tensor:
    """‖Q(W) − W‖² / ‖W‖² per scheme, (n_schemes,) float64; 0 for 16 bits and for a zero weight.

    Outliers of a scheme are not looked for.
    """
    weight = get_weight(module)
    energy = weight.square().sum().item()
    noise = torch.zeros(len(schemes), dtype=torch.float64)
    for position, scheme in enumerate(schemes):
        if not scheme.is_float and energy > 0:
            rounded = rtn(weight, None, scheme.without_outliers).dequantize()
            noise[position] = (rounded - weight).square().sum().item() / energy
    return noise
