"""The laws of every correction, and the least-squares oracle of error propagation."""

from dataclasses import replace

import pytest
import torch

from lwquant.corrections import CORRECTIONS, error_propagation
from lwquant.types import LayerStats

every_correction = pytest.mark.parametrize("correct", CORRECTIONS.values(), ids=CORRECTIONS)


def make_streams(seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 20, generator=generator)
    floats = torch.randn(200, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    inputs = floats + noise * torch.randn(200, 20, generator=generator)
    return weight, floats, inputs


def sums_of(floats, inputs):
    return LayerStats(inputs.T @ inputs, (floats - inputs).T @ inputs, len(inputs))


def stats_of(floats, inputs):
    middle = len(inputs) // 2
    return replace(sums_of(floats, inputs), half=sums_of(floats[:middle], inputs[:middle]))


@every_correction
def test_no_drift_changes_nothing(correct):
    weight, floats, _ = make_streams()
    torch.testing.assert_close(correct(weight, stats_of(floats, floats)), weight)


@every_correction
def test_the_output_on_the_calibration_inputs_comes_closer_to_the_float_one(correct):
    weight, floats, inputs = make_streams()
    corrected = correct(weight, stats_of(floats, inputs))
    before = (floats @ weight.T - inputs @ weight.T).square().sum()
    assert (floats @ weight.T - inputs @ corrected.T).square().sum() < before


@every_correction
def test_arguments_are_left_alone_and_missing_drift_is_refused(correct):
    weight, floats, inputs = make_streams()
    stats = stats_of(floats, inputs)
    before = weight.clone(), stats.hessian.clone(), stats.drift.clone()
    correct(weight, stats)
    assert all(map(torch.equal, (weight, stats.hessian, stats.drift), before))
    with pytest.raises(ValueError, match="drift"):
        correct(weight, LayerStats(stats.hessian, None, 200))


def test_full_strength_is_the_least_squares_solution():
    weight, floats, inputs = make_streams()
    got = error_propagation(weight, stats_of(floats, inputs), strength=1.0, damping=0.0)
    wanted = torch.linalg.lstsq(inputs.double(), floats.double() @ weight.double().T).solution.T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_linear_takes_on_what_the_residual_stream_owes_where_it_is_known():
    weight, floats, inputs = make_streams()
    owed = inputs @ torch.randn(12, 20, generator=torch.Generator().manual_seed(1)).T + 0.1
    lacking = owed + (floats - inputs) @ weight.T
    stats = replace(stats_of(floats, inputs), owed=lacking.T @ inputs)
    got = error_propagation(weight, stats, strength=1.0, damping=0.0)
    target = owed.double() + floats.double() @ weight.double().T
    wanted = torch.linalg.lstsq(inputs.double(), target).solution.T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)
    without = error_propagation(weight, stats, strength=0.5, repair_residual=False)
    plain = error_propagation(weight, stats_of(floats, inputs), strength=0.5)
    assert torch.equal(without, plain)
    alone = replace(stats, drift=None)
    again = error_propagation(weight, alone, strength=1.0, damping=0.0)
    assert torch.equal(again, got)
    with pytest.raises(ValueError, match="drift"):
        error_propagation(weight, alone, strength=0.5, repair_residual=False)


def test_the_strength_is_the_one_that_fits_best_where_the_step_was_not_computed():
    weight, floats, inputs = make_streams(noise=1.0)
    halves = ((slice(0, 100), slice(100, 200)), (slice(100, 200), slice(0, 100)))
    wanted_outputs = floats.double() @ weight.double().T
    errors = torch.zeros(1001).double()
    for known, tested in halves:
        fit = torch.linalg.lstsq(inputs[known].double(), wanted_outputs[known]).solution.T
        for k in range(1001):
            trial = weight.double() + k / 1000 * (fit - weight.double())
            missed = wanted_outputs[tested] - inputs[tested].double() @ trial.T
            errors[k] += missed.square().sum()
    best = errors.argmin().item() / 1000
    assert 0.1 < best < 0.9
    stats = stats_of(floats, inputs)
    got = error_propagation(weight, stats, damping=0.0)
    wanted = error_propagation(weight, stats, strength=best, damping=0.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3 * (wanted - weight).abs().max())


def test_drift_that_the_inputs_do_not_tell_is_left_alone():
    weight, _, inputs = make_streams()
    floats = inputs + 3 * torch.randn(200, 20, generator=torch.Generator().manual_seed(5))
    stats = stats_of(floats, inputs)
    moved = (error_propagation(weight, stats) - weight).norm()
    assert moved < 0.2 * (error_propagation(weight, stats, strength=1.0) - weight).norm()


def test_a_strength_cannot_be_chosen_without_a_second_half():
    weight, floats, inputs = make_streams()
    with pytest.raises(ValueError, match="half of the tokens"):
        error_propagation(weight, sums_of(floats, inputs))


def test_the_error_falls_with_strength_and_half_strength_is_half_way():
    weight, floats, inputs = make_streams()
    stats = stats_of(floats, inputs)
    steps = [error_propagation(weight, stats, strength=s, damping=0.0) for s in (0, 0.5, 1)]
    errors = [(floats @ weight.T - inputs @ w.T).square().sum().item() for w in steps]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(steps[1], (steps[0] + steps[2]) / 2)


def test_an_indefinite_hessian_is_refused_by_name():
    weight, floats, inputs = make_streams()
    broken = LayerStats(-torch.eye(20), stats_of(floats, inputs).drift, 200)
    with pytest.raises(ValueError, match="not positive definite"):
        error_propagation(weight, broken, strength=0.5)
