"""The two factors of the Fisher information, where they are exact and where means would mislead."""

import pytest
import torch

from lwquant.sensitivity.information import Information

N, OUT, IN = 50, 6, 8


def draws(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, IN, generator=generator)
    by_token = torch.rand(N, generator=generator) + 0.1
    by_output = torch.rand(OUT, generator=generator) + 0.1
    signs = torch.randint(2, (N, OUT), generator=generator) * 2 - 1
    gradients = signs * (by_token[:, None] * by_output).sqrt()
    changes = torch.randn(3, OUT, IN, generator=generator)
    return inputs, gradients, changes


def in_full(inputs, gradients, changes):
    """½ E[Σ_o g_o² (ΔW_o x)²] of each change, token by token."""
    moved = torch.einsum("noi,ti->nto", changes.double(), inputs.double())
    return (gradients.double().square() * moved.square()).sum(2).mean(1) / 2


def test_gradients_of_two_factors_give_the_mean_over_tokens_exactly():
    inputs, gradients, changes = draws()
    information = Information()
    for part in (slice(0, 20), slice(20, N)):
        information.add(inputs[part], gradients[part])
    torch.testing.assert_close(
        information.second_order(changes), in_full(inputs, gradients, changes), rtol=1e-5, atol=0
    )


def test_gradients_that_are_large_where_inputs_are_small_are_not_multiplied_by_their_mean():
    inputs, gradients, changes = draws()
    size = torch.logspace(-3, 1, N)[:, None]
    inputs, gradients = inputs * size, gradients / size
    information = Information()
    information.add(inputs, gradients)
    found, wanted = information.second_order(changes), in_full(inputs, gradients, changes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    squares = gradients.double().square().mean(0)
    moved = torch.einsum("noi,ti->nto", changes.double(), inputs.double()).square().mean(1)
    assert (moved @ squares / 2 > 1000 * found).all()


def test_outputs_that_nothing_depends_on_cost_nothing():
    inputs, gradients, changes = draws()
    information = Information()
    information.add(inputs, torch.zeros_like(gradients))
    assert information.second_order(changes).tolist() == [0.0, 0.0, 0.0]
    assert information.second_order(changes).dtype == torch.float64


def test_a_change_of_one_output_costs_what_its_gradients_make_it():
    inputs, gradients, changes = draws()
    information = Information()
    information.add(inputs, gradients)
    single = torch.zeros_like(changes)
    single[:, 2] = changes[:, 2]
    assert information.second_order(single)[0] == pytest.approx(
        in_full(inputs, gradients, single)[0].item(), rel=1e-5
    )
