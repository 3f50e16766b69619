"""Random layers on a GPU, and what a product with them may be, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant import ops
from lwquant.ops.activations import LARGEST, SMALLEST_RANGE, span_size
from lwquant.ops.cuda.driver import most_tokens
from lwquant.scheme import QuantScheme


@dataclass(frozen=True)
class Layer:
    """What its tiles were made from, for references that share no code with the kernels."""

    scheme: QuantScheme
    codes: Tensor  # (out_features, in_features) uint8
    scales: Tensor  # (out_features, n_groups) float16
    zeros: Tensor  # (out_features, n_groups) uint8
    tiles: Tensor

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @cached_property
    def weight(self) -> Tensor:
        """(out_features, in_features) float64."""
        return (self.codes.double() - self._spread(self.zeros)) * self._spread(self.scales)

    @cached_property
    def terms(self) -> Tensor:
        """Like `weight`: what is multiplied for it, since the kernels subtract the zeros later."""
        return (self.codes.double() + self._spread(self.zeros)) * self._spread(self.scales)

    def _spread(self, groups: Tensor) -> Tensor:
        size = min(self.scheme.group_size, self.in_features)
        return groups.double().repeat_interleave(size, -1)[:, : self.in_features]


def random_layer(
    scheme: QuantScheme, out_features: int, in_features: int, generator: torch.Generator
) -> Layer:
    """On the generator's device."""
    device = generator.device
    per_group = (out_features, scheme.n_groups(in_features))

    def random_codes(shape: tuple[int, int]) -> Tensor:
        n_codes = 2**scheme.bits
        return torch.randint(n_codes, shape, generator=generator, dtype=torch.uint8, device=device)

    codes, zeros = random_codes((out_features, in_features)), random_codes(per_group)
    scales = torch.rand(per_group, generator=generator, device=device) * 0.01 + 0.001
    scales = scales.half()
    qweight = ops.pack(codes.cpu(), scheme.bits)
    qzeros = ops.pack(zeros.cpu().T.contiguous(), scheme.bits)
    tiles = ops.make_tiles(scheme, in_features, qweight, scales.cpu(), qzeros).to(device)
    return Layer(scheme, codes, scales, zeros, tiles)


def times_the_bound(layer: Layer, x: Tensor, bias: Tensor | None, activation_bits: int) -> float:
    """How far linear_tiled() is from float64, in units of what rounding explains; 1 at most.

    Up to most_tokens() these are tests/kernels/cuda_properties.cpp's two bounds: of arithmetic,
    from the product with activations that were rounded, and of these, from the product itself.
    Infinite where outputs are NaN, or a second call's differ.
    """
    few = len(x) <= most_tokens(activation_bits)
    # What the allocator hands out next: an output that is not written stays NaN.
    torch.full((len(x), layer.out_features), torch.nan, dtype=x.dtype, device=x.device)
    got, again = (
        ops.linear_tiled(x, layer.tiles, bias, layer.out_features, activation_bits=activation_bits)
        for _ in range(2)
    )
    if few and not torch.equal(got, again):
        return torch.inf
    error = _over_bound_of_few if few else _over_bound_of_many
    worst = float(error(layer, x, bias, activation_bits, got.double()).max())
    return worst if worst == worst else torch.inf


def _over_bound_of_few(
    layer: Layer, x: Tensor, bias: Tensor | None, activation_bits: int, got: Tensor
) -> Tensor:
    rounded, half_steps = _rounded(x, activation_bits, layer)
    offset = torch.zeros((), device=x.device) if bias is None else bias.double()
    exact = x.double() @ layer.weight.T + offset
    of_rounded = rounded @ layer.weight.T + offset
    size = rounded.abs() @ layer.terms.T + offset.abs()
    # Float32: at most one addition a block of 32 inputs, and one for each warp, split and half.
    arithmetic = (layer.in_features / 32 + 40) * 2.0**-24 * size
    arithmetic += _last_place(x.dtype, of_rounded.abs() + arithmetic)
    steps = half_steps @ layer.weight.abs().T
    return torch.maximum(
        (got - of_rounded).abs() / arithmetic, (got - exact).abs() / (steps + arithmetic)
    )


def _over_bound_of_many(
    layer: Layer, x: Tensor, bias: Tensor | None, activation_bits: int, got: Tensor
) -> Tensor:
    """The weight and the bias are rounded to the dtype of x, and float32 sums are cuBLAS'.

    It may round partial sums to that dtype, too: few, and far smaller than all sizes together.
    """
    offset = torch.zeros((), device=x.device) if bias is None else bias.double()
    exact = x.double() @ layer.weight.T + offset
    size = x.double().abs() @ layer.weight.abs().T + offset.abs()
    additions = (layer.in_features + 40) * 2.0**-24
    bound = (torch.finfo(x.dtype).eps + additions) * size
    return (got - exact).abs() / (bound + _last_place(x.dtype, exact.abs() + bound))


def _rounded(x: Tensor, bits: int, layer: Layer) -> tuple[Tensor, Tensor]:
    """What the kernels make of x, and the most that this changes; like x, float64.

    As lwquant.ops.activations says, but divided as they do: torch divides by a number, and a number
    by a tensor, by multiplying with a rounded inverse.
    """
    size = span_size(layer.in_features, layer.scheme.group_size)
    spans = F.pad(x.float(), (0, -layer.in_features % size)).unflatten(-1, (-1, size))
    largest = spans.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_RANGE)
    steps = torch.full_like(largest, LARGEST[bits])
    integers = (spans * (steps / largest)).round()
    values = integers.double() * (largest / steps).double()
    half_steps = (0.51 / LARGEST[bits] * largest.double()).expand_as(values)
    return tuple(each.flatten(-2)[:, : layer.in_features] for each in (values, half_steps))


def _last_place(dtype: torch.dtype, size: Tensor) -> Tensor:
    """What rounding a number of that size to a dtype may change."""
    found = torch.finfo(dtype)
    return found.eps / 2 * size + found.tiny * found.eps
