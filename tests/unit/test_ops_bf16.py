"""Many tokens in bf16, on AMX: within its bound, and where it is not used.

The bound: half a step of bf16's 8 bits for each weight and each input, the float32 arithmetic that
finds a weight as (256 + code) − (256 + zero), and one float32 addition for every input. Processors
without AMX run the same on emulated registers, see test_kernel_properties.py.
"""

import pytest
import torch
from test_ops_linear import (
    Layer,
    random_inputs,
    random_layer,
    random_outliers,
    stored,
)
from torch import Tensor

from lwquant import ops
from lwquant.ops.reference import linear_reference

FEWEST = {16: 48, 8: 64}  # tokens, by the bits that activations have otherwise
STEP = 2.0**-7  # relative, at most

pytestmark = [
    pytest.mark.skipif("amx" not in ops.available_isas(), reason="needs AMX"),
    pytest.mark.usefixtures("amx"),
]


def bound(layer: Layer, x: Tensor, exact: Tensor) -> Tensor:
    codes, zeros = layer.codes.double(), layer.zero_points.double()[:, layer.group]
    scales = layer.scales.double()[:, layer.group]
    weight, x = ((codes - zeros) * scales).abs(), x.double().abs()
    of_weight = weight * STEP / 2 + scales.abs() * 2.0**-14
    of_input = x * STEP / 2 + 2.0**-126
    additions = x.shape[1] * 2.0**-24 * (x @ weight.T + exact.abs())
    return (x + of_input) @ of_weight.T + of_input @ weight.T + additions


def check(layer: Layer, x: Tensor, activation_bits: int) -> None:
    exact, _ = layer.oracle(x)
    got = layer.linear(x, activation_bits=activation_bits)
    worst = ((got.double() - exact).abs() / bound(layer, x, exact)).max().item()
    assert worst <= 1, f"{worst:.3g} times the bound"
    if len(x) >= FEWEST[activation_bits]:
        # It is bf16: integers of 16 bits would be a hundred times closer.
        error = (got.double() - exact).norm() / exact.norm()
        assert 0.05 * STEP < error < 2 * STEP


@pytest.mark.parametrize("zeros", [{}, {"fine": True}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("group_size", [32, 96, 128, 10_000])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_many_tokens_are_within_the_bound_of_bf16(bits, group_size, zeros):
    for out_features, in_features in [(33, 1000), (7, 65), (64, 576)]:
        layer = random_layer(out_features, in_features, bits, group_size, bias=True, **zeros)
        for n in (48, 49, 64, 97):
            check(layer, random_inputs(n, in_features), 16)


def test_more_tokens_and_inputs_than_fit_at_a_time():
    for in_features, n in ((4096, 130), (4097, 230), (9000, 170), (600, 900)):
        layer, x = random_layer(70, in_features, 3, 64, bias=True), random_inputs(n, in_features)
        check(layer, x, 8)
        got = layer.linear(x.bfloat16(), activation_bits=8)
        assert torch.equal(got, layer.linear(x.bfloat16().float(), activation_bits=8).bfloat16())


@pytest.mark.parametrize("bits", [7, 8])
def test_wide_codes_keep_integers_with_16_bit_activations(bits):
    layer = random_layer(40, 192, bits, 64)
    x = random_inputs(FEWEST[8], 192)
    assert torch.equal(layer.linear(x)[:8], layer.linear(x[:8]))
    check(layer, x, 8)


@pytest.mark.parametrize("bits", [7, 8])
def test_wide_codes_are_rounded_where_inputs_are(bits):
    layer = random_layer(40, 192, bits, 64)
    x = random_inputs(FEWEST[8], 192).bfloat16()
    exact, _ = layer.oracle(x)
    got = layer.linear(x)
    assert torch.equal(got, layer.linear(x.float(), activation_bits=8).bfloat16())
    assert not torch.equal(got, layer.linear(x.float()).bfloat16())
    # All roundings together, of weights and results: about what rounding the results takes alone.
    results = (exact.bfloat16().double() - exact).norm()
    assert results < (got.double() - exact).norm() < 2 * results


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_one_token_fewer_than_many_is_as_few_are(activation_bits):
    layer = random_layer(40, 192, 4, 64)
    x = random_inputs(FEWEST[activation_bits], 192)
    many, fewer, few = (layer.linear(x[:n], activation_bits=activation_bits) for n in (None, -1, 8))
    assert torch.equal(fewer[:8], few)
    assert not torch.equal(many[:8], few)


def test_a_token_does_not_depend_on_the_others():
    layer = random_layer(40, 4200, 4, 64, bias=True)
    x = random_inputs(200, 4200)
    whole = layer.linear(x)
    for part in (slice(0, 64), slice(3, 100), slice(120, 200)):
        assert torch.equal(layer.linear(x[part]), whole[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_that_are_bf16_lose_nothing(dtype):
    layer = random_layer(40, 320, 4, 64)
    x = random_inputs(FEWEST[16], 320).to(dtype)
    exact, _ = layer.oracle(x)
    got = layer.linear(x)
    assert got.dtype == dtype
    rounding = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((got.double() - exact).abs() <= bound(layer, x, exact) + rounding).all()


def test_infinity_and_nan_stay_with_their_tokens():
    layer = random_layer(40, 128, 4, 64)
    x = random_inputs(FEWEST[16], 128)
    x[0, 7], x[1, 70], x[2, 3] = float("inf"), float("nan"), -float("inf")
    x[3, 5] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # every bit of NaN set
    expected = linear_reference(x, *layer.stored, None, 4, 64)
    assert not expected[:4].isfinite().any() and expected[4:].isfinite().all()
    got = layer.linear(x)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0.05, atol=0.5)
    in_bf16 = layer.linear(x.bfloat16()).float()
    torch.testing.assert_close(in_bf16, expected, equal_nan=True, rtol=0.05, atol=0.5)


def test_outliers_are_added_in_float32():
    layer = random_layer(33, 1000, 3, 64)
    outliers = random_outliers(33, 1000, 600)
    x = random_inputs(FEWEST[16], 1000)
    without = layer.linear(x)
    dense = outliers.added_to(torch.zeros(33, 1000))
    got = layer.linear(x, *stored(outliers, 1000))
    torch.testing.assert_close(got, without + x @ dense.T, rtol=1e-5, atol=1e-4)
    narrow = random_inputs(600, 1000).bfloat16()  # more than are taken at a time
    got = layer.linear(narrow, *stored(outliers, 1000))
    assert torch.equal(got, layer.linear(narrow.float(), *stored(outliers, 1000)).bfloat16())
    assert torch.equal(got[-80:], layer.linear(narrow[-80:], *stored(outliers, 1000)))
