"""A layer keeps what it found out about the last shape: nothing else may be taken for granted."""

import threading

import pytest
import torch
from test_quantized_linear import random_weight

from lwquant import ops
from lwquant.errors import LwquantError
from lwquant.nn.linear import QuantizedLinear
from lwquant.ops import native, tiles
from lwquant.scheme import QuantScheme

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="without kernels there are no tiles")

INPUTS, OUTPUTS = 96, 24


def fresh(bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    weight = random_weight(QuantScheme(3, 32), OUTPUTS, INPUTS)
    layer = QuantizedLinear.from_weight(weight, torch.randn(OUTPUTS) if bias else None)
    return layer.requires_grad_(False)


def called(*shape: int, bias: bool = True) -> QuantizedLinear:
    """A layer that has had inputs of this shape."""
    layer = fresh(bias)
    layer(torch.randn(*shape, INPUTS))
    return layer


@pytest.fixture
def short(monkeypatch):
    """Shapes of the results that were made the short way."""
    shapes = []
    real = tiles.empty_like

    def count(like):
        shapes.append(tuple(like.shape))
        return real(like)

    monkeypatch.setattr(tiles, "empty_like", count)
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3), (70,)])
def test_the_second_call_gives_the_same_to_the_bit(short, shape, bias):
    x = torch.randn(*shape, INPUTS)
    layer = fresh(bias)
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    assert second.stride() == first.stride()
    assert second.shape == (*shape, OUTPUTS)
    assert second.data_ptr() != first.data_ptr()
    expected = not native.panels_are_faster(x.numel() // INPUTS)
    assert short == [second.shape] * expected


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e37])
@pytest.mark.parametrize("n_tokens", [1, 16, 70])
def test_bf16_gives_what_float32_gives_rounded(short, n_tokens, scale):
    x = (scale * torch.randn(n_tokens, INPUTS)).bfloat16()
    layer = fresh(bias=False)
    first, second = layer(x), layer(x)
    wanted = fresh(bias=False)(x.float()).bfloat16()
    assert first.dtype == second.dtype == torch.bfloat16
    for found in (first, second):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    if ops.isa() != "reference":  # where torch converts faster it does
        in_panels = ops.weights_rounded_to(3, False, n_tokens, 16, True) != ""
        assert short == [second.shape] * (n_tokens <= 16 or in_panels)


@torch.no_grad()
def test_bf16_results_are_rounded_to_the_nearest_with_ties_to_even():
    # Of inputs of 0 the bias is left: quarters of bf16's last place from 1 on, and NaN of all bits.
    bias = 1 + torch.arange(OUTPUTS) * 2**-9
    bias[3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    layer = fresh()
    layer.bias.data = bias
    x = torch.zeros(1, INPUTS).bfloat16()
    for _ in range(2):
        found, wanted = layer(x), bias.bfloat16()[None]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_other_shapes_get_results_of_their_own(short):
    layer = called(2, 3)
    for shape in ((3, 2), (2, 3), (6,), (0, 3), (6,), (1, 6)):
        x = torch.randn(*shape, INPUTS)
        y = layer(x)
        assert y.shape == (*shape, OUTPUTS)
        assert torch.equal(y, fresh()(x))
    assert short == [(6, OUTPUTS)]  # what is empty is not kept


@torch.no_grad()
@pytest.mark.parametrize("shape", [(INPUTS - 1,), (INPUTS + 1,), (2, 48)])
def test_inputs_of_another_layer_are_still_refused(shape):
    with pytest.raises((LwquantError, ValueError)):
        called(1)(torch.randn(1, *shape))


@torch.no_grad()
def test_strides_and_dtypes_are_looked_at_each_time():
    layer = called(4)
    for x in (torch.randn(INPUTS, 4).T, torch.randn(4, 2 * INPUTS)[:, ::2]):
        assert torch.equal(layer(x), fresh()(x.contiguous()))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4, INPUTS).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, fresh()(x))
    with pytest.raises(LwquantError, match="float64"):
        layer(torch.randn(4, INPUTS, dtype=torch.float64))
    assert layer(torch.empty(4, INPUTS, device="meta")).is_meta


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [
        torch.ones(OUTPUTS, dtype=torch.bfloat16),
        torch.arange(2.0 * OUTPUTS)[::2],
        torch.arange(1.0 * OUTPUTS).flip(0),
    ],
)
def test_another_bias_in_the_same_parameter_counts(other):
    layer = called(4)
    layer.bias.data = other
    x = torch.randn(4, INPUTS)
    wanted = fresh(bias=False)(x) + other
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_a_bias_of_another_size_is_still_refused():
    layer = called(4)
    layer.bias.data = torch.ones(OUTPUTS - 1)
    with pytest.raises(LwquantError, match="bias must be"):
        layer(torch.randn(4, INPUTS))


@torch.no_grad()
def test_nan_and_infinity_take_their_own_way_each_time():
    layer, x = called(2), torch.randn(2, INPUTS)
    for value in (torch.nan, torch.inf):
        x[1, 5] = value
        y = layer(x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[0], fresh()(x)[0])
        assert y[0].isfinite().all()


def test_gradients_are_not_lost():
    layer = called(2)
    x = torch.randn(2, INPUTS, requires_grad=True)
    layer(x).sum().backward()
    wanted = layer.dequantize().sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)
    layer.bias.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((OUTPUTS,), 2.0))


@torch.no_grad()
def test_activation_bits_may_change_at_any_time():
    x = torch.randn(2, INPUTS)
    layer, other = called(2), fresh()
    other.activation_bits = layer.activation_bits = 8
    assert torch.equal(layer(x), other(x))
    layer.activation_bits = 4
    with pytest.raises(ValueError, match="activation_bits=4"):
        layer(x)


def test_threads_of_different_shapes_do_not_meet():
    layer = fresh()
    inputs = [torch.randn(n, INPUTS) for n in (1, 2, 3, 8, 70, 130)]
    with torch.no_grad():
        wanted = [fresh()(x) for x in inputs]
    wrong = []

    @torch.no_grad()
    def work(x, expected):
        for _ in range(500):
            y = layer(x)
            if y.shape != expected.shape or not torch.equal(y, expected):
                wrong.append(len(x))

    threads = [
        threading.Thread(target=work, args=each) for each in zip(inputs, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_compiled_layers_have_no_graph_breaks_after_a_call():
    layer, x = called(2), torch.randn(2, INPUTS)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    x = torch.randn(5, INPUTS)
    assert torch.equal(compiled(x), layer(x))


def test_results_after_a_call_in_inference_mode_may_be_saved_for_backward():
    layer, x = fresh(), torch.randn(2, INPUTS)
    with torch.inference_mode():
        layer(x)
    y = layer(x)
    assert not y.is_inference()
    weight = torch.ones(OUTPUTS, requires_grad=True)
    (y * weight).sum().backward()
    assert torch.equal(weight.grad, y.sum(0))
