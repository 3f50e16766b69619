"""The bnb quantizer against bitsandbytes' own dequantized weights, and against the definitions."""

import sys
from dataclasses import replace
from types import ModuleType

import bitsandbytes.functional
import pytest
import torch
from oracles import nearest_values

import lwquant
from lwquant.codebooks import CODEBOOKS
from lwquant.errors import LwquantError
from lwquant.quantizers import bnb, rtn
from lwquant.quantizers import bnb as bnb_quantizer
from lwquant.recipe import Recipe, load_recipe
from lwquant.rounding import rounding_of
from lwquant.scheme import WHOLE_ROW, QuantScheme

bnb_file = sys.modules[bnb_quantizer.__module__]
INT8_ROWS = QuantScheme(8, WHOLE_ROW, symmetric=True)
HALF = 2.0**-11  # relative error of storing a scale as float16
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS)


def random_weight(out_features=12, in_features=256):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(3))
    return weight * torch.logspace(-2, 1, out_features)[:, None]


@every_codebook
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_four_bits_are_bitsandbytes_own_up_to_the_storing_of_absmax(codebook, block_size):
    weight = random_weight()
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=codebook
    )
    wanted = bitsandbytes.functional.dequantize_4bit(packed, state)
    got = bnb(weight, None, QuantScheme(4, block_size, codebook=codebook))
    torch.testing.assert_close(got.dequantize(), wanted, rtol=HALF, atol=0)
    own = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(weight.shape)
    assert torch.equal(got.codes, own)


def test_eight_bits_are_the_rows_of_llm_int8_up_to_the_storing_of_absmax():
    weight = random_weight()
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    wanted = bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax)
    got = bnb(weight, None, INT8_ROWS)
    # bitsandbytes divides by 127 as a decimal number of seven digits.
    torch.testing.assert_close(got.dequantize(), wanted, rtol=HALF + 1e-6, atol=0)
    assert torch.equal(got.codes.int() - 128, codes.int())
    assert got.zeros.eq(128).all() and got.scales.shape == (12, 1)


@every_codebook
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_codes_are_the_nearest_to_the_stored_scale_in_blocks_that_end_with_the_row(
    codebook, scale_bits
):
    weight = random_weight(in_features=150)  # 64 + 64 + 22
    got = bnb(weight, None, QuantScheme(4, 64, scale_bits=scale_bits, codebook=codebook))
    values = torch.tensor(CODEBOOKS[codebook])
    precision = {8: 2.0**-5, 16: HALF}[scale_bits]
    for group, part in enumerate(weight.split(64, dim=1)):
        absmax, scale = part.abs().amax(1), got.scales[:, group].float()
        assert ((scale - absmax).abs() <= precision * absmax).all()
        codes = got.codes[:, 64 * group : 64 * group + 64].long()
        best = values[nearest_values(part / scale[:, None], CODEBOOKS[codebook])]
        missed = (part / scale[:, None] - values[codes]).abs()
        # With float16 scales codes were chosen for absmax, which is HALF away at most.
        slack = 1e-6 if scale_bits == 8 else 2 * HALF
        assert (missed <= (part / scale[:, None] - best).abs() + slack).all()


def test_eight_bits_in_groups_have_an_absmax_each():
    weight = random_weight(in_features=100)
    got = bnb(weight, None, QuantScheme(8, 64, symmetric=True))
    for group, part in enumerate(weight.split(64, dim=1)):
        step = part.abs().amax(1, keepdim=True) / 127
        error = (got.dequantize()[:, 64 * group : 64 * group + 64] - part).abs()
        assert (error <= step * (0.5 + 127 * HALF)).all()
    rows = bnb(weight, None, INT8_ROWS).dequantize()
    assert (got.dequantize() - weight).norm() < (rows - weight).norm()


