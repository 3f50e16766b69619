"""The model block by block, with the input statistics of every linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lwquant.capture.record import catching_inputs
from lwquant.capture.stats import StatsAccumulator
from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.streams import advance, chunks
from lwquant.types import LayerStats, LinearSpec

Before = Callable[[int, nn.Module, Tensor], None]


@dataclass(frozen=True)
class BlockVisit:
    """One loaded block on its way through the calibration tokens."""

    index: int
    block: nn.Module
    linears: tuple[LinearSpec, ...]
    inputs: Tensor  # (n_samples, seq_len, hidden)
    outputs: Tensor  # (n_samples, seq_len, hidden)


@torch.no_grad()
def walk_blocks(
    decoder: Decoder, tokens: Tensor, before: Before | None = None, *, packed: bool = False
) -> Iterator[BlockVisit]:
    """Visit the blocks in forward order; a block stays loaded until the next one is asked for.

    `before` sees every loaded block with its index and its inputs, and may change its weights
    before it runs; `packed` as for Decoder.embed().
    """
    hidden = torch.cat([decoder.embed(row[None], packed=packed) for row in tokens])
    for index in range(decoder.n_blocks):
        with decoder.loaded(index) as block:
            if before is not None:
                before(index, block, hidden)
            output = hidden.clone()
            advance(decoder, index, block, output)
            yield BlockVisit(index, block, decoder.block_linears(index), hidden, output)
        hidden = output


def block_inputs(
    decoder: Decoder, tokens: Tensor, before: Before | None = None
) -> tuple[list[Tensor], Tensor]:
    """The input of every block, and the output of the last, (n_samples, seq_len, hidden) each."""
    inputs = []
    outputs = torch.empty(0)
    for visit in walk_blocks(decoder, tokens, before):
        inputs.append(visit.inputs)
        outputs = visit.outputs
    return inputs, outputs


class InputSums:
    """Statistics by input group of one block's linears, from inputs shown a few at a time."""

    def __init__(self, linears: Sequence[LinearSpec]) -> None:
        # What linears have in common is added once, when the first of them is shown.
        self._first = {spec.input_group: spec for spec in reversed(linears)}
        self._sums = {group: StatsAccumulator() for group in self._first}

    @property
    def specs(self) -> dict[int, LinearSpec]:
        """The linears whose inputs are wanted, by input group."""
        return self._first

    def add(self, spec: LinearSpec, inputs: Tensor) -> None:
        """Take (..., in_features) inputs of any of the linears."""
        if spec == self._first[spec.input_group]:
            self._sums[spec.input_group].add(inputs)

    def results(self) -> dict[int, LayerStats]:
        return {group: accumulator.result() for group, accumulator in self._sums.items()}


@torch.no_grad()
def block_stats(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, *, onward: bool = False
) -> dict[int, LayerStats]:
    """Statistics by input group of one block for its inputs (n_samples, seq_len, hidden).

    With `onward` the same pass replaces `hidden` by the block's output.
    """
    sums = InputSums(decoder.block_linears(index))
    modules = {
        group: block.get_submodule(decoder.local_name(spec)) for group, spec in sums.specs.items()
    }
    for rows in chunks(*hidden.shape[:2]):
        with catching_inputs(modules, stop=not onward) as caught:
            output = decoder.run(index, block, hidden[rows])
        for group, inputs in caught.items():
            sums.add(sums.specs[group], inputs)
        if onward:
            hidden[rows] = output
    return sums.results()


@torch.no_grad()
def weight_changes(
    module: nn.Module, stats: LayerStats, schemes: Sequence[QuantScheme], quantizer: Quantizer
) -> Tensor:
    """Ŵ − W under each scheme, (n_schemes, out_features, in_features); zero for 16 bits."""
    weight = get_weight(module)
    changes = torch.zeros(len(schemes), *weight.shape, device=weight.device)
    for position, scheme in enumerate(schemes):
        if not scheme.is_float:
            changes[position] = quantizer(weight, stats, scheme).dequantize() - weight
    return changes
