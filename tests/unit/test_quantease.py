"""Coordinate descent, against brute force and its definition in float64."""

from functools import partial

import pytest
import torch
from oracles import proxy_loss

from lwquant.quantizers import gptq, quantease, rtn, without_descent
from lwquant.quantizers.grid import fit_grid
from lwquant.quantizers.quantease import SHRINKAGE, sweep
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
def test_polishing_never_loses_against_gptq_and_each_sweep_gains(bits):
    weight, inputs = make_layer()
    stats, scheme = stats_of(inputs), QuantScheme(bits, 8)
    errors = [proxy_loss(weight, gptq(weight, stats, scheme).dequantize(), damped(stats))]
    for sweeps in (1, 2, 4):
        got = quantease(weight, stats, scheme, sweeps=sweeps).dequantize()
        errors.append(proxy_loss(weight, got, damped(stats)))
    assert errors[1] < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_at_rest_no_other_code_of_any_single_weight_is_better():
    weight, inputs = make_layer(4, 12)
    stats, scheme = stats_of(inputs), QuantScheme(2, 4)
    got = quantease(weight, stats, scheme, sweeps=50)
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
    settings = {"start": "weight", "sweeps": 9, "shrinkage": 0.0}
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


def test_costs_are_measured_with_what_the_descent_starts_from():
    begun = without_descent(quantease)
    assert begun.func is gptq and begun.keywords == {"shrinkage": SHRINKAGE}
    kept = without_descent(partial(quantease, sweeps=2, damping=0.1, search=False, shrinkage=0))
    wanted = {"damping": 0.1, "search": False, "shrinkage": 0}
    assert kept.func is gptq and kept.keywords == wanted
    for other in (rtn, gptq, partial(gptq, damping=0.1), partial(quantease, start="weight")):
        assert without_descent(other) is other
