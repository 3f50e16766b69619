"""Walk the blocks once: record statistics, quantize, and advance both activation streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lwquant.block_tuning import RoundedLinear, tune_block
from lwquant.capture.record import catching_inputs
from lwquant.capture.stats import StatsAccumulator
from lwquant.corrections import Correction
from lwquant.errors import LwquantError, RoundingError
from lwquant.importance import BlockView, TokenWeighting
from lwquant.massive_channels import ROLES, check_roles, massive_rows
from lwquant.model.attention import attention_probabilities
from lwquant.model.decoder import Decoder
from lwquant.model.replay import Ending, Replay, endings
from lwquant.model.residual import Residual, residual_writers
from lwquant.model.structure import get_weight, set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.types import LayerStats, LinearSpec, QuantizedWeight, QuantScheme, Records

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
    tokens: Tensor  # (n_samples, seq_len) that they are of

    @classmethod
    def start(cls, decoder: Decoder, tokens: Tensor, n_calibration: int) -> Streams:
        hidden = torch.cat([decoder.embed(row[None]) for row in tokens])
        return cls(hidden, hidden.clone(), n_calibration, tokens)


@dataclass
class FloatBlock:
    """What the float model's block reads in the calibration samples, and how it is wired."""

    entry: Tensor  # the block's input, (n_calibration, seq_len, hidden)
    inputs: dict[int, list[Tensor]]  # of its linears by input group, one tensor per chunk
    writers: Mapping[str, Residual]  # linears, by name in the block, that write into the residual


@dataclass(frozen=True)
class QuantizedLinearResult:
    """One finished linear: its codes, or its weight where the plan leaves it in 16 bits."""

    spec: LinearSpec
    weight: QuantizedWeight | Tensor


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder,
    streams: Streams,
    schemes: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    correction: Correction | None = None,
    *,
    records: Records | None = None,
    weighting: TokenWeighting | None = None,
    polish: int = 0,
    unclipped_qk: float = 0.0,
    progress: Progress = silent,
) -> Iterator[QuantizedLinearResult]:
    """Quantize every linear in forward order; yields those of a block when the block is done.

    The linears of a block that read the same tensor share one set of statistics; it is recorded
    after the linears before them in the block were quantized. `streams` ends up after the last
    block. `records` asks for what the float model does differently: "owed" for what error
    propagation reads, "all" (the default where there is a correction) for every linear's drift too.
    `weighting` says how much each calibration token counts in a block's statistics (default: all
    the same). `polish` steps of learned rounding bring each block's output closer to the float
    model's; see block_tuning.py. The share `unclipped_qk` of the rows of queries and keys, those of
    the largest outputs, keep their full range; the quantizer must know how.
    """
    check_roles(decoder.linears, unclipped_qk)
    records = records or ("inputs" if correction is None else "all")
    for index in range(decoder.n_blocks):
        with decoder.loaded(index) as block:
            yield from _quantize_block(
                decoder,
                index,
                block,
                streams,
                schemes,
                quantizer,
                correction,
                records,
                weighting,
                polish,
                unclipped_qk,
                progress,
            )
    progress("quantize", "done", decoder.n_blocks, decoder.n_blocks)


