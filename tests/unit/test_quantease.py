"""Coordinate descent and the scale refit, against brute force and least squares in float64."""

from functools import partial

import pytest
import torch
from oracles import proxy_loss

from lwquant.quantizers import gptq, quantease, rtn, without_descent
from lwquant.quantizers.grid import fit_grid
from lwquant.quantizers.quantease import SHRINKAGE, sweep
from lwquant.quantizers.scales import refit_scales
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats


def make_layer(out_features=8, in_features=24, n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(n, in_features, generator=generator) @ mixing
    return weight, inputs


def stats_of(inputs):
    return LayerStats(inputs.T @ inputs, None, len(inputs))


def damped(stats, shrinkage=SHRINKAGE):
    """The Hessian that quantease() descends on."""
    own = torch.diag(stats.hessian.diagonal())
    ridge = 0.01 * stats.hessian.diagonal().mean() * torch.eye(len(own))
    return (1 - shrinkage) * stats.hessian + shrinkage * own + ridge


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("refit", [False, True])
def test_polishing_never_loses_against_gptq_and_each_sweep_gains(bits, refit):
    weight, inputs = make_layer()
    stats, scheme = stats_of(inputs), QuantScheme(bits, 8)
    errors = [proxy_loss(weight, gptq(weight, stats, scheme).dequantize(), damped(stats))]
    for sweeps in (1, 2, 4):
        got = quantease(weight, stats, scheme, sweeps=sweeps, refit=refit).dequantize()
        errors.append(proxy_loss(weight, got, damped(stats)))
    assert errors[1] < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_at_rest_no_other_code_of_any_single_weight_is_better():
    weight, inputs = make_layer(4, 12)
    stats, scheme = stats_of(inputs), QuantScheme(2, 4)
    got = quantease(weight, stats, scheme, sweeps=50, refit=False)
    rounded = got.dequantize()
    best = proxy_loss(weight, rounded, damped(stats))
    tried = 0
    for row in range(4):
        for column in range(12):
            scale, zero = (part[row, column // 4].float() for part in (got.scales, got.zeros))
            for code in range(4):
                other = rounded.clone()
                other[row, column] = (code - zero) * scale
                tried += 1
                assert proxy_loss(weight, other, damped(stats)) >= best * (1 - 1e-5)
    assert tried == 4 * 12 * 4


def test_a_sweep_is_the_textbook_one():
    weight, inputs = make_layer(3, 150, 400)  # more columns than one lazy block
    hessian, scheme = damped(stats_of(inputs)), QuantScheme(3, 32)
    grid = fit_grid(weight, scheme)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    expand = torch.arange(150) // 32
    for rounding in (grid, None):
        wanted = grid.dequantize(grid.round(weight)).double()
        start = wanted.float()
        for column in order.tolist():
            owed = (weight.double() - wanted) @ hessian.double()[:, column]
            free = wanted[:, column] + owed / hessian[column, column].double()
            if rounding is not None:
                scale, zero = (p[:, expand[column]].double() for p in (grid.scales, grid.zeros))
                free = ((free / scale + zero).round().clamp(0, 7) - zero) * scale
            wanted[:, column] = free
        got = sweep(weight, start, hessian, rounding, order).double()
        # float32 against float64: a value within rounding error of a tie may fall on either side
        assert ((got - wanted).abs() > 1e-3).double().mean() <= 0.01


def test_from_the_weight_relaxed_sweeps_lead_below_plain_rounding_and_end_on_the_grid():
    weight, inputs = make_layer(8, 64, 256)
    stats, scheme = stats_of(inputs), QuantScheme(3, 16)
    settings = {"start": "weight", "sweeps": 9, "refit": False, "shrinkage": 0.0}
    got = quantease(weight, stats, scheme, **settings)
    hessian = damped(stats, 0)
    grid = fit_grid(weight, scheme, stats.hessian.diagonal())
    plain = proxy_loss(weight, grid.dequantize(grid.round(weight)), hessian)
    assert proxy_loss(weight, got.dequantize(), hessian) < 0.6 * plain
    assert torch.equal(got.scales, grid.scales.half())
    order = torch.argsort(hessian.diagonal(), descending=True)
    wanted = weight
    for rounding in (grid, None, grid):  # the second of three sweeps is relaxed
        wanted = sweep(weight, wanted, hessian, rounding, order)
    short = quantease(weight, stats, scheme, **settings | {"sweeps": 3})
    assert torch.equal(short.codes, grid.round(wanted).byte())


@pytest.mark.parametrize("in_features", [32, 28])  # 28: a shorter last group
def test_refitted_scales_are_the_least_squares_ones(in_features):
    weight, inputs = make_layer(5, in_features, 100)
    scheme = QuantScheme(3, 8)
    grid = fit_grid(weight, scheme)
    codes = grid.round(weight)
    got = refit_scales(weight, inputs.T @ inputs, codes, grid)
    steps = (codes - grid.zeros.repeat_interleave(8, 1)[:, :in_features]).double()
    for row in range(5):
        parts = [
            inputs.double()[:, g : g + 8] @ steps[row, g : g + 8] for g in range(0, in_features, 8)
        ]
        wanted = torch.linalg.lstsq(torch.stack(parts, 1), inputs.double() @ weight[row].double())
        torch.testing.assert_close(
            got.scales[row].double(), wanted.solution, rtol=2e-3, atol=1e-6
        )  # float16 storage
    assert torch.equal(got.zeros, grid.zeros)


def test_no_row_is_worse_after_a_refit_though_float16_rounds_each_scale_by_itself():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 32, generator=generator)
    inputs = torch.randn(100, 8, generator=generator).repeat(1, 4)  # the groups say the same
    inputs += 0.01 * torch.randn(inputs.shape, generator=generator)
    grid = fit_grid(weight, QuantScheme(8, 8))
    codes = grid.round(weight)

    def errors(grid):
        missed = (grid.dequantize(codes) - weight).double() @ inputs.double().T
        return missed.square().sum(1)

    once = refit_scales(weight, inputs.T @ inputs, codes, grid)
    assert (errors(once) <= errors(grid) * (1 + 1e-3)).all()
    assert errors(once).sum() < errors(grid).sum()


def test_a_refit_keeps_the_scales_of_rows_that_it_cannot_improve():
    weight, inputs = make_layer(3, 16)
    scheme = QuantScheme(3, 8)
    grid = fit_grid(weight, scheme)
    codes = grid.round(weight)
    codes[1] = grid.zeros[1].repeat_interleave(8)  # all steps zero: nothing to fit
    flipped = weight.clone()
    flipped[2] *= -1  # would need negative scales
    got = refit_scales(flipped, inputs.T @ inputs, codes, grid)
    assert torch.equal(got.scales[1:], grid.scales[1:])
    assert not torch.equal(got.scales[0], grid.scales[0])
    exact = grid.dequantize(codes)
    same = refit_scales(exact, inputs.T @ inputs, codes, grid)
    assert torch.equal(same.scales, grid.scales)


def test_costs_are_measured_with_what_the_descent_starts_from():
    begun = without_descent(quantease)
    assert begun.func is gptq and begun.keywords == {"shrinkage": SHRINKAGE}
    kept = without_descent(partial(quantease, sweeps=2, damping=0.1, search=False, shrinkage=0))
    wanted = {"damping": 0.1, "search": False, "shrinkage": 0}
    assert kept.func is gptq and kept.keywords == wanted
    for other in (rtn, gptq, partial(gptq, damping=0.1), partial(quantease, start="weight")):
        assert without_descent(other) is other
