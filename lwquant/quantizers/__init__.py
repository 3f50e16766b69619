"""Weight quantizers.

A quantizer is a function (weight, stats, scheme, *, settings) -> QuantizedWeight where weight is
(out_features, in_features) and stats.hessian (in_features, in_features). It changes neither
argument, treats output rows independently, and uses a shorter last group where group_size does not
divide in_features. Its error on the data, or where it looks at none the error it fits, is not above
plain rounding's (bnb is plain rounding itself, as another package does it). It raises ValueError
for a scheme it has no codes for, one with outliers unless it is quantease; LIMITS says so before
anything is measured. tests/contract/test_quantizers.py holds every entry below to this.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lwquant.methods import base_of
from lwquant.quantizers.bnb import bnb, bnb_schemes_only
from lwquant.quantizers.gptq import gptq
from lwquant.quantizers.grid import even_steps_only
from lwquant.quantizers.hqq import hqq
from lwquant.quantizers.quantease import quantease, without_descent
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight

Quantizer = Callable[[Tensor, LayerStats, QuantScheme], QuantizedWeight]

QUANTIZERS = {"rtn": rtn, "gptq": gptq, "quantease": quantease, "hqq": hqq, "bnb": bnb}

LIMITS: dict[Callable[..., Any], Callable[[QuantScheme], None]] = {
    quantease: even_steps_only,
    hqq: even_steps_only,
    bnb: bnb_schemes_only,
}


def refuse_scheme(quantizer: Callable[..., Any], scheme: QuantScheme) -> None:
    """ValueError where a listed quantizer, or a partial of one, has no codes for the scheme."""
    base = base_of(quantizer)
    if scheme.outliers and base is not quantease and base in QUANTIZERS.values():
        raise ValueError(
            f"scheme {scheme.label} has outliers, which only the quantizer quantease looks for"
        )
    if base in LIMITS:
        LIMITS[base](scheme)


__all__ = [
    "LIMITS",
    "QUANTIZERS",
    "Quantizer",
    "bnb",
    "gptq",
    "hqq",
    "quantease",
    "refuse_scheme",
    "rtn",
    "without_descent",
]
