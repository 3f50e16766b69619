"""Learned rounding of a block: its gradient, what it may return, and a case nearest codes lose."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lwquant.block_tuning as block_tuning
from lwquant.block_tuning import NOTHING_BETTER, RoundedLinear, block_loss, tune_block
from lwquant.model.structure import as_linear, set_weight
from lwquant.quantizers import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import Outliers, QuantizedWeight

SCHEMES = (QuantScheme(2, 8, fine_zeros=True, outliers=50), QuantScheme(3, 8, symmetric=True))


@pytest.fixture(autouse=True)
def two_windows_a_step(monkeypatch):
    monkeypatch.setattr(block_tuning, "TOKENS_PER_STEP", 24)


class Block(nn.Module):
    """Two linears with a bend between them, the second of which adds to the residual stream."""

    def __init__(self, hidden=16, inner=20):
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = Conv1D(hidden, inner)  # stored as (in_features, out_features)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.silu(self.up(hidden)))


def weight_of(module):
    return as_linear(module, module.weight).detach().clone()


def rounded(module, scheme, quantizer=rtn):
    target = weight_of(module)
    apart = torch.zeros_like(target)
    if scheme.outliers:
        outliers = Outliers.largest(target, scheme.n_outliers(*target.shape))
        apart = outliers.added_to(apart)
    start = quantizer(target - apart, None, scheme.without_outliers)
    if scheme.outliers:
        start = replace(start, scheme=scheme, outliers=outliers)
    set_weight(module, start.dequantize())
    return RoundedLinear(module, target, start)


def one_off(weight, _, scheme):
    """Nearest codes, but for a tenth of them that are one higher where there is one."""
    nearest = rtn(weight, None, scheme)
    moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    codes = (nearest.codes + moved.byte()).clamp(max=scheme.max_code)
    return replace(nearest, codes=codes)


@pytest.fixture(params=[rtn, one_off])
def problem(request):
    """A rounded block, its linears, its drifted inputs and what the float block made of others."""
    block = Block().requires_grad_(False)
    nn.init.normal_(block.down.weight, std=0.3)
    inputs = torch.randn(16, 12, 16)
    wanted = block(inputs)
    names = zip(("up", "down"), SCHEMES, strict=True)
    linears = {n: rounded(block.get_submodule(n), s, request.param) for n, s in names}
    return block, linears, inputs + 0.05 * torch.randn(inputs.shape), wanted


def relative_loss(block, inputs, wanted):
    """Mean over tokens of the squared error over the mean square of what was wanted."""
    error = (block(inputs) - wanted).double().square().mean(-1)
    return (error / wanted.double().square().mean(-1)).mean().item()


def test_no_steps_return_the_start_itself(problem):
    block, linears, inputs, wanted = problem
    before = {name: weight_of(linear.module) for name, linear in linears.items()}
    got = tune_block(block, linears, inputs, wanted, steps=0)
    for name, linear in linears.items():
        assert got[name] is linear.start
        assert torch.equal(weight_of(linear.module), before[name])


def test_learning_begins_at_the_codes_of_the_start(problem):
    _, linears, _, _ = problem
    for linear in linears.values():
        learned = block_tuning._Learned(linear)
        assert torch.equal(learned.result().codes, linear.start.codes)
        assert torch.equal(learned.result().scales, linear.start.scales)
        learned.put_in()
        assert torch.equal(weight_of(linear.module), linear.start.dequantize())
        # A weight whose nearest code is its own begins where it lies.
        expand = torch.arange(linear.target.shape[1]) // linear.start.scheme.group_size
        scales, zeros = linear.start.scales.float()[:, expand], linear.start.zero_points[:, expand]
        apart = linear.start.plus_outliers(torch.zeros_like(linear.target))
        lies = (linear.target - apart) / scales + zeros
        near = (lies - linear.start.codes.float()).abs() < block_tuning.EDGE
        near &= (lies > 0) & (lies < linear.start.scheme.max_code)
        assert near.float().mean() > 0.5
        torch.testing.assert_close(learned.positions[near], lies[near])
        away = (learned.positions - linear.start.codes.float()).abs()
        assert (away <= block_tuning.EDGE + 1e-5).all()


def test_both_parts_come_closer_and_the_result_is_storable(problem):
    block, linears, inputs, wanted = problem
    learned, held_out = slice(0, 14), slice(14, 16)
    before = [relative_loss(block, inputs[part], wanted[part]) for part in (learned, held_out)]
    got = tune_block(block, linears, inputs, wanted, steps=60, rate=1e-2)
    after = [relative_loss(block, inputs[part], wanted[part]) for part in (learned, held_out)]
    assert after[0] < 0.9 * before[0] and after[1] < 0.97 * before[1]
    changed = 0
    for name, linear in linears.items():
        weight, scheme = got[name], linear.start.scheme
        assert weight.scheme == scheme and weight.codes.dtype == torch.uint8
        assert weight.codes.max() <= scheme.max_code
        assert weight.scales.dtype == torch.float16 and (weight.scales > 0).all()
        assert torch.equal(weight.zeros, linear.start.zeros) and not weight.notes
        assert weight.outliers is linear.start.outliers
        assert torch.equal(weight_of(linear.module), weight.dequantize())
        assert not linear.module.weight.requires_grad
        changed += (weight.codes != linear.start.codes).sum().item()
    assert changed


def test_what_is_no_better_on_held_out_windows_is_not_kept(problem):
    block, linears, inputs, wanted = problem
    wanted = wanted.clone()
    wanted[14:] = block(inputs[14:])  # the start is perfect there
    got = tune_block(block, linears, inputs, wanted, steps=20)
    first, *others = linears
    for name, linear in linears.items():
        assert torch.equal(got[name].codes, linear.start.codes)
        assert torch.equal(got[name].scales, linear.start.scales)
        assert torch.equal(weight_of(linear.module), linear.start.dequantize())
    assert got[first].notes == (*linears[first].start.notes, NOTHING_BETTER)
    assert all(got[name] is linears[name].start for name in others)


def test_windows_held_out_teach_nothing(problem):
    block, linears, inputs, wanted = problem
    got = tune_block(block, linears, inputs, wanted, steps=20)
    for linear in linears.values():
        set_weight(linear.module, linear.start.dequantize())
    other = wanted.clone()
    other[14:] = 0.999 * other[14:]
    again = tune_block(block, linears, inputs, other, steps=20)
    for name in linears:
        assert not got[name].notes and not again[name].notes
        assert torch.equal(got[name].codes, again[name].codes)
        assert torch.equal(got[name].scales, again[name].scales)


def test_gradients_are_those_of_autograd_through_the_definition(problem):
    block, linears, inputs, wanted = problem
    importance = block_tuning._importance(wanted)
    learned = {name: block_tuning._Learned(linear) for name, linear in linears.items()}
    for one in learned.values():
        one.positions += 0.3 * torch.randn(one.positions.shape)
        one.positions.clamp_(0, one.start.scheme.max_code)
        one.shift += 0.1 * torch.randn(one.shift.shape)

    leaves, swapped = {}, {}
    for name, one in learned.items():
        code = one.positions.round().requires_grad_(True)  # straight-through: the code is the leaf
        shift = one.shift.clone().requires_grad_(True)
        start = one.start
        columns = []
        for column in range(code.shape[1]):
            group = column // start.scheme.group_size
            scale = start.scales[:, group].float() * shift[:, group].exp()
            columns.append((code[:, column] - start.zero_points[:, group]) * scale)
        leaves[name] = (code, shift)
        weight = start.plus_outliers(torch.stack(columns, 1))
        swapped[f"{name}.weight"] = as_linear(one.module, weight)
    output = torch.func.functional_call(block, swapped, (inputs,))
    error = (output - wanted).square().mean(-1) / wanted.square().mean(-1)
    error.mean().backward()

    parameters = [one.put_in() for one in learned.values()]
    loss = block_loss(block(inputs), wanted, importance)
    torch.testing.assert_close(loss, error.mean())
    gradients = torch.autograd.grad(loss, parameters)
    for (name, one), gradient in zip(learned.items(), gradients, strict=True):
        code, shift = leaves[name]
        in_positions, in_shift = one.slopes(gradient)
        torch.testing.assert_close(in_positions, code.grad)
        torch.testing.assert_close(in_shift, shift.grad)


def test_positions_follow_adam_beyond_the_noise_and_scales_follow_adam(problem, monkeypatch):
    _, linears, _, _ = problem
    monkeypatch.setattr(block_tuning, "NOISE", 0.5)
    for linear in linears.values():
        one = block_tuning._Learned(linear)
        positions, shift = one.positions.clone(), one.shift.clone()
        free = one.positions.clone().requires_grad_(True)
        scale = one.shift.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([free, scale], lr=1e-3, betas=block_tuning.DECAYS, eps=1e-30)
        for _ in range(4):
            one.put_in()
            gradient = torch.randn(one.module.weight.shape) * 1e-3
            free.grad, scale.grad = (part.clone() for part in one.slopes(gradient))
            before = free.detach().clone()
            optimizer.step()
            direction = (before - free.detach()) / 1e-3
            clear = direction.sign() * (direction.abs() - 0.5).clamp(min=0)
            positions = (positions - 1e-3 * clear).clamp(0, linear.start.scheme.max_code)
            one.step(gradient, 1e-3, 1e-3)
            torch.testing.assert_close(one.positions, positions, rtol=0, atol=5e-6)
            torch.testing.assert_close(one.shift, scale.detach(), rtol=0, atol=1e-6)
        assert not torch.equal(shift, one.shift)


def test_the_best_codes_of_a_tiny_layer_are_found_where_the_nearest_are_not():
    """Inputs that always come together make the sum of two weights count, not each of them."""
    scheme = QuantScheme(2, 4)
    linear = nn.Linear(4, 1, bias=False).requires_grad_(False)
    target = torch.tensor([[0.45, 0.3, 1.2, -1.0]])
    shared, apart = torch.randn(2, 64, 8, 2).unbind(0)
    inputs = torch.stack(
        [shared[..., 0], shared[..., 0] + 0.1 * apart[..., 0], shared[..., 1], apart[..., 1]], -1
    )
    size = torch.full((64, 8, 3), 2.0)  # further channels, so that all tokens are about as large

    def run(hidden):
        return torch.cat([linear(hidden), size[: len(hidden)]], -1)

    wanted = torch.cat([inputs @ target.T, size], -1)
    grid = {"scales": torch.ones(1, 1).half(), "zeros": torch.ones(1, 1).byte()}

    def loss(codes):
        error = inputs @ (torch.as_tensor(codes).float() - 1) - wanted[..., 0]
        return (error.square() / wanted.square().mean(-1)).mean().item()

    nearest = (target + 1).round().clamp(0, 3).byte()
    set_weight(linear, QuantizedWeight(scheme, nearest, **grid).dequantize())
    best = min(itertools.product(range(4), repeat=4), key=loss)
    assert loss(best) < 0.5 * loss(nearest[0])
    start = {"only": RoundedLinear(linear, target, QuantizedWeight(scheme, nearest, **grid))}
    found = tune_block(run, start, inputs, wanted, steps=80, rate=1e-2, scale_rate=0.0)["only"]
    assert tuple(found.codes[0].tolist()) == best
    assert torch.equal(found.scales, grid["scales"])


def test_errors_count_relative_to_the_size_of_the_token():
    block, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    importance = block_tuning._importance(other)
    grown = torch.rand(2, 3, 1) * 1000 + 1
    torch.testing.assert_close(
        block_loss(block * grown, other * grown, block_tuning._importance(other * grown)),
        block_loss(block, other, importance),
    )


def test_rows_come_once_before_any_comes_again():
    drawn = list(block_tuning._batches(5, 2, 10, seed=3))
    assert all(len(set(rows)) == 2 for rows in drawn)
    flat = [row for rows in drawn for row in rows]
    assert sorted(flat[:4]) != sorted(flat[4:8])
    assert all(flat.count(row) == 4 for row in range(5))
    assert list(block_tuning._batches(2, 4, 3, seed=0)) != []


def test_the_same_seed_gives_the_same_codes(problem):
    block, linears, inputs, wanted = problem
    results = []
    for seed in (1, 1, 2):
        for linear in linears.values():
            set_weight(linear.module, linear.start.dequantize())
        results.append(tune_block(block, linears, inputs, wanted, steps=10, seed=seed)["up"])
    assert torch.equal(results[0].scales, results[1].scales)
    assert not torch.equal(results[0].scales, results[2].scales)


def test_one_window_cannot_be_both_learned_from_and_held_out(problem):
    block, linears, inputs, wanted = problem
    with pytest.raises(ValueError, match=r"n_samples=1 leaves none to hold out"):
        tune_block(block, linears, inputs[:1], wanted[:1], steps=1)


def test_codes_of_a_codebook_are_refused():
    block = Block().requires_grad_(False)
    linears = {"up": rounded(block.up, QuantScheme(4, 8, codebook="nf4"))}
    inputs = torch.randn(4, 12, 16)
    with pytest.raises(ValueError, match="nf4-g8 has no even steps"):
        tune_block(block, linears, inputs, block(inputs), steps=4)
