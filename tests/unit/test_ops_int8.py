"""Many tokens in int8, on AMX, of layers that allow it: what the definition gives, and where.

The oracle rounds one weight at a time, in the sixteen bits that the kernel has for it. Processors
without AMX run the same on emulated registers, see test_kernel_properties.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
from test_ops_linear import Layer, random_inputs, random_layer, random_outliers, stored
from torch import Tensor

from lwquant import ops
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.packed import set_activation_bits
from lwquant.types import QuantizedWeight

FEWEST = 32  # tokens
SPAN = 256  # inputs that share a scale

pytestmark = [
    pytest.mark.skipif("amx" not in ops.available_isas(), reason="needs AMX"),
    pytest.mark.usefixtures("amx"),
]


def run(layer: Layer, x: Tensor, *outliers: Tensor, activation_bits: int = 8) -> Tensor:
    out_features, in_features = layer.codes.shape
    tiles = ops.make_tiles(layer.scheme, in_features, *layer.stored, int8_weights=True)
    return ops.linear_tiled(
        x, tiles, layer.bias, out_features, *outliers, activation_bits=activation_bits
    )


def int8_steps(layer: Layer) -> tuple[Tensor, Tensor]:
    """Of every weight: how many steps, and how long they are, (out, in) float64."""
    steps, sizes = [], []
    scales, zeros = (
        layer.scales.double()[:, layer.group],
        layer.zero_points.double()[:, layer.group],
    )
    spans = (t.split(SPAN, dim=1) for t in (layer.codes.double(), scales, zeros))
    for code, scale, zero in zip(*spans, strict=True):
        highest = (2**layer.bits - 1 - zero) * scale
        reach = torch.maximum((zero * scale).abs(), highest.abs()).amax(1, keepdim=True)
        per_step = 127 * 256 / reach
        if layer.bits <= 6:
            product = code * (scale * per_step).round()
        else:  # the middle is 0, and the factor has seven bits more of which half is rounded off
            middle = 2 ** (layer.bits - 1)
            code, zero = code - middle, zero - middle
            factor = (scale * per_step * middle).round().clamp(max=2**15 - 1)
            product = (code * 2 ** (16 - layer.bits) * factor / 2**15 + 0.5).floor()
        in_sixteen_bits = product + (128 - scale * zero * per_step).round()
        steps.append((in_sixteen_bits / 256).floor())
        sizes.append((reach / 127).expand_as(code))
    return torch.cat(steps, 1), torch.cat(sizes, 1)


def int8_inputs(x: Tensor) -> Tensor:
    rounded = []
    for span in x.double().split(SPAN, dim=-1):
        step = span.abs().amax(-1, keepdim=True).clamp_min(2.0**-100) / 127
        rounded.append((span / step).round() * step)
    return torch.cat(rounded, -1)


def oracle(layer: Layer, x: Tensor) -> Tensor:
    steps, sizes = int8_steps(layer)
    assert steps.abs().max() <= 127
    bias = 0.0 if layer.bias is None else layer.bias.double()
    return int8_inputs(x) @ (steps * sizes).T + bias


def check(layer: Layer, x: Tensor) -> None:
    """Closer to the oracle than to the exact products, by far."""
    exact, _ = layer.oracle(x)
    wanted, got = oracle(layer, x), run(layer, x).double()
    rounding = (wanted - exact).norm()
    assert 1e-3 < rounding / exact.norm() < 0.03
    # float32 tips a few roundings over, of weights or inputs that lie halfway between two steps.
    assert (got - wanted).norm() < 0.05 * rounding


@pytest.mark.parametrize("zeros", [{}, {"fine": True}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("group_size", [32, 96, 128, 320, 10_000])
@pytest.mark.parametrize("bits", range(2, 9))
def test_many_tokens_are_what_int8_makes_of_them(bits, group_size, zeros):
    for out_features, in_features in [(33, 1000), (7, 65), (64, 576), (48, 300)]:
        layer = random_layer(out_features, in_features, bits, group_size, bias=True, **zeros)
        for n in (32, 33, 64, 97):
            check(layer, random_inputs(n, in_features))


def test_more_tokens_and_inputs_than_fit_at_a_time():
    for in_features, n, group_size in ((4096, 270, 64), (8200, 140, 96), (9000, 170, 10_000)):
        layer = random_layer(70, in_features, 3, group_size, bias=True)
        x = random_inputs(n, in_features)
        check(layer, x)
        got = run(layer, x.bfloat16())
        assert torch.equal(got, run(layer, x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("bits", [3, 8])
def test_rows_of_zeros_and_inputs_of_any_size(bits):
    layer = random_layer(40, 600, bits, 64)
    x = random_inputs(FEWEST, 600)
    wanted = oracle(layer, x)
    layer.scales[3] = 0
    wanted[:, 3] = 0
    sizes = torch.ones(FEWEST, 1, dtype=torch.float64)
    sizes[:3] = torch.tensor([[2.0**-100], [2.0**100], [0.0]])
    got = run(layer, (x * sizes).float()).double()
    assert not got[:, 3].any() and not got[2].any()
    got[[0, 1]] /= sizes[[0, 1]]
    wanted[2] = 0
    assert (got - wanted).norm(dim=1).max() < 1e-3 * wanted.norm(dim=1).max()


def test_where_it_does_not_run():
    layer, x = random_layer(40, 192, 4, 64), random_inputs(FEWEST, 192)
    many = run(layer, x)
    few = layer.linear(x[:8], activation_bits=8)
    assert not torch.equal(many[:8], few)
    # One token fewer, tiles that do not allow it, other activations.
    assert torch.equal(run(layer, x[:-1])[:8], few)
    assert torch.equal(layer.linear(x, activation_bits=8)[:8], few)
    assert torch.equal(run(layer, x, activation_bits=16), layer.linear(x))


def test_what_is_said_of_a_call_is_what_runs():
    for bits, n_tokens, activation_bits in ((4, 32, 8), (4, 31, 8), (4, 64, 16), (5, 64, 8)):
        said = ops.weights_rounded_to(bits, True, n_tokens, activation_bits, False)
        layer, x = random_layer(40, 192, bits, 64), random_inputs(n_tokens, 192)
        exact, _ = layer.oracle(x)
        got = run(layer, x, activation_bits=activation_bits).double()
        as_int8 = (got - oracle(layer, x)).norm() < 0.05 * (got - exact).norm()
        assert as_int8 == (said == "int8")
    assert ops.weights_rounded_to(4, False, 64, 8, False) == "bf16"
    assert ops.weights_rounded_to(4, False, 32, 8, False) == ""


def test_a_layer_that_allows_it_runs_it():
    layer, x = random_layer(40, 192, 4, 64), random_inputs(FEWEST, 192)
    weight = QuantizedWeight(
        layer.scheme, layer.codes, layer.scales, layer.zero_bytes, activation_bits=8
    )
    for allowed in (True, False):
        module = QuantizedLinear.from_weight(replace(weight, int8_weights=allowed), None)
        wanted = run(layer, x) if allowed else layer.linear(x, activation_bits=8)
        for _ in range(2):
            assert torch.equal(module(x), wanted)
            module = copy.deepcopy(module)
        module.activation_bits = 16
        assert torch.equal(module(x), layer.linear(x))


def test_the_user_may_allow_and_forbid_it():
    layer, x = random_layer(40, 192, 8, 64), random_inputs(FEWEST, 192)
    weight = QuantizedWeight(layer.scheme, layer.codes, layer.scales, layer.zero_bytes)
    module = torch.nn.Sequential(QuantizedLinear.from_weight(weight, None))
    for bits, allowed, wanted in (
        (8, None, layer.linear(x, activation_bits=8)),
        (8, True, run(layer, x)),
        (8, None, run(layer, x)),
        (16, None, layer.linear(x)),
        (8, False, layer.linear(x, activation_bits=8)),
    ):
        set_activation_bits(module, bits, int8_weights=allowed)
        assert torch.equal(module(x), wanted)
    with pytest.raises(ValueError, match="int8 weights need activations of 8 bits, not 16"):
        set_activation_bits(module, 16, int8_weights=True)
    assert module[0].activation_bits == 8


def test_a_token_does_not_depend_on_the_others():
    layer = random_layer(40, 8400, 4, 64, bias=True)
    x = random_inputs(300, 8400)
    whole = run(layer, x)
    for part in (slice(0, 64), slice(3, 100), slice(120, 300)):
        assert torch.equal(run(layer, x[part]), whole[part])


def test_infinity_and_nan_leave_int8():
    layer = random_layer(40, 320, 4, 64)
    x = random_inputs(40, 320)
    x[3, 300], x[4, 7] = float("inf"), float("nan")
    for inputs in (x, x.bfloat16()):
        got, exact = run(layer, inputs), layer.oracle(inputs.float())[0]
        assert not got[3:5].isfinite().any()
        rest = [t for t in range(40) if t not in (3, 4)]
        torch.testing.assert_close(got[rest].double(), exact[rest], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_scales_of_either_sign(bits):
    layer = random_layer(40, 600, bits, 64)
    layer.scales[::3] *= -1
    check(layer, random_inputs(FEWEST, 600))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", [0, 2, 3])
def test_a_scale_that_is_no_number_is_not_lost(scale, group, bits):
    layer = random_layer(40, 320, bits, 64)
    layer.scales[7, group] = scale
    got = run(layer, random_inputs(FEWEST, 320))
    assert not got[:, 7].isfinite().any()
    assert got[:, :7].isfinite().all() and got[:, 8:].isfinite().all()


def test_outliers_are_added_in_float32():
    layer = random_layer(33, 1000, 3, 64)
    outliers = random_outliers(33, 1000, 600)
    x = random_inputs(FEWEST, 1000)
    dense = outliers.added_to(torch.zeros(33, 1000))
    got = run(layer, x, *stored(outliers, 1000))
    torch.testing.assert_close(got, run(layer, x) + x @ dense.T, rtol=1e-5, atol=1e-4)
    narrow = x.bfloat16()
    got = run(layer, narrow, *stored(outliers, 1000))
    assert torch.equal(got, run(layer, narrow.float(), *stored(outliers, 1000)).bfloat16())