@pytest.mark.parametrize(
    "scheme", [INT8_ROWS, *(QuantScheme(4, 32, codebook=name) for name in CODEBOOKS)]
)
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_weights_too_small_for_our_scales_become_no_larger(scheme, scale_bits):
    weight = random_weight(3, 96)
    weight[1] *= 1e-7  # below what float16 holds
    weight[2, :32] *= 1e-7  # and below what 8-bit scales hold beside the row's other groups
    got = bnb(weight, None, replace(scheme, scale_bits=scale_bits))
    own = got.scales.float()[:, torch.arange(96) // scheme.group_size]
    assert ((got.dequantize() - weight).abs() <= 0.5 * own)[1].all()
    assert got.dequantize()[2, :32].abs().max() <= weight[2].abs().max() * 1e-3


def test_rows_in_slices_are_the_same_rows(monkeypatch):
    weight = random_weight()
    schemes = (QuantScheme(4, 64, codebook="nf4"), INT8_ROWS)
    whole = [bnb(weight, None, scheme) for scheme in schemes]
    monkeypatch.setattr(bnb_file, "SLICE_WEIGHTS", 5 * 256)
    for scheme, before in zip(schemes, whole, strict=True):
        assert torch.equal(bnb(weight, None, scheme).codes, before.codes)


def test_plain_rounding_of_ours_has_the_same_codes_and_a_search_for_ranges_fewer_errors():
    weight = random_weight()
    scheme = QuantScheme(4, 64, codebook="nf4")
    theirs, plain = bnb(weight, None, scheme), rtn(weight, None, scheme)
    assert torch.equal(plain.scales, theirs.scales)
    assert (plain.codes != theirs.codes).float().mean() < 1e-3
    searched = rtn(weight, None, scheme, search=True).dequantize()
    assert (searched - weight).norm() < 0.98 * (theirs.dequantize() - weight).norm()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (QuantScheme(4, 64), "no scheme 4b-g64"),
        (QuantScheme(3, 64), "no scheme 3b-g64"),
        (QuantScheme(8, 64), "no scheme 8b-g64"),
        (QuantScheme(4, 48, codebook="nf4"), "nf4-g48: bitsandbytes' block sizes are 32, 64"),
    ],
)
def test_schemes_that_bitsandbytes_has_not_are_refused(scheme, message):
    with pytest.raises(ValueError, match=message):
        bnb(random_weight(), None, scheme)


def test_without_the_package_a_run_ends_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(bnb_file.importlib.util, "find_spec", lambda name: None)
    needed = r"pip install lwquant\[bnb\]"
    with pytest.raises(LwquantError, match=needed):
        bnb(random_weight(), None, INT8_ROWS)
    with pytest.raises(LwquantError, match=needed):
        rounding_of("bnb", "qep")
    for run in (
        lambda: lwquant.quantize(tmp_path / "none", bpw=5, output=tmp_path / "o", recipe="bnb"),
        lambda: lwquant.measure_model(tmp_path / "none", recipe="bnb"),
    ):
        with pytest.raises(LwquantError, match=needed):
            run()
    assert load_recipe("bnb").quantizer == "bnb"  # the recipe itself can be read without it


def test_no_package_that_fetches_kernels_is_imported_with_it(monkeypatch):
    there = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", there)
    with bnb_file._nothing_fetched(), pytest.raises(ImportError):
        import kernels  # noqa: F401
    assert sys.modules["kernels"] is there
    monkeypatch.delitem(sys.modules, "kernels")
    with bnb_file._nothing_fetched():
        pass
    assert "kernels" not in sys.modules


def test_the_shipped_recipe_is_nf4_int8_rows_and_16_bits():
    recipe = load_recipe("bnb")
    assert recipe.schemes() == (
        QuantScheme(4, 64, codebook="nf4"),
        INT8_ROWS,
        QuantScheme(16),
    )
    assert recipe.scheme(4) == recipe.schemes()[0] and recipe.scheme(8) == INT8_ROWS
    assert replace(recipe, codebook="fp4").scheme(4).label == "fp4-g64"
    assert Recipe(codebook="nf4", quantizer="gptq").schemes()[2].label == "nf4-g64-s8"
