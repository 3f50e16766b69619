"""What int8 makes of weights and inputs, a value at a time, and where it may be used."""

import math
from dataclasses import replace

import pytest
import torch

from lwquant.activation_choice import INVISIBLE, activation_bits, takes_int8_weights
from lwquant.ops.int8_weights import SPAN, int8_inputs, int8_weight
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import Outliers

SCHEMES = [
    QuantScheme(2, 64),
    QuantScheme(3, 96, fine_zeros=True),
    QuantScheme(4, 1000, symmetric=True),
]


def weight_and_inputs(in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, in_features, generator=generator)
    return weight, torch.randn(100, in_features, generator=generator)


@pytest.mark.parametrize("in_features", [100, 256, 300])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_a_weight_is_a_number_of_steps_of_its_span(scheme, in_features):
    quantized = rtn(weight_and_inputs(in_features)[0], None, scheme)
    got = int8_weight(quantized)
    top = 2**scheme.bits - 1
    for row in range(6):
        for first in range(0, in_features, SPAN):
            inputs = range(first, min(first + SPAN, in_features))
            groups = {k // scheme.group_size for k in inputs}
            reach = 0.0
            for group in groups:
                zero = float(quantized.zero_points[row, group])
                scale = float(quantized.scales[row, group])
                reach = max(reach, abs(zero * scale), abs((top - zero) * scale))
            for k in inputs:
                group = k // scheme.group_size
                zero = float(quantized.zero_points[row, group])
                plain = (int(quantized.codes[row, k]) - zero) * float(quantized.scales[row, group])
                steps = got[row, k].item() / (reach / 127)
                assert steps == pytest.approx(round(steps), abs=1e-3) and abs(steps) < 127.5
                assert abs(steps - plain / (reach / 127)) <= 0.501


def test_outliers_are_not_in_it():
    quantized = rtn(weight_and_inputs(300)[0], None, QuantScheme(3, 64))
    outliers = Outliers(
        torch.tensor([30.1, -0.013]).half(),
        torch.tensor([7, 299]),
        torch.tensor([0, 0, 0, 1, 1, 1, 2]),
    )
    scheme = replace(quantized.scheme, outliers=2)
    got = int8_weight(replace(quantized, scheme=scheme, outliers=outliers))
    assert torch.equal(got, int8_weight(quantized))


def test_a_row_of_zeros_stays_zero():
    quantized = rtn(torch.zeros(2, 100), None, QuantScheme(3, 64))
    quantized.scales[:] = 0
    assert not int8_weight(quantized).any()


def test_inputs_share_a_step_with_their_span_only():
    x = torch.tensor([[100.0, 0.3] + [0.0] * (SPAN - 2) + [0.1, 0.0301]])
    got = int8_inputs(x)
    assert got[0, 0] == 100.0 and got[0, 1] == 0.0
    assert got[0, SPAN].item() == pytest.approx(0.1, rel=1e-6)
    assert got[0, SPAN + 1].item() == pytest.approx(38 * 0.1 / 127, rel=1e-6)


def share(inputs: torch.Tensor, weight: torch.Tensor, scheme: QuantScheme) -> float:
    """Squared error that int8 adds over that of the rounded weight, summed value by value."""
    quantized = rtn(weight, None, scheme)
    rounded, int8 = quantized.dequantize().double(), int8_weight(quantized).double()
    added = own = 0.0
    for x in inputs.double():
        narrow = []
        for span in x.split(SPAN):
            step = span.abs().max() / 127
            narrow.append((span / step).round() * step)
        for row in range(len(weight)):
            exact = float(rounded[row] @ x)
            added += (float(int8[row] @ torch.cat(narrow)) - exact) ** 2
            own += (exact - float(weight[row].double() @ x)) ** 2
    return added / own


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("massive", [1.0, 8.0, 40.0])
def test_int8_weights_are_taken_where_they_add_little_to_the_error(bits, massive):
    weight, inputs = weight_and_inputs(300)
    inputs[:, 3] *= massive
    scheme = QuantScheme(bits, 64)
    expected = share(inputs, weight, scheme)
    assert abs(math.log(expected / INVISIBLE)) > 0.05  # else the next line says little
    assert takes_int8_weights(inputs, weight, rtn(weight, None, scheme)) == (expected <= INVISIBLE)


def test_they_are_taken_and_refused_apart_from_int8_activations():
    weight, inputs = weight_and_inputs(300)
    found = []
    for bits in (2, 3, 4, 5):
        quantized = rtn(weight, None, QuantScheme(bits, 64))
        chosen = activation_bits(inputs, weight, quantized)
        found.append((chosen, takes_int8_weights(inputs, weight, quantized)))
    assert found[0] == (8, True) and found[-1][1] is False
    # Massive in one span: others of 64 inputs keep their small steps, of 256 few do.
    inputs[:, 70] *= 12
    quantized = rtn(weight, None, QuantScheme(4, 64))
    assert activation_bits(inputs, weight, quantized) == 8
    assert not takes_int8_weights(inputs, weight, quantized)


def test_inputs_of_zeros_are_no_evidence():
    weight, inputs = weight_and_inputs(300)
    quantized = rtn(weight, None, QuantScheme(2, 64))
    assert activation_bits(0 * inputs, weight, quantized) == 16
    assert not takes_int8_weights(0 * inputs, weight, quantized)


def test_what_outliers_multiply_is_not_rounded():
    weight, inputs = weight_and_inputs(300)
    quantized = rtn(weight, None, QuantScheme(4, 64))
    # The only weight of a massive channel is an outlier: rounding that channel changes nothing.
    inputs[:, 3] = 1000.0 * torch.rand(100, generator=torch.Generator().manual_seed(1))
    quantized.codes[:, 3] = 0
    quantized.zeros[:, 0] = 0
    outliers = Outliers(
        torch.ones(1).half(), torch.tensor([3]), torch.tensor([0, 1, 1, 1, 1, 1, 1])
    )
    sparse = replace(quantized, scheme=replace(quantized.scheme, outliers=1), outliers=outliers)
    spread = torch.zeros(100, 300)
    spread[:, 3] = inputs[:, 3]
    target = sparse.dequantize() + 0.002 * torch.randn(6, 300)
    assert activation_bits(spread, target, sparse) == 8
    assert takes_int8_weights(spread, target, sparse)


@pytest.mark.parametrize("scheme", [QuantScheme(2, 48), QuantScheme(4, 64, codebook="nf4")])
def test_layers_without_integer_kernels_have_none(scheme):
    weight, inputs = weight_and_inputs(300)
    assert not takes_int8_weights(0 * inputs, weight, rtn(weight, None, scheme))
