"""Learned rounding: move a block's codes and scales until its output is the float model's.

Rounding with signed gradients is from Cheng et al., "Optimize Weight Rounding via Signed Gradient
Descent for the Quantization of LLMs", arXiv:2309.05516 (AutoRound); the output of a whole block as
the target from Li et al., "BRECQ", arXiv:2102.05426. Ours starts from codes that a quantizer chose
with care, aims at the float model's own activations rather than at what the float block makes of
the quantized ones, takes steps of Adam from which noise is left out, and is judged by windows that
it did not learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lwquant.groups import by_groups
from lwquant.model.structure import as_linear, set_weight
from lwquant.quantizers.grid import even_steps_only, in_window, storable_scale
from lwquant.types import QuantizedWeight

EDGE = 0.49  # how far from its code, in steps of the grid, a weight may start
HELD_OUT = 8  # one of so many calibration windows judges instead of teaching
TOKENS_PER_STEP = 256  # at least a window; more steps of few tokens beat fewer of more
CHECKS = 2  # how often, evenly spread, the held-out windows are asked
DECAYS = (0.9, 0.99)  # of Adam's means of the gradient and of its square
WAIT = 10  # steps until those means say anything, for which the positions stay
NOISE = 0.3  # mean over root mean square of a gradient that is taken for noise; pure noise has 0.23
NOTHING_BETTER = "learned rounding found nothing better for this block on held-out windows"

Run = Callable[[Tensor], Tensor]  # (n_samples, seq_len, hidden) -> the block's output, alike


@dataclass(frozen=True)
class RoundedLinear:
    """One linear of a block and what rounding made of it."""

    module: nn.Module
    target: Tensor  # (out_features, in_features), the weight that was rounded
    start: QuantizedWeight


class _Direction:
    """Where Adam goes (Kingma, Ba, arXiv:1412.6980): mean over root mean square of a gradient."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.number = 0

    def after(self, gradient: Tensor) -> Tensor:
        """±1 where all gradients so far agree, near 0 where they are noise."""
        self.number += 1
        first, second = DECAYS
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        root = self.square.sqrt().mul_((1 - second**self.number) ** -0.5).add_(1e-30)
        return self.mean.div(1 - first**self.number).div_(root)


