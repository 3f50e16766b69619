"""Walk the blocks once: record statistics, quantize, and advance both activation streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lwquant.capture.record import inputs_of
from lwquant.capture.stats import StatsAccumulator
from lwquant.corrections import Correction
from lwquant.errors import RoundingError
from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.types import LayerStats, LinearSpec, QuantizedWeight, QuantScheme

TOKENS_PER_RUN = 2048  # activations of one block call; large enough for the matrix products


@dataclass
class Streams:
    """Hidden states (n_samples, seq_len, hidden) after the blocks done so far.

    The first `n_calibration` samples feed the statistics; the rest are only carried along, so that
    the quantized model can be compared with the float one on text it was not fitted to.
    """

    quantized: Tensor
    floating: Tensor
    n_calibration: int

    @classmethod
    def start(cls, decoder: Decoder, tokens: Tensor, n_calibration: int) -> Streams:
        hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
        return cls(hidden, hidden.clone(), n_calibration)


@dataclass(frozen=True)
class QuantizedLinearResult:
    """One finished linear: its codes, or its weight where the plan leaves it in 16 bits."""

    spec: LinearSpec
    weight: QuantizedWeight | Tensor
    output_error: float  # ‖(W* − Ŵ) X̂‖² / ‖W* X̂‖² on the calibration inputs; 0 if left alone


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder,
    streams: Streams,
    schemes: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    correction: Correction | None = None,
    *,
    needs_drift: bool | None = None,
    progress: Progress = silent,
) -> Iterator[QuantizedLinearResult]:
    """Quantize every linear in forward order; yields each as it is done.

    The linears of a block that read the same tensor share one set of statistics; it is recorded
    after the linears before them in the block were quantized. `streams` ends up after the last
    block. `needs_drift` asks for Σ (x − x̂) x̂ᵀ (default: when there is a correction).
    """
    needs_drift = correction is not None if needs_drift is None else needs_drift
    for index in range(decoder.n_blocks):
        specs = decoder.block_linears(index)
        with decoder.loaded(index) as block:
            original = deepcopy(block)
            for group in sorted({spec.input_group for spec in specs}):
                members = [spec for spec in specs if spec.input_group == group]
                rounded = [spec for spec in members if not schemes[spec.name].is_float]
                stats = None
                if rounded:
                    name = decoder.local_name(rounded[0])
                    stats = record_stats(
                        decoder, index, block, original if needs_drift else None, name, streams
                    )
                for spec in members:
                    module = block.get_submodule(decoder.local_name(spec))
                    if stats is None or schemes[spec.name].is_float:
                        yield QuantizedLinearResult(spec, get_weight(module), 0.0)
                        continue
                    progress("quantize", spec.name, index, decoder.n_blocks)
                    yield _quantize_one(spec, module, stats, schemes, quantizer, correction)
            advance(decoder, index, block, streams.quantized)
            # Without drift, only the held-out samples are ever compared with the float model.
            first = 0 if needs_drift else streams.n_calibration
            advance(decoder, index, original, streams.floating[first:])
    progress("quantize", "done", decoder.n_blocks, decoder.n_blocks)


def _quantize_one(
    spec: LinearSpec,
    module: nn.Module,
    stats: LayerStats,
    schemes: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    correction: Correction | None,
) -> QuantizedLinearResult:
    target = get_weight(module)
    try:
        if correction is not None:
            target = correction(target, stats)
        quantized = quantizer(target, stats, schemes[spec.name])
    except ValueError as error:
        raise RoundingError(f"{spec.name}: {error}") from error
    rounded = quantized.dequantize()
    set_weight(module, rounded)
    return QuantizedLinearResult(
        spec, quantized, relative_output_error(target, rounded, stats.hessian)
    )


def relative_output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ); 0 where the layer's output is zero anyway."""
    difference = rounded - weight
    energy = ((weight @ hessian) * weight).sum().item()
    return ((difference @ hessian) * difference).sum().item() / energy if energy > 0 else 0.0


def record_stats(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    original: nn.Module | None,
    name: str,
    streams: Streams,
) -> LayerStats:
    """Statistics of the input of linear `name`; with drift when the float block is given."""
    accumulator = StatsAccumulator()
    for rows in chunks(streams.n_calibration, streams.quantized.shape[1]):
        inputs = _input(decoder, index, block, name, streams.quantized[rows])
        float_inputs = None
        if original is not None:
            float_inputs = _input(decoder, index, original, name, streams.floating[rows])
        accumulator.add(inputs, float_inputs)
    return accumulator.result()


def _input(decoder: Decoder, index: int, block: nn.Module, name: str, hidden: Tensor) -> Tensor:
    module = block.get_submodule(name)
    return inputs_of({0: module}, lambda: decoder.run(index, block, hidden))[0]


def advance(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor) -> None:
    """Replace hidden (n_samples, seq_len, hidden) by the block's output, in place."""
    for rows in chunks(hidden.shape[0], hidden.shape[1]):
        hidden[rows] = decoder.run(index, block, hidden[rows])


def chunks(n_samples: int, seq_len: int) -> Iterator[slice]:
    """Slices of samples of about TOKENS_PER_RUN tokens."""
    step = max(1, TOKENS_PER_RUN // seq_len)
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))