def _quantize_block(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    streams: Streams,
    schemes: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    correction: Correction | None,
    records: Records,
    weighting: TokenWeighting | None,
    polish: int,
    unclipped_qk: float,
    progress: Progress,
) -> Iterator[QuantizedLinearResult]:
    groups: dict[int, list[LinearSpec]] = {}
    for spec in sorted(decoder.block_linears(index), key=lambda spec: spec.input_group):
        groups.setdefault(spec.input_group, []).append(spec)
    rounded = {g for g, specs in groups.items() if any(not schemes[s.name].is_float for s in specs)}
    # The float stream goes first, through weights that are still the original ones.
    original = None
    if records != "inputs":
        first = {group: groups[group][0] for group in rounded}
        original = advance_and_catch(decoder, index, block, streams, first, records)
    else:  # without polish only the held-out samples are ever compared with the float model
        advance(decoder, index, block, streams.floating[0 if polish else streams.n_calibration :])
    weights = None
    if weighting is not None and rounded:
        try:
            weights = weighting(view_of(decoder, index, block, streams))
        except LwquantError:
            raise
        except ValueError as error:
            raise RoundingError(f"tokens of block {index}: {error}") from error
    replay, ends = Replay(), _endings(decoder, index, block, groups, streams)
    done: dict[LinearSpec, Tensor | RoundedLinear] = {}
    for group, members in groups.items():
        stats = None
        if group in rounded:
            ending = ends.get(group)
            stats = record_stats(
                decoder, index, block, members, streams, original, records, weights, replay, ending
            )
        for spec in members:
            module = _module(decoder, block, spec)
            if stats is None or schemes[spec.name].is_float:
                done[spec] = get_weight(module)
                continue
            progress("quantize", spec.name, index, decoder.n_blocks)
            rounding = quantizer
            if unclipped_qk and spec.role in ROLES:
                spared = massive_rows(get_weight(module), stats, unclipped_qk)
                settable = cast(Callable[..., QuantizedWeight], quantizer)
                rounding = partial(settable, unclipped=spared)
            done[spec] = _quantize_one(spec, module, stats, schemes, rounding, correction)
    linears = {s.name: one for s, one in done.items() if isinstance(one, RoundedLinear)}
    learned: Mapping[str, QuantizedWeight] = {}
    if polish and linears:
        progress("quantize", f"learned rounding of block {index}", index, decoder.n_blocks)
        rows = slice(streams.n_calibration)
        learned = tune_block(
            partial(decoder.run, index, block),
            linears,
            streams.quantized[rows],
            streams.floating[rows],
            steps=polish,
        )
        replay = Replay()  # every weight may have changed, and so every input
    for spec, one in done.items():
        rounded_to = one.start if isinstance(one, RoundedLinear) else one
        yield QuantizedLinearResult(spec, learned.get(spec.name, rounded_to))
    for number, rows in enumerate(_calibration_chunks(streams)):
        with replay.chunk(number):
            streams.quantized[rows] = decoder.run(index, block, streams.quantized[rows])
    advance(decoder, index, block, streams.quantized[streams.n_calibration :])


def _endings(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    groups: Mapping[int, Sequence[LinearSpec]],
    streams: Streams,
) -> dict[int, Ending]:
    """By input group, the submodule that need not run once the group's inputs are recorded.

    It ends in the group's only linear, and holds none of a later group.
    """
    few = streams.quantized[:2]
    modules = {
        decoder.local_name(spec): _module(decoder, block, spec)
        for members in groups.values()
        for spec in members
    }
    found = endings(block, modules, partial(decoder.run, index, block, few))
    usable = {}
    for group, members in groups.items():
        ending = found.get(decoder.local_name(members[0]))
        if ending is None or len(members) > 1:
            continue
        inside = set(ending.module.modules())
        later = [s for other, specs in groups.items() if other > group for s in specs]
        if not any(_module(decoder, block, spec) in inside for spec in later):
            usable[group] = ending
    return usable


def _module(decoder: Decoder, block: nn.Module, spec: LinearSpec) -> nn.Module:
    return block.get_submodule(decoder.local_name(spec))


def _quantize_one(
    spec: LinearSpec,
    module: nn.Module,
    stats: LayerStats,
    schemes: Mapping[str, QuantScheme],
    quantizer: Quantizer,
    correction: Correction | None,
) -> RoundedLinear:
    target = get_weight(module)
    try:
        if correction is not None:
            target = correction(target, stats)
        quantized = quantizer(target, stats, schemes[spec.name])
    except ValueError as error:
        raise RoundingError(f"{spec.name}: {error}") from error
    set_weight(module, quantized.dequantize())
    return RoundedLinear(module, target, quantized)