class _Learned:
    """One linear on its way: positions round to codes, scales are the start's times exp(shift)."""

    def __init__(self, linear: RoundedLinear) -> None:
        self.start, self.module = linear.start, linear.module
        self.scales = self.start.scales.float()
        self.zeros = self.start.zero_points
        codes = self.start.codes.float()
        apart = self.start.plus_outliers(torch.zeros_like(codes))
        # Where the weight lies between the codes says how cheaply its code changes. One that is
        # not at its nearest code, because the quantizer made up for others, is at the very edge.
        lies = self._by_group(linear.target.float() - apart, torch.div, self.scales)
        lies = self._by_group(lies, torch.add, self.zeros)
        self.positions = lies.clamp(codes - EDGE, codes + EDGE).clamp_(0, self._max_code)
        self.shift = torch.zeros_like(self.scales)
        self.position_direction = _Direction(self.positions)
        self.shift_direction = _Direction(self.shift)

    @property
    def _max_code(self) -> int:
        return self.start.scheme.max_code

    def put_in(self) -> nn.Parameter:
        """Give the module the weight as it is now; returns its parameter, ready for a gradient."""
        steps = self._by_group(self.positions.round(), torch.sub, self.zeros)
        self.on_grid = self._by_group(steps, torch.mul, self.scales * self.shift.exp())
        set_weight(self.module, self.start.plus_outliers(self.on_grid))
        parameter: nn.Parameter = self.module.weight  # type: ignore[assignment]
        parameter.requires_grad_(True)
        return parameter

    def slopes(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in positions and shift from that in the weight that was put in.

        Rounding counts as the identity (straight-through).
        """
        gradient = as_linear(self.module, gradient)
        in_positions = self._by_group(gradient, torch.mul, self.scales * self.shift.exp())
        return in_positions, self._grouped(gradient * self.on_grid).sum(2)

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move against the gradient in the weight; positions only as far as it is no noise.

        There are as many positions as weights, and far fewer tokens per step: if they followed
        the noise too, the many that start at an edge would lose what the quantizer found.
        """
        in_positions, in_shift = self.slopes(gradient)
        clear = nn.functional.softshrink(self.position_direction.after(in_positions), NOISE)
        self.positions.sub_(clear, alpha=rate).clamp_(0, self._max_code)
        self.shift.sub_(self.shift_direction.after(in_shift), alpha=scale_rate)

    def result(self) -> QuantizedWeight:
        """What is stored if learning ends here."""
        scheme = self.start.scheme
        scales = in_window(storable_scale(self.scales * self.shift.exp(), scheme), scheme)
        return replace(self.start, codes=self.positions.round().byte(), scales=scales.half())

    def _by_group(
        self, values: Tensor, combine: Callable[[Tensor, Tensor], Tensor], per_group: Tensor
    ) -> Tensor:
        """Every value (out_features, in_features) with that of its group (out_features, n_groups).

        Broadcast, not expanded: this is most of what a step costs besides the block itself.
        """
        combined = combine(self._grouped(values), per_group[:, :, None])
        return combined.reshape(len(values), -1)[:, : values.shape[1]]

    def _grouped(self, values: Tensor) -> Tensor:
        """(out_features, n_groups, group size), padded with zeros in a shorter last group."""
        return by_groups(values, self.start.scheme.group_size)


@torch.no_grad()
def tune_block(
    run: Run,
    linears: Mapping[str, RoundedLinear],
    inputs: Tensor,
    wanted: Tensor,
    *,
    steps: int,
    rate: float = 5e-3,
    scale_rate: float = 5e-3,
    seed: int = 0,
) -> dict[str, QuantizedWeight]:
    """Codes and scales with which the block's output comes closer to `wanted`.

    The result is better than the start on windows held out of the learning, or it is the start
    itself, and the first linear then has a note of it. The modules end up with what is returned.

    Args:
        run: the block as its modules' weights are at the time of the call.
        linears: what to learn, by name.
        inputs: what the block reads in the quantized model, (n_samples, seq_len, hidden); the last
            samples, an eighth and at least one, are held out.
        wanted: the float model's output of the block, shaped like inputs.
        steps: of Adam, on a few windows each; the rates fall to 0 along a cosine.
        rate: of the positions of the weights between the codes, in steps of the grid per step.
        scale_rate: of the scales, relative.

    Raises ValueError for fewer than two samples, and for codes of a codebook.
    """
    for linear in linears.values():
        even_steps_only(linear.start.scheme)
    n_samples = len(inputs)
    if n_samples < 2:
        raise ValueError(f"n_samples={n_samples} leaves none to hold out; at least 2 are needed")
    n_learned = n_samples - max(1, n_samples // HELD_OUT)
    importance = _importance(wanted)
    judge = (inputs[n_learned:], wanted[n_learned:], importance[n_learned:])
    best = {name: linear.start for name, linear in linears.items()}
    best_loss = start_loss = _loss_with(best, run, linears, *judge)

    learned = {name: _Learned(linear) for name, linear in linears.items()}
    wait = min(WAIT, steps // 2)
    checks = {steps * check // CHECKS for check in range(1, CHECKS + 1)}
    size = max(1, TOKENS_PER_STEP // inputs.shape[1])
    for number, rows in enumerate(_batches(n_learned, size, steps, seed), start=1):
        parameters = [one.put_in() for one in learned.values()]
        with torch.enable_grad():
            loss = block_loss(run(inputs[rows]), wanted[rows], importance[rows])
            gradients = torch.autograd.grad(loss, parameters)
        share = (1 + math.cos(math.pi * (number - 1) / steps)) / 2
        for one, gradient in zip(learned.values(), gradients, strict=True):
            one.step(gradient, rate * share if number > wait else 0.0, scale_rate * share)
        if number in checks:
            found = {name: one.result() for name, one in learned.items()}
            found_loss = _loss_with(found, run, linears, *judge)
            if found_loss < best_loss:
                best, best_loss = found, found_loss
    for name, weight in best.items():
        set_weight(linears[name].module, weight.dequantize())
    if steps and best_loss == start_loss:
        first, weight = next(iter(best.items()))
        best[first] = replace(weight, notes=(*weight.notes, NOTHING_BETTER))
    return best


def block_loss(output: Tensor, wanted: Tensor, importance: Tensor) -> Tensor:
    """Mean over tokens and channels of the squared error times the token's importance.

    output and wanted are (n_samples, seq_len, hidden), importance (n_samples, seq_len, 1).
    """
    return (output - wanted).square().mul(importance).mean()


def _importance(wanted: Tensor) -> Tensor:
    """One over each token's mean square, (n_samples, seq_len, 1).

    Whatever reads the residual stream normalizes it first, so errors count relative to its size;
    otherwise the few tokens of massive activations would be all that is learned from.
    """
    squares = wanted.square().mean(-1, keepdim=True)
    return 1 / squares.clamp(min=torch.finfo(torch.float32).tiny)


def _loss_with(
    weights: Mapping[str, QuantizedWeight],
    run: Run,
    linears: Mapping[str, RoundedLinear],
    inputs: Tensor,
    wanted: Tensor,
    importance: Tensor,
) -> float:
    """The loss with these weights, window by window."""
    for name, weight in weights.items():
        set_weight(linears[name].module, weight.dequantize())
    windows = zip(inputs.split(1), wanted.split(1), importance.split(1), strict=True)
    losses = [block_loss(run(x), y, weight).item() for x, y, weight in windows]
    return sum(losses) / len(losses)


def _batches(n: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` draws of `size` rows; every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, n)
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
