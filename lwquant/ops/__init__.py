"""Operators on packed weights: torch operators `lwquant::pack|unpack|dequantize|linear`.

Each has a plain-torch meaning (layout.py, reference.py). The compiled CPU kernels equal it bit for
bit, except `linear`, which equals it to the bound stated in native.py.
"""

import lwquant.ops.gradient  # noqa: F401  (registers the backward of linear)
from lwquant.ops.native import UncompiledWarning, available_isas, compiled, isa, set_isa
from lwquant.ops.schema import dequantize, linear, pack, unpack

__all__ = [
    "UncompiledWarning",
    "available_isas",
    "compiled",
    "dequantize",
    "isa",
    "linear",
    "pack",
    "set_isa",
    "unpack",
]
