"""Operators on packed weights: torch operators `lwquant::pack|unpack|dequantize|linear`.

Each has a plain-torch meaning (layout.py, reference.py), which the compiled ones equal bit for bit
but for float32 sums. The fast matmul is `lwquant::linear_tiled`, on layers laid out for it
(tiles.py); it equals `linear` to the bound stated in native.py.
"""

import lwquant.ops.gradient  # noqa: F401  (registers the backward of linear)
from lwquant.ops.native import (
    UncompiledWarning,
    available_isas,
    compiled,
    isa,
    set_isa,
    weights_rounded_to,
)
from lwquant.ops.schema import dequantize, linear, pack, unpack
from lwquant.ops.tiles import (
    TiledLinear,
    compile_ahead,
    dequantize_tiled,
    linear_tiled,
    make_tiles,
    tiles_bytes,
    unmake_tiles,
)

__all__ = [
    "TiledLinear",
    "UncompiledWarning",
    "available_isas",
    "compile_ahead",
    "compiled",
    "dequantize",
    "dequantize_tiled",
    "isa",
    "linear",
    "linear_tiled",
    "make_tiles",
    "pack",
    "set_isa",
    "tiles_bytes",
    "unmake_tiles",
    "unpack",
    "weights_rounded_to",
]
