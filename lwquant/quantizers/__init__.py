"""Weight quantizers.

A quantizer is a function (weight, stats, scheme, *, settings) -> QuantizedWeight where weight is
(out_features, in_features) and stats.hessian (in_features, in_features). It changes neither
argument, treats output rows independently, and uses a shorter last group where group_size does not
divide in_features. A scheme with outliers is for quantease alone, the others raise ValueError. Its
error on the data, or where it looks at none the error it fits, is not above
plain rounding's. tests/contract/test_quantizers.py holds every entry below to this.
"""

from collections.abc import Callable

from torch import Tensor

from lwquant.quantizers.gptq import gptq
from lwquant.quantizers.hqq import hqq
from lwquant.quantizers.quantease import quantease
from lwquant.quantizers.rtn import rtn
from lwquant.types import LayerStats, QuantizedWeight, QuantScheme

Quantizer = Callable[[Tensor, LayerStats, QuantScheme], QuantizedWeight]

QUANTIZERS = {"rtn": rtn, "gptq": gptq, "quantease": quantease, "hqq": hqq}

__all__ = ["QUANTIZERS", "Quantizer", "gptq", "hqq", "quantease", "rtn"]
