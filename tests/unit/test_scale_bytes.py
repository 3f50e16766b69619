"""Scales of one byte: every pattern, the window of a row, and what is refused."""

import pytest
import torch

from lwquant.ops.scale_bytes import decode_scales, encode_scales, window_floor
from lwquant.quantizers.grid import fit_grid, in_window, storable_scale
from lwquant.scheme import QuantScheme

BYTES, HALVES = QuantScheme(3, 16, scale_bits=8), QuantScheme(3, 16)


def test_a_byte_means_an_exponent_and_four_bits_of_mantissa_above_the_row_s_first():
    for start in (1, 7, 15):
        row = torch.cat([torch.tensor([start]), torch.arange(256)]).to(torch.uint8)[None]
        got = decode_scales(row)[0].double()
        wanted = [2.0 ** (start - 15 + byte // 16) * (1 + byte % 16 / 16) for byte in range(256)]
        assert got.tolist() == wanted
        assert torch.equal(encode_scales(got[None].half()), row)


def test_rows_with_little_range_are_written_too():
    scales = torch.tensor([[2.0**-14, 2.0**-13], [1.5, 2.0**-14], [2.0, 1.0]]).half()
    assert torch.equal(decode_scales(encode_scales(scales)), scales)


@pytest.mark.parametrize(
    "row", [[1.0, 2.0**-14 * 1.01], [1 + 1 / 32, 1.0], [4.0, 2.0**-14], [-1.0, 1.0], [0.0, 1.0]]
)
def test_a_scale_that_no_byte_stands_for_is_refused(row):
    with pytest.raises(ValueError, match="none that eight bits can hold"):
        encode_scales(torch.tensor([row]).half())
    with pytest.raises(ValueError, match="none that eight bits can hold"):
        encode_scales(torch.tensor([[1.0, float("inf")]]).half())


def test_storable_scales_are_the_nearest_of_all_that_can_be_written():
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    every = decode_scales(torch.cat([torch.tensor([1]), torch.arange(256)]).byte()[None])[0]
    nearest = (scales[:, None].double() - every.double()).abs().min(1)
    got = storable_scale(scales, BYTES)
    assert torch.equal((got.double() - scales.double()).abs(), nearest.values)
    assert ((got - scales).abs() <= scales / 32).all()
    assert torch.equal(storable_scale(scales, HALVES), scales.half().float())
    ends = torch.tensor([0.0, 1e-9, 65504.0, 65520.0, 1e30])
    assert storable_scale(ends, HALVES).tolist() == [1.0, 2.0**-14, 65504.0, torch.inf, torch.inf]
    assert storable_scale(ends, BYTES).tolist() == [1.0, 2.0**-14, torch.inf, torch.inf, torch.inf]


@pytest.mark.parametrize("largest", [1.9375, 2.0, 3.0, 60000.0, 0.01])
def test_the_window_of_a_row_reaches_down_as_far_as_its_bytes(largest):
    top = storable_scale(torch.tensor([[largest]]), BYTES)
    floor = window_floor(top)
    written = torch.cat([top, floor], dim=1).half()
    assert torch.equal(decode_scales(encode_scales(written)), written)
    if floor > 2.0**-14:
        with pytest.raises(ValueError, match="eight bits"):
            encode_scales(torch.cat([top, floor / 2], dim=1).half())
        assert floor <= top / 2**14  # what is lifted is nothing beside the largest


def test_a_row_of_very_different_groups_is_fitted_with_scales_that_can_be_written():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 48, generator=generator)
    weight[2, :16] *= 1e5
    weight[3, 16:32] = 0
    grid = fit_grid(weight, BYTES)
    encode_scales(grid.scales.half())
    lifted = in_window(fit_grid(weight, HALVES).scales, BYTES) != fit_grid(weight, HALVES).scales
    assert lifted[2].any() and not lifted[[0, 1, 4, 5]].any()
    rounded = grid.dequantize(grid.round(weight))
    assert (rounded - weight)[2, 16:].abs().max() <= weight[2].abs().max() * 2**-14
