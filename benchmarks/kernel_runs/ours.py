"""lwquant's own layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernel_runs.candidate import Call, Candidate, Shape, pool_size
from lwquant import ops
from lwquant.ops.huge_pages import empty_bytes
from lwquant.ops.scale_bytes import encode_scales
from lwquant.quantizers.grid import storable_scale
from lwquant.scheme import QuantScheme, row_words

# Of the largest output: activations are integers up to 127 or 32639 times a span's largest.
TOLERANCE = {8: 0.03, 16: 1e-4}
BF16 = 0.02  # where weights and inputs are rounded to it
BF16_RESULT = 2.0**-8
NO_OUTLIERS = (None, None, None)


def candidate(
    shape: Shape, scheme: QuantScheme, activation_bits: int, bf16_inputs: bool
) -> Candidate:
    """A layer of random words, which are valid codes at every width."""
    out_features, in_features = shape
    n_bytes = ops.tiles_bytes(scheme, out_features, in_features)
    if not n_bytes:
        raise SystemExit(f"there is no kernel for scheme {scheme.label}")
    first = _random_tiles(shape, scheme)
    pool = [first]
    for _ in range(pool_size(n_bytes) - 1):
        pool.append(empty_bytes(n_bytes).copy_(first))

    kernels = [ops.TiledLinear(t, out_features, in_features, NO_OUTLIERS) for t in pool]

    def bind(x: Tensor, n: int) -> list[Call]:
        own = x.bfloat16() if bf16_inputs else x
        return [partial(kernel, own, None, activation_bits) for kernel in kernels[:n]]

    dense = partial(ops.dequantize_tiled, first, out_features, in_features)
    name = f"{scheme.label}-a{activation_bits}"

    def tolerance(n_tokens: int) -> float:
        rounded_to = ops.weights_rounded_to(
            scheme.bits, True, n_tokens, activation_bits, bf16_inputs
        )
        of_products = BF16 if rounded_to == "bf16" else TOLERANCE[activation_bits]
        return of_products + BF16_RESULT * bf16_inputs

    return Candidate(name, scheme.bits, n_bytes, bind, dense, tolerance, activation_bits)


def _random_tiles(shape: Shape, scheme: QuantScheme) -> Tensor:
    out_features, in_features = shape
    n_groups = scheme.n_groups(in_features)

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32)

    drawn = storable_scale(torch.rand(out_features, n_groups) + 0.5, scheme).half()
    scales = encode_scales(drawn) if scheme.scale_bits == 8 else drawn
    if scheme.fine_zeros:
        zeros = torch.randint(256, (n_groups, out_features), dtype=torch.uint8)
    else:
        zeros = words(n_groups, row_words(out_features, scheme.bits))
    codes = words(out_features, row_words(in_features, scheme.bits))
    return ops.make_tiles(scheme, in_features, codes, scales, zeros, int8_weights=True)
