"""The sparse part of QuantEase: its steps from their definitions, its whole against brute force."""

import itertools

import pytest
import torch
from oracles import proxy_loss

import lwquant.quantizers.outliers as outliers
from lwquant.quantizers import gptq, quantease
from lwquant.quantizers.grid import fit_grid
from lwquant.quantizers.outliers import largest_eigenvalue, refit_outliers, top_entries
from lwquant.quantizers.quantease import SHRINKAGE, sweep
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats


def make_layer(out_features=8, in_features=24, n=96, seed=0):
    """Weights with heavy tails, and correlated inputs of different loudness."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= weight.square()
    mixing = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(n, in_features, generator=generator) @ mixing
    inputs[:, 0] *= 10
    return weight, LayerStats(inputs.T @ inputs, None, n)


def damped(stats, shrinkage=SHRINKAGE):
    """The Hessian that quantease() descends on."""
    own = torch.diag(stats.hessian.diagonal())
    ridge = 0.01 * stats.hessian.diagonal().mean() * torch.eye(len(own))
    return (1 - shrinkage) * stats.hessian + shrinkage * own + ridge


def test_the_eigenvalue_is_the_largest_and_a_little_above():
    for seed in range(5):
        hessian = damped(make_layer(seed=seed)[1])
        root = hessian.diagonal().double().sqrt()
        exact = torch.linalg.eigvalsh(hessian.double() / root / root[:, None])[-1]
        assert 1 <= largest_eigenvalue(hessian).item() / exact.item() <= 1.051


def test_the_largest_entries_are_kept_as_float16_and_a_diagonal_weighs_them():
    dense = torch.tensor([[1.0, -3.0, 0.1], [2.00001, 0.5, -0.2]])
    assert top_entries(dense, 2).tolist() == [[0, -3, 0], [2, 0, 0]]
    diagonal = torch.tensor([1.0, 0.01, 10_000.0])
    tenth, fifth = torch.tensor([0.1, -0.2]).half().tolist()
    assert top_entries(dense, 2, diagonal).tolist() == [[0, 0, tenth], [0, 0, fifth]]


def test_with_room_for_all_entries_steps_lead_to_what_is_missed(monkeypatch):
    weight, stats = make_layer(4, 8)
    hessian = damped(stats, 0.1)
    monkeypatch.setattr(outliers, "STEPS", 3000)
    start = torch.zeros_like(weight)
    found = refit_outliers(weight, start, hessian, largest_eigenvalue(hessian), weight.numel())
    # Steps end where float16 lets none gain.
    assert proxy_loss(weight, found, hessian) < 1e-4 * proxy_loss(weight, start, hessian)


def test_steps_lead_to_least_squares_on_the_places_they_end_at(monkeypatch):
    weight, stats = make_layer(4, 10)
    hessian, n = damped(stats, 0.1), 9
    eigenvalue = largest_eigenvalue(hessian)
    start = top_entries(weight, n)
    errors = [proxy_loss(weight, start, hessian)]
    for steps in (1, 2, 4, 3000):
        monkeypatch.setattr(outliers, "STEPS", steps)
        found = refit_outliers(weight, start, hessian, eigenvalue, n)
        assert (found != 0).sum() <= n and torch.equal(found, found.half().float())
        errors.append(proxy_loss(weight, found, hessian))
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
    wanted = torch.zeros_like(weight).double()
    for row in range(4):
        places = found[row].nonzero()[:, 0]
        inner = hessian.double()[places][:, places]
        right = hessian.double()[places] @ weight[row].double()
        wanted[row, places] = torch.linalg.solve(inner, right)
    assert proxy_loss(weight, found, hessian) <= 1.001 * proxy_loss(weight, wanted, hessian)


def test_one_step_is_hard_thresholding_where_the_diagonal_is_one(monkeypatch):
    weight, stats = make_layer(4, 10)
    hessian, n = damped(stats), 7
    eigenvalue = largest_eigenvalue(hessian)
    monkeypatch.setattr(outliers, "STEPS", 1)
    found = refit_outliers(weight, torch.zeros_like(weight), hessian, eigenvalue, n)
    root = hessian.diagonal().double().sqrt()
    scaled = (weight.double() * root) @ (hessian.double() / root / root[:, None]) / eigenvalue
    wanted = torch.zeros(40, dtype=torch.float64)
    places = scaled.flatten().abs().argsort(descending=True)[:n]
    wanted[places] = (scaled / root).flatten()[places]
    torch.testing.assert_close(found.double().flatten(), wanted, rtol=2e-3, atol=1e-6)


def test_the_two_parts_take_turns_each_aiming_at_what_the_other_lacks():
    weight, stats = make_layer(8, 24)
    scheme, hessian = QuantScheme(2, 8, outliers=60), damped(stats)
    n, eigenvalue = scheme.n_outliers(8, 24), largest_eigenvalue(hessian)
    order = torch.argsort(hessian.diagonal(), descending=True)
    apart = top_entries(weight, n)
    grid = fit_grid(weight - apart, scheme.without_outliers, stats.hessian.diagonal())
    current = weight - apart
    for rounding in (grid, None, grid):  # from the weight the second sweep does not round
        current = sweep(weight - apart, current, hessian, rounding, order)
        if rounding is not None:
            apart = refit_outliers(weight - current, apart, hessian, eigenvalue, n)
    got = quantease(weight, stats, scheme, start="weight", sweeps=3)
    torch.testing.assert_close(got.dequantize(), current + apart)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("start", ["gptq", "weight"])
def test_each_sweep_gains_and_outliers_pay_on_heavy_tails(bits, start):
    weight, stats = make_layer(16, 40, 160)
    scheme = QuantScheme(bits, 8, outliers=40)
    n = scheme.n_outliers(16, 40)
    errors = []
    if start == "gptq":
        apart = top_entries(weight, n)
        begun = gptq(weight - apart, stats, scheme.without_outliers, shrinkage=SHRINKAGE)
        errors.append(proxy_loss(weight, begun.dequantize() + apart, damped(stats)))
    for sweeps in (1, 4, 7) if start == "weight" else (1, 2, 4):
        got = quantease(weight, stats, scheme, start=start, sweeps=sweeps)
        errors.append(proxy_loss(weight, got.dequantize(), damped(stats)))
        assert len(got.outliers.values) == n and got.scheme == scheme
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    plain = quantease(weight, stats, scheme.without_outliers, start=start)
    assert errors[-1] < 0.6 * proxy_loss(weight, plain.dequantize(), damped(stats))


def test_without_room_for_an_outlier_it_is_plain_quantease():
    weight, stats = make_layer(4, 24)
    scheme = QuantScheme(3, 8, outliers=10)
    assert scheme.n_outliers(4, 24) == 0
    got, plain = (quantease(weight, stats, s) for s in (scheme, scheme.without_outliers))
    assert torch.equal(got.codes, plain.codes) and torch.equal(got.scales, plain.scales)
    assert torch.equal(got.dequantize(), plain.dequantize())
    assert len(got.outliers.values) == 0 and plain.outliers is None


def best_of_all(weight, hessian, grid):
    """Least loss of one row over all codes and all places of one entry, whose value is free."""
    scale, zero = grid.scales[0, 0].double(), grid.zeros[0, 0].double()
    codes = torch.tensor(list(itertools.product(range(4), repeat=weight.shape[1]))).double()
    missed = (codes - zero) * scale - weight.double()
    slope = missed @ hessian.double()
    losses = (slope * missed).sum(1, keepdim=True)
    return (losses - slope.square() / hessian.diagonal().double()).min().item()


def test_it_comes_near_the_best_codes_and_outlier_of_tiny_rows():
    scheme = QuantScheme(2, 5, outliers=100)
    ratios, plain_ratios = [], []
    for seed in range(30):
        weight, stats = make_layer(2, 5, 40, seed)
        weight = weight[:1].repeat(2, 1)
        weight[1] = 0  # so that a tenth of the weights is one outlier, of the first row
        got = quantease(weight, stats, scheme, sweeps=20)
        assert len(got.outliers.values) == 1
        hessian = damped(stats)
        grid = fit_grid(
            weight - top_entries(weight, 1), scheme.without_outliers, stats.hessian.diagonal()
        )
        best = best_of_all(weight[:1], hessian, grid)
        scale = proxy_loss(weight, torch.zeros_like(weight), hessian)
        loss = proxy_loss(weight, got.dequantize(), hessian)
        assert loss >= best - 1e-5 * scale
        ratios.append((loss - best) / scale)
        plain = quantease(weight, stats, scheme.without_outliers, sweeps=20)
        plain_ratios.append((proxy_loss(weight, plain.dequantize(), hessian) - best) / scale)
    assert sum(ratios) < 0.35 * sum(plain_ratios)
