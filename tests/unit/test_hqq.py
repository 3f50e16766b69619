"""HQQ's steps from their definitions, and its grids against trying every grid."""

import pytest
import torch

from lwquant.quantizers import hqq
from lwquant.quantizers.grid import fit_grid
from lwquant.quantizers.hqq import _refit, _shrunk
from lwquant.scheme import QuantScheme


def errors_of(rows, scales, zeros, max_code, exponent=0.7):
    codes = (rows / scales + zeros).round().clamp(0, max_code)
    return ((codes - zeros) * scales - rows).abs().pow(exponent).sum(1)


def heavy_tailed(n_rows=1, seed=5):
    rows = torch.randn(n_rows, 32, generator=torch.Generator().manual_seed(seed))
    rows[:, 7], rows[:, 21] = 6.0, -4.0
    return rows


@pytest.mark.parametrize("bits", [2, 3])
def test_its_grids_are_almost_as_good_as_the_best_of_all_grids(bits):
    rows, scheme = heavy_tailed(40), QuantScheme(bits, 32)
    tries = [
        errors_of(rows, scale, zero, scheme.max_code)
        for scale in torch.linspace(0.05, 4.0, 300).tolist()
        for zero in range(scheme.max_code + 1)
    ]
    best = torch.stack(tries).amin(0)
    got = hqq(rows, None, scheme)
    ratios = errors_of(rows, got.scales.float(), got.zeros.float(), scheme.max_code) / best
    # The sum has a local minimum wherever a weight is met exactly: near the best, not at it.
    assert ratios.mean() < 1.1 and ratios.max() < 1.5
    squares = fit_grid(rows, scheme)
    others = errors_of(rows, squares.scales, squares.zeros, scheme.max_code) / best
    assert others.mean() > 1.15
    unfitted = hqq(rows, None, scheme, rounds=0)
    starts = errors_of(rows, unfitted.scales.float(), unfitted.zeros.float(), scheme.max_code)
    assert ratios.mean() < (starts / best).mean() - 0.005


def test_shrinking_takes_the_large_errors_and_leaves_the_small_ones():
    errors = torch.tensor([-3.0, -1.0, -0.05, 0.0, 0.04, 0.8])
    penalty, exponent = 10.0, 0.7
    got = _shrunk(errors, penalty, exponent)
    apart = torch.linspace(-4, 4, 80001).double()
    for error, value in zip(errors.tolist(), got.tolist(), strict=True):
        cost = apart.abs().pow(exponent) / exponent + penalty / 2 * (apart - error).square()
        # It solves e = x − |e|^(p−1)/β with one step from e = x: (p−1) |x|^(p−2)/β of the step off.
        assert value == pytest.approx(apart[cost.argmin()].item(), abs=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_refit_is_least_squares_at_the_best_neighbouring_zero(symmetric):
    generator = torch.Generator().manual_seed(1)
    scheme = QuantScheme(3, 16, symmetric)
    wanted = torch.randn(6, 1, 16, generator=generator)
    codes = torch.randint(8, (6, 1, 16), generator=generator).float()
    codes = (codes + 2 * wanted).round().clamp(0, 7)  # somewhat like the weights
    zero = torch.full((6, 1, 1), 4.0)
    scale = torch.full((6, 1, 1), 0.5)
    inside = torch.ones(1, 16)
    inside[0, 14:] = 0  # padding: its weights are zeros, and its codes mean nothing
    wanted[:, :, 14:] = 0
    got_scale, got_zero = _refit(wanted, codes, inside, scale, zero, scheme)
    for row in range(6):
        tries = {}
        for tried in (4.0,) if symmetric else (3.0, 4.0, 5.0):
            steps = (codes[row, 0, :14] - tried).double()[:, None]
            target = wanted[row, 0, :14].double()[:, None]
            solution = torch.linalg.lstsq(steps, target).solution
            tries[tried] = ((steps @ solution - target).square().sum().item(), solution.item())
        best = min(tries, key=lambda zero: tries[zero][0])
        assert got_zero[row].item() == best
        assert got_scale[row].item() == pytest.approx(tries[best][1], rel=2**-11)


def test_the_exponent_is_above_zero_and_at_most_one():
    weight, scheme = heavy_tailed(), QuantScheme(3, 32)
    for exponent in (0.0, 1.2):
        with pytest.raises(ValueError, match=f"exponent={exponent}"):
            hqq(weight, None, scheme, exponent=exponent)
