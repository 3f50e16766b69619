"""The compiled rounding loops against plain torch, on every instruction set of this machine."""

from collections.abc import Iterator

import pytest
import torch

from lwquant import ops
from lwquant.ops import rounding
from lwquant.ops.native import fit_groups_native, round_block_native
from lwquant.ops.rounding import BLOCK_COLUMNS, round_block_torch, round_columns
from lwquant.quantizers.grid import (
    END_SHRINKS,
    HALVINGS,
    SHRINKS,
    _fit_slices,
    fit_grid,
    scale_mantissa,
    storable_scale,
    storable_zero,
)
from lwquant.scheme import QuantScheme

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the kernels are not compiled")


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


def make_block(n_columns, n_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(n_columns, n_rows, generator=generator)
    feedback = torch.randn(n_columns, n_columns, generator=generator) / n_columns
    scales = torch.rand(n_columns, n_rows, generator=generator) / 2 + 0.1
    zeros = torch.randint(0, 8, (n_columns, n_rows), generator=generator).float()
    return targets, feedback, scales, zeros


# Rows on both sides of a task's 64, columns up to the most a block has.
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (64, 64), (20, 65), (128, 200), (256, 3)])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_block_of_columns_is_rounded_as_in_torch(isa, shape, with_base):
    targets, feedback, scales, zeros = make_block(*shape)
    base = torch.randn(shape) if with_base else None
    wanted = targets.clone()
    wanted_errors = round_block_torch(wanted, feedback, scales, zeros, 7, base)
    errors = round_block_native(targets, feedback, scales, zeros, 7, base)
    # Sums in another order: a value within rounding error of a tie falls on the other side, and
    # moves what follows.
    same = ((targets - wanted).abs() < 1e-4).double().mean()
    assert same > 0.995
    assert ((errors - wanted_errors).abs() < 1e-3).double().mean() > 0.99
    steps = targets / scales + zeros
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.min() > -0.1 and steps.max() < 7.1


def test_the_lower_triangle_of_the_feedback_is_not_read(isa):
    targets, feedback, scales, zeros = make_block(12, 70)
    spoilt = torch.triu(feedback, 1) + torch.full_like(feedback, torch.nan).tril()
    other = targets.clone()
    round_block_native(targets, feedback, scales, zeros, 7, None)
    round_block_native(other, spoilt, scales, zeros, 7, None)
    assert torch.equal(targets, other)


def test_many_blocks_are_one_long_one(isa, monkeypatch):
    n = 2 * BLOCK_COLUMNS + 13
    targets, feedback, scales, zeros = make_block(n, 30)
    wanted = targets.clone()
    round_block_torch(wanted, feedback, scales, zeros, 7, None)
    round_columns(targets, feedback, scales, zeros, 7)
    assert ((targets - wanted).abs() < 1e-4).double().mean() > 0.99


def test_other_dtypes_go_through_torch(isa, monkeypatch):
    def fail(*args):
        raise AssertionError("the compiled loop was called")

    monkeypatch.setattr(rounding, "round_block_native", fail)
    targets, feedback, scales, zeros = (part.double() for part in make_block(5, 6))
    round_columns(targets, feedback, scales, zeros, 7)
    steps = targets / scales + zeros
    torch.testing.assert_close(steps, steps.round())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", ["whole", "fine", "none"])
@pytest.mark.parametrize("size", [64, 37, 5])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_the_compiled_range_search_finds_grids_as_good_as_torch(isa, bits, zeros, size, scale_bits):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(3 * 40, size, generator=generator)
    rows[0] = 0
    rows[1] = rows[1].abs()  # zero is below the range
    rows[2] *= 1e-9  # scales below float16's smallest
    importance = torch.rand(3, size, generator=generator)
    symmetric = zeros == "none"
    scheme = QuantScheme(bits, size, symmetric, scale_bits, fine_zeros=zeros == "fine")
    mantissa = scale_mantissa(scheme)

    def errors(scales, zeros):
        steps = (rows / scales[:, None] + zeros[:, None]).round().clamp(0, scheme.max_code)
        missed = (steps - zeros[:, None]) * scales[:, None] - rows
        return (missed.square() * importance.repeat(40, 1)).sum(1)

    shrinks, halvings = (END_SHRINKS, HALVINGS) if scheme.fine_zeros else (SHRINKS, None)
    got = fit_groups_native(rows, importance, shrinks, bits, symmetric, mantissa, halvings)
    wanted = _fit_slices(rows, importance, scheme, True)
    assert torch.equal(got[0], storable_scale(got[0], scheme))
    assert torch.equal(got[1], storable_zero(got[1], scheme))
    torch.testing.assert_close(errors(*got), errors(*wanted), rtol=1e-4, atol=1e-12)
    # A different candidate may win by the last digit of its error, nothing else may differ.
    same = (got[0] == wanted[0]) & (got[1] == wanted[1])
    assert same.double().mean() > 0.97


def test_groups_too_large_for_float16_become_infinite_and_are_refused(isa):
    rows = torch.full((1, 8), 1e9)
    scales, _ = fit_groups_native(rows, torch.ones(1, 8), SHRINKS, 2, False, 10)
    assert scales.isinf().all()
    with pytest.raises(ValueError, match="overflows float16"):
        fit_grid(rows, QuantScheme(2, 8))


def test_impossible_sizes_are_refused():
    targets, feedback, scales, zeros = make_block(4, 4)
    with pytest.raises(ValueError, match="contiguous"):
        round_block_native(targets.T, feedback, scales, zeros, 7, None)
    big = make_block(257, 2)
    with pytest.raises(ValueError, match="256"):
        round_block_native(*big, 7, None)
    with pytest.raises(ValueError, match="incomplete"):
        fit_groups_native(torch.ones(3, 8), torch.ones(2, 8), SHRINKS, 3, False, 10)
    with pytest.raises(ValueError, match="mantissa"):
        fit_groups_native(torch.ones(4, 8), torch.ones(2, 8), SHRINKS, 3, False, 11)
    with pytest.raises(ValueError, match="symmetric group has no zero"):
        fit_groups_native(torch.ones(4, 8), torch.ones(2, 8), SHRINKS, 3, True, 10, 2)
    with pytest.raises(ValueError, match="too few ends"):
        fit_groups_native(torch.ones(4, 8), torch.ones(2, 8), [1.0], 3, False, 10, 2)
    with pytest.raises(ValueError, match="importance"):
        fit_groups_native(torch.ones(4, 8), torch.ones(2, 7), SHRINKS, 3, False, 10)
