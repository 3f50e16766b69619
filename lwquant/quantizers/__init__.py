"""Weight quantizers.

A quantizer is a function (weight, stats, scheme, *, settings) -> QuantizedWeight where weight is
(out_features, in_features) and stats.hessian (in_features, in_features). It changes neither
argument, treats output rows independently, and uses a shorter last group where group_size does not
divide in_features. tests/contract/test_quantizers.py holds every entry below to this.
"""

from collections.abc import Callable

from torch import Tensor

from lwquant.quantizers.gptq import gptq
from lwquant.quantizers.quantease import quantease
from lwquant.quantizers.rtn import rtn
from lwquant.types import LayerStats, QuantizedWeight, QuantScheme

Quantizer = Callable[[Tensor, LayerStats, QuantScheme], QuantizedWeight]

QUANTIZERS = {"rtn": rtn, "gptq": gptq, "quantease": quantease}

__all__ = ["QUANTIZERS", "Quantizer", "gptq", "quantease", "rtn"]
