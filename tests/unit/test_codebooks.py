"""Codebooks against their definitions, bitsandbytes, and trying every value."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from oracles import nearest_values
from scipy.stats import norm

from lwquant.codebooks import CODEBOOKS, nearest_codes, values_of

every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS)
# The outermost quantile of QLoRA's definition: the mean of 1 − 1/32 and 1 − 1/30.
OUTERMOST = 1 - (1 / 32 + 1 / 30) / 2


def test_nf4_is_quantiles_of_the_normal_distribution_and_zero():
    def quantiles(n):  # n of them up to the outermost, without the median
        shares = [0.5 + (OUTERMOST - 0.5) * k / n for k in range(1, n + 1)]
        return (norm.ppf(shares) / norm.ppf(OUTERMOST)).tolist()

    wanted = [*(-q for q in reversed(quantiles(7))), 0.0, *quantiles(8)]
    assert CODEBOOKS["nf4"] == pytest.approx(wanted, abs=1e-6)


def test_fp4_is_a_float_of_one_mantissa_bit_whose_least_value_is_a_sixteenth():
    for code, value in enumerate(CODEBOOKS["fp4"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        # bitsandbytes orders the exponents 0, 3, 2, 1 and gives the smallest a step of its own.
        size = {0: 0.0625 * mantissa, 1: 8 + 4 * mantissa, 2: 4 + 2 * mantissa, 3: 2 + mantissa}
        assert value == pytest.approx((-1) ** sign * size[exponent] / 12)


@every_codebook
def test_the_values_are_those_of_bitsandbytes(codebook):
    ours = values_of(torch.arange(16), codebook)
    assert torch.equal(ours, get_4bit_type(codebook, device="cpu"))


@every_codebook
def test_the_nearest_value_is_found_among_all(codebook):
    values = torch.cat([torch.linspace(-1.5, 1.5, 3001), torch.tensor([0.0, -1.0, 1.0, 1e9])])
    best = torch.tensor(CODEBOOKS[codebook])[nearest_values(values, CODEBOOKS[codebook])]
    found = values_of(nearest_codes(values, codebook), codebook)
    torch.testing.assert_close((found - values).abs(), (best - values).abs(), rtol=0, atol=1e-6)
    # Values of the table are their own nearest ones.
    table = values_of(torch.arange(16), codebook)
    assert torch.equal(values_of(nearest_codes(table, codebook), codebook), table)