def record_stats(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    members: Sequence[LinearSpec],
    streams: Streams,
    original: FloatBlock | None,
    records: Records,
    weights: Tensor | None,
    replay: Replay,
    ending: Ending | None,
) -> LayerStats:
    """Statistics of the input that `members`, linears of the block as it is now, have in common.

    Args:
        original: the float model's block, where the drift from it is wanted; the members' inputs
            are taken out of it. The streams' floating part is past this block then.
        records: see quantize_blocks().
        weights: how much each token counts, (n_calibration, seq_len).
        replay: what need not run any more; `ending` joins it with the inputs found here.
    """
    module = _module(decoder, block, members[0])
    float_inputs, residual = None, None
    if original is not None:
        float_inputs = original.inputs.pop(members[0].input_group, None)
        if len(members) == 1:  # shared inputs lead into a block, writers lead out of it
            residual = original.writers.get(decoder.local_name(members[0]))
    accumulator, kept = StatsAccumulator(), []
    for number, rows in enumerate(_calibration_chunks(streams)):
        entry = streams.quantized[rows]
        stop = residual != "output"
        with replay.chunk(number), catching_inputs({0: module}, stop=stop) as caught:
            output = decoder.run(index, block, entry)
        if ending is not None:
            kept.append(caught[0])
        drift = None if float_inputs is None else float_inputs[number] - caught[0]
        owed = None
        if residual == "output":  # which holds what the linear itself puts out, too
            owed = streams.floating[rows] - output
        elif residual == "input":
            assert original is not None and drift is not None
            own = nn.functional.linear(drift, get_weight(module))
            owed = original.entry[rows] - entry + own.reshape(entry.shape)
        wanted = None if owed is not None and records == "owed" else drift
        accumulator.add(caught[0], wanted, owed, None if weights is None else weights[rows])
    if ending is not None:
        replay.add(ending, kept)
    return accumulator.result()


def view_of(decoder: Decoder, index: int, block: nn.Module, streams: Streams) -> BlockView:
    """The block and its calibration samples on the quantized stream, for a token importance."""
    n = streams.n_calibration
    entry = streams.quantized[:n]
    parts = list(chunks(n, entry.shape[1]))
    return BlockView(
        streams.tokens[:n],
        entry,
        lambda: torch.cat([decoder.run(index, block, entry[rows]) for rows in parts]),
        lambda: (attention_probabilities(decoder, index, block, entry[rows]) for rows in parts),
    )


def advance_and_catch(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    streams: Streams,
    linears: Mapping[int, LinearSpec],
    records: Records,
) -> FloatBlock:
    """Advance the float stream, keeping the inputs of the block and of its linears, by their key.

    One pass through the float block then serves all its linears, for the memory of their inputs.
    Those of a linear whose error can be read off the block's output are kept for "all" only.
    """
    n, seq_len = streams.n_calibration, streams.floating.shape[1]
    entry = streams.floating[:n].clone()
    few = entry[:2]
    writers = residual_writers(block, few, partial(decoder.run, index, block, few))
    modules = {
        key: _module(decoder, block, spec)
        for key, spec in linears.items()
        if records == "all" or writers.get(decoder.local_name(spec)) != "output"
    }
    kept: dict[int, list[Tensor]] = {key: [] for key in modules}
    for rows in chunks(n, seq_len):
        with catching_inputs(modules) as caught:
            output = decoder.run(index, block, entry[rows])
        for key, inputs in caught.items():
            kept[key].append(inputs)
        streams.floating[rows] = output
    advance(decoder, index, block, streams.floating[n:])
    return FloatBlock(entry, kept, writers)


def advance(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor) -> None:
    """Replace hidden (n_samples, seq_len, hidden) by the block's output, in place."""
    for rows in chunks(hidden.shape[0], hidden.shape[1]):
        hidden[rows] = decoder.run(index, block, hidden[rows])


def _calibration_chunks(streams: Streams) -> Iterator[slice]:
    return chunks(streams.n_calibration, streams.quantized.shape[1])


def chunks(n_samples: int, seq_len: int) -> Iterator[slice]:
    """Slices of samples of about TOKENS_PER_RUN tokens."""
    step = max(1, TOKENS_PER_RUN // seq_len)
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))
