"""Tune the scales of a quantized model by its KL to the original, all linears together.

Rounding and propagation look at one linear or one block at a time. Here the codes stay as they are
and the scales follow the gradient of the loss that counts, as in Chen et al., "EfficientQAT",
arXiv:2407.11062 (second phase) and Kim et al., "PEQA", arXiv:2305.14152, with the original model's
predictions as the target. One block is in memory at a time, with the inputs of all blocks for the
windows of one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.model.structure import set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers.grid import in_window, storable_scale
from lwquant.sensitivity.backward import backward_block, kl_gradient, weight_gradient
from lwquant.sensitivity.walk import block_inputs, walk_blocks
from lwquant.types import QuantizedWeight

WARMUP_STEPS = 4
DECAYS = (0.9, 0.99)  # of Adam's means of the gradient and of its square


@dataclass
class _Tuned:
    """One linear on its way: scales are those it came with times exp(shift), rounded."""

    weight: QuantizedWeight
    shift: Tensor  # (out_features, n_groups)
    mean: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.square = torch.zeros_like(self.shift), torch.zeros_like(self.shift)

    def scales(self) -> Tensor:
        """As they can be stored. Gradients pass the rounding as if it were not there."""
        scheme = self.weight.scheme
        moved = self.weight.scales.float() * self.shift.exp()
        return in_window(storable_scale(moved, scheme), scheme)

    def dequantize(self) -> Tensor:
        on_grid = self.weight.steps() * self.scales()[:, self.weight.group_of_inputs()]
        return self.weight.plus_outliers(on_grid)

    def slope(self, gradient: Tensor) -> Tensor:
        """Gradient in the shift, from that in the weight (out_features, in_features)."""
        scales = self.scales()
        sums, groups = torch.zeros_like(scales), self.weight.group_of_inputs()
        return sums.index_add_(1, groups, gradient * self.weight.steps()) * scales

    def step(self, gradient: Tensor, rate: float, number: int) -> None:
        """One step of Adam, the `number`th, from 1."""
        first, second = DECAYS
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        mean = self.mean / (1 - first**number)
        square = self.square / (1 - second**number)
        self.shift.sub_(rate * mean / square.sqrt().add_(1e-12))


@torch.no_grad()
def tune_scales(
    decoder: Decoder,
    weights: Mapping[str, QuantizedWeight | Tensor],
    tokens: Tensor,
    *,
    passes: int = 1,
    batch: int = 4,
    rate: float = 5e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, QuantizedWeight | Tensor]:
    """The same codes with scales of less KL to the original on `tokens`.

    Args:
        weights: of every linear by name; those that are tensors stay as they are.
        tokens: windows (n_samples, seq_len), best others than the codes were fitted to.
        passes: over the windows, in an order drawn by `seed`, `batch` windows a step.
        rate: relative change of a scale in the first full step; falls to 0 along a cosine.
    """
    reference = decoder.last_hidden(tokens)
    tuned = {
        name: _Tuned(weight, torch.zeros_like(weight.scales, dtype=torch.float32))
        for name, weight in weights.items()
        if isinstance(weight, QuantizedWeight)
    }
    batches = list(_batches(len(tokens), batch, passes, seed))

    current = {**weights, **tuned}

    def put_in(index: int, block: nn.Module, hidden: Tensor | None = None) -> None:
        _put_in(decoder, index, block, current)

    for number, rows in enumerate(batches):
        progress("tune", f"step {number + 1}", number, len(batches))
        inputs, last = block_inputs(decoder, tokens[rows], put_in)
        with torch.enable_grad():
            gradient = kl_gradient(decoder, last, reference[rows])
        slopes = {}
        for index in reversed(range(decoder.n_blocks)):
            with decoder.loaded(index) as block, torch.enable_grad():
                put_in(index, block)
                found = backward_block(
                    decoder, index, block, inputs[index], gradient, weight_gradient
                )
            for spec, full in found.items():
                if spec.name in tuned:
                    slopes[spec.name] = tuned[spec.name].slope(full)
            inputs.pop()
        step = rate * _share_of_rate(number, len(batches))
        for name, slope in slopes.items():
            tuned[name].step(slope / tokens[rows].numel(), step, number + 1)
    progress("tune", "done", len(batches), len(batches))
    return {
        name: replace(weight, scales=tuned[name].scales().half())
        if isinstance(weight, QuantizedWeight)
        else weight
        for name, weight in weights.items()
    }


@torch.no_grad()
def last_quantized(
    decoder: Decoder, weights: Mapping[str, QuantizedWeight | Tensor], tokens: Tensor
) -> Tensor:
    """The last block's output (n_samples, seq_len, hidden) of the model with these weights."""
    outputs = torch.empty(0)
    for visit in walk_blocks(
        decoder,
        tokens,
        lambda index, block, _: _put_in(decoder, index, block, weights),
        packed=True,
    ):
        outputs = visit.outputs
    return outputs


def _put_in(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    weights: Mapping[str, QuantizedWeight | _Tuned | Tensor],
) -> None:
    for spec in decoder.block_linears(index):
        kept = weights[spec.name]
        weight = kept.float() if isinstance(kept, Tensor) else kept.dequantize()
        set_weight(block.get_submodule(decoder.local_name(spec)), weight)


def _batches(n: int, size: int, passes: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, size):
            yield order[start : start + size]


def _share_of_rate(number: int, total: int) -> float:
    warmed = min(1.0, (number + 1) / WARMUP_STEPS)
    return warmed * (1 + math.cos(math.pi * number / total)) / 2
