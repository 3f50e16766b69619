"""Walk the blocks once: record statistics, quantize, and advance both activation streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lwquant.activation_choice import activation_bits, sample_of, takes_int8_weights
from lwquant.block_tuning import RoundedLinear, tune_block
from lwquant.capture.record import catching_inputs
from lwquant.capture.row_groups import RowGroupSums, results, row_groups
from lwquant.corrections import Correction
from lwquant.errors import LwquantError, RoundingError
from lwquant.importance import TokenWeighting
from lwquant.massive_channels import ROLES, check_roles, massive_rows
from lwquant.model.decoder import Decoder
from lwquant.model.replay import Ending, Replay, group_endings
from lwquant.model.structure import get_weight, set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.streams import (
    FloatBlock,
    Streams,
    advance,
    advance_and_catch,
    calibration_chunks,
    module_of,
    view_of,
)
from lwquant.types import LayerStats, LinearSpec, QuantizedWeight, Records, join_rows


@dataclass(frozen=True)
class QuantizedLinearResult:
    """One finished linear: its codes, or its weight where the plan leaves it in 16 bits."""

    spec: LinearSpec
    weight: QuantizedWeight | Tensor


@dataclass(frozen=True)
class _Walk:
    """What is the same for every block; see quantize_blocks()."""

    decoder: Decoder
    streams: Streams
    schemes: Mapping[str, QuantScheme]
    quantizer: Quantizer
    correction: Correction | None
    records: Records
    weighting: TokenWeighting | None
    guidance: Mapping[str, Tensor] | None
    polish: int
    unclipped_qk: float
    activation_bits: int
    progress: Progress


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
    guidance: Mapping[str, Tensor] | None = None,
    polish: int = 0,
    unclipped_qk: float = 0.0,
    activation_bits: int = 0,
    progress: Progress = silent,
) -> Iterator[QuantizedLinearResult]:
    """Quantize every linear in forward order; yields those of a block when the block is done.

    The linears of a block that read the same tensor share one set of statistics; it is recorded
    after the linears before them in the block were quantized. `streams` ends up after the last
    block. `records` asks for what the float model does differently: "owed" for what error
    propagation reads, "all" (the default where there is a correction) for every linear's drift too.
    `weighting` says how much each calibration token counts in a block's statistics (default: all
    the same). `guidance` says it for each linear by name and each group of its rows instead,
    (n_calibration, seq_len, n_groups); every group of rows then has statistics of its own and is
    rounded by itself; see guidance.py. `polish` steps of learned rounding bring each block's output
    closer to the float model's; see block_tuning.py. The share `unclipped_qk` of the rows of
    queries and keys, those of the largest outputs, keep their full range; the quantizer must know
    how, and there can be no `guidance`. `activation_bits` is what kernels are to hold the linears'
    inputs in, 0 what activation_choice.py finds.
    """
    check_roles(decoder.linears, unclipped_qk)
    records = records or ("inputs" if correction is None else "all")
    walk = _Walk(
        decoder,
        streams,
        schemes,
        quantizer,
        correction,
        records,
        weighting,
        guidance,
        polish,
        unclipped_qk,
        activation_bits,
        progress,
    )
    for index in range(decoder.n_blocks):
        with decoder.loaded(index) as block:
            yield from _quantize_block(walk, index, block)
    progress("quantize", "done", decoder.n_blocks, decoder.n_blocks)


def _quantize_block(walk: _Walk, index: int, block: nn.Module) -> Iterator[QuantizedLinearResult]:
    decoder, streams, schemes, progress = walk.decoder, walk.streams, walk.schemes, walk.progress
    groups: dict[int, list[LinearSpec]] = {}
    for spec in sorted(decoder.block_linears(index), key=lambda spec: spec.input_group):
        groups.setdefault(spec.input_group, []).append(spec)
    rounded = {g for g, specs in groups.items() if any(not schemes[s.name].is_float for s in specs)}
    # The float stream goes first, through weights that are still the original ones.
    original = None
    if walk.records != "inputs":
        first = {group: groups[group][0] for group in rounded}
        original = advance_and_catch(decoder, index, block, streams, first, walk.records)
    else:  # without polish only the held-out samples are ever compared with the float model
        start = 0 if walk.polish else streams.n_calibration
        advance(decoder, index, block, streams.floating[start:])
    weights = _token_weights(walk, index, block) if rounded else None
    replay, few = Replay(), streams.quantized[:2]
    modules = {
        group: {decoder.local_name(spec): module_of(decoder, block, spec) for spec in members}
        for group, members in groups.items()
    }
    ends = group_endings(block, modules, partial(decoder.run, index, block, few))
    done: dict[LinearSpec, Tensor | RoundedLinear] = {}
    samples: dict[int, Tensor] = {}  # of the inputs of each group
    for group, members in groups.items():
        stats: Mapping[LinearSpec, list[LayerStats]] = {}
        if group in rounded:
            ending = ends.get(group)
            stats, samples[group] = record_stats(
                walk, index, block, members, original, weights, replay, ending
            )
        for spec in members:
            module = module_of(decoder, block, spec)
            if schemes[spec.name].is_float:
                done[spec] = get_weight(module)
                continue
            progress("quantize", spec.name, index, decoder.n_blocks)
            done[spec] = _quantize_one(walk, spec, module, stats[spec])
    linears = {s.name: one for s, one in done.items() if isinstance(one, RoundedLinear)}
    learned: Mapping[str, QuantizedWeight] = {}
    if walk.polish and linears:
        progress("quantize", f"learned rounding of block {index}", index, decoder.n_blocks)
        rows = slice(streams.n_calibration)
        learned = tune_block(
            partial(decoder.run, index, block),
            linears,
            streams.quantized[rows],
            streams.floating[rows],
            steps=walk.polish,
        )
        replay = Replay()  # every weight may have changed, and so every input
    for spec, one in done.items():
        if isinstance(one, RoundedLinear):
            final = learned.get(spec.name, one.start)
            layer = samples[spec.input_group], one.target, final
            bits = walk.activation_bits or activation_bits(*layer)
            final = replace(
                final, activation_bits=bits, int8_weights=bits == 8 and takes_int8_weights(*layer)
            )
            yield QuantizedLinearResult(spec, final)
        else:
            yield QuantizedLinearResult(spec, one)
    for number, rows in enumerate(calibration_chunks(streams)):
        with replay.chunk(number):
            streams.quantized[rows] = decoder.run(index, block, streams.quantized[rows])
    advance(decoder, index, block, streams.quantized[streams.n_calibration :])


def _token_weights(walk: _Walk, index: int, block: nn.Module) -> Tensor | None:
    """What the run's weighting makes of the block's tokens, (n_calibration, seq_len)."""
    if walk.weighting is None:
        return None
    try:
        return walk.weighting(view_of(walk.decoder, index, block, walk.streams))
    except LwquantError:
        raise
    except ValueError as error:
        raise RoundingError(f"tokens of block {index}: {error}") from error


def _sums(
    walk: _Walk, members: Sequence[LinearSpec], weights: Tensor | None
) -> dict[LinearSpec, RowGroupSums]:
    """Where the statistics of linears that share their input are summed: together, or apart."""
    rounded = [spec for spec in members if not walk.schemes[spec.name].is_float]
    if walk.guidance is None:
        shared = RowGroupSums(None if weights is None else weights[..., None])
        return dict.fromkeys(rounded, shared)
    return {spec: RowGroupSums(walk.guidance[spec.name]) for spec in rounded}


def _quantize_one(
    walk: _Walk, spec: LinearSpec, module: nn.Module, stats: Sequence[LayerStats]
) -> RoundedLinear:
    """Correct and round each group of rows by its own statistics."""
    weight, quantizer = get_weight(module), walk.quantizer
    if walk.unclipped_qk and spec.role in ROLES:
        (own,) = stats
        spared = massive_rows(weight, own, walk.unclipped_qk)
        quantizer = partial(cast(Callable[..., QuantizedWeight], quantizer), unclipped=spared)
    targets, rounded = [], []
    try:
        for rows, own in zip(row_groups(len(weight), len(stats)), stats, strict=True):
            target = weight[rows]
            if walk.correction is not None:
                target = walk.correction(target, own)
            targets.append(target)
            rounded.append(quantizer(target, own, walk.schemes[spec.name]))
    except ValueError as error:
        raise RoundingError(f"{spec.name}: {error}") from error
    quantized = join_rows(rounded)
    set_weight(module, quantized.dequantize())
    return RoundedLinear(module, targets[0] if len(stats) == 1 else torch.cat(targets), quantized)


def record_stats(
    walk: _Walk,
    index: int,
    block: nn.Module,
    members: Sequence[LinearSpec],
    original: FloatBlock | None,
    weights: Tensor | None,
    replay: Replay,
    ending: Ending | None,
) -> tuple[dict[LinearSpec, list[LayerStats]], Tensor]:
    """Statistics of the input that `members`, linears of the block as it is now, have in common.

    With them some of the inputs as they are, (n, in_features).

    Args:
        original: the float model's block, where the drift from it is wanted; the members' inputs
            are taken out of it. The streams' floating part is past this block then.
        weights: how much each token counts, (n_calibration, seq_len), where walk has no guidance.
        replay: what need not run any more; `ending` joins it with the inputs found here.
    """
    decoder, streams = walk.decoder, walk.streams
    module = module_of(decoder, block, members[0])
    float_inputs, residual = None, None
    if original is not None:
        float_inputs = original.inputs.pop(members[0].input_group, None)
        if len(members) == 1:  # shared inputs lead into a block, writers lead out of it
            residual = original.writers.get(decoder.local_name(members[0]))
    sums, kept, sample = _sums(walk, members, weights), [], torch.empty(0)
    for number, rows in enumerate(calibration_chunks(streams)):
        entry = streams.quantized[rows]
        stop = residual != "output"
        with replay.chunk(number), catching_inputs({0: module}, stop=stop) as caught:
            output = decoder.run(index, block, entry)
        if number == 0:
            sample = sample_of(caught[0])
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
        wanted = None if owed is not None and walk.records == "owed" else drift
        first = None if streams.first_half is None else streams.first_half[rows]
        for each in set(sums.values()):
            each.add(rows, caught[0], wanted, owed, first)
    if ending is not None:
        replay.add(ending, kept)
    return results(sums), sample
