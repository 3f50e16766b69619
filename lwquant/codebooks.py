"""Tables of sixteen values in [-1, 1] that 4-bit codes can name, in place of even steps.

nf4 has equal shares of a normal distribution around its values, zero among them: Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. fp4 is a float of one sign, two
exponent and one mantissa bits, where bitsandbytes has 1/16 for the least one. Codes are numbered,
and the largest value is 1, as in bitsandbytes: a value times the absmax of its group is a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CODE_BITS = 4
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

CODEBOOKS: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
}


def values_of(codes: Tensor, codebook: str) -> Tensor:
    """The float32 values that integer codes of any shape stand for.

    >>> values_of(torch.tensor([0, 7, 15], dtype=torch.uint8), "nf4")
    tensor([-1.,  0.,  1.])
    """
    return _table(codebook, codes.device)[codes.int()]


def nearest_codes(values: Tensor, codebook: str) -> Tensor:
    """Codes of the nearest values, int64, shaped like `values`; the lower one of two as near.

    >>> nearest_codes(torch.tensor([-3.0, 0.01, 0.3]), "fp4")
    tensor([11,  1,  4])
    """
    ordered, order = _table(codebook, values.device).sort(stable=True)
    middles = (ordered[:-1] + ordered[1:]) / 2
    return order[torch.bucketize(values.contiguous(), middles)]


def _table(codebook: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[codebook], device=device)
