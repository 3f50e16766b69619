"""Which linears may have int8 activations: by the error in their outputs, worked out here anew."""

import pytest
import torch
from torch import Tensor

from lwquant.activation_choice import INVISIBLE, SAMPLED_TOKENS, activation_bits, sample_of
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme


def layer() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator)
    return torch.randn(200, 256, generator=generator), weight


def added_share(inputs: Tensor, weight: Tensor, scheme: QuantScheme) -> float:
    """Squared error that int8 inputs add, over that of the rounded weight; one value at a time."""
    rounded = rtn(weight, None, scheme).dequantize()
    of_weights = of_activations = 0.0
    for x in inputs.double():
        spans = []
        for span in x.split(64):
            step = span.abs().max() / 127
            spans.append((span / step).round() * step if step > 0 else span)
        of_activations += ((rounded.double() @ (torch.cat(spans) - x)) ** 2).sum().item()
        of_weights += (((rounded - weight).double() @ x) ** 2).sum().item()
    return of_activations / of_weights


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("massive", [1.0, 30.0])
def test_eight_bits_are_taken_where_they_add_little_to_the_error(bits, massive):
    inputs, weight = layer()
    inputs[:, 3] *= massive
    scheme = QuantScheme(bits, 64)
    share = added_share(inputs, weight, scheme)
    assert not 0.9 * INVISIBLE < share < 1.1 * INVISIBLE  # else the next line says little
    chosen = activation_bits(inputs, weight, rtn(weight, None, scheme))
    assert chosen == (8 if share <= INVISIBLE else 16)


def test_both_choices_occur():
    inputs, weight = layer()
    chosen = [
        activation_bits(inputs, weight, rtn(weight, None, QuantScheme(bits, 64)))
        for bits in (2, 3, 6, 8)
    ]
    assert chosen == [8, 8, 16, 16]


@pytest.mark.parametrize("scheme", [QuantScheme(2, 48), QuantScheme(4, 64, codebook="nf4")])
def test_layers_without_integer_kernels_keep_their_inputs(scheme):
    inputs, weight = layer()
    assert activation_bits(0 * inputs, weight, rtn(weight, None, scheme)) == 16


def test_a_sample_is_spread_over_all_tokens():
    inputs = torch.arange(4.0 * SAMPLED_TOKENS).reshape(2, -1, 1).expand(-1, -1, 3)
    sample = sample_of(inputs)
    assert sample.shape == (SAMPLED_TOKENS, 3)
    assert sample[:, 0].tolist() == [4.0 * k for k in range(SAMPLED_TOKENS)]
    assert torch.equal(sample_of(inputs[0, :5]), inputs[0, :5])
