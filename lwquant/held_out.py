"""Quality of a plan against the float model, on windows that no statistic has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lwquant.evaluation.measure import Predictions, compare
from lwquant.finetune import last_quantized, tune_scales
from lwquant.guidance import guidance
from lwquant.model.decoder import Decoder
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress, silent
from lwquant.rounding import Rounding
from lwquant.sequential import QuantizedLinearResult, quantize_blocks
from lwquant.streams import Streams
from lwquant.types import BitPlan


@dataclass(frozen=True)
class Quality:
    """Means over predicted tokens; KL in nats."""

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int


def _drop(done: QuantizedLinearResult) -> None:
    pass


def quantize_with(
    decoder: Decoder,
    streams: Streams,
    plan: BitPlan,
    rounding: Rounding,
    progress: Progress = silent,
) -> Iterator[QuantizedLinearResult]:
    """quantize_blocks() with all that a recipe says about rounding."""
    guided = None
    if rounding.guided:
        calibration = streams.tokens[: streams.n_calibration]
        guided = guidance(decoder, calibration, rounding.guided, progress=progress)
    return quantize_blocks(
        decoder,
        streams,
        plan.schemes,
        rounding.quantizer,
        rounding.correction,
        records=rounding.records,
        weighting=rounding.weighting,
        guidance=guided,
        polish=rounding.polish,
        unclipped_qk=rounding.unclipped_qk,
        activation_bits=rounding.activation_bits,
        progress=progress,
    )


def measure_plan(
    decoder: Decoder,
    plan: BitPlan,
    rounding: Rounding,
    tokens: Tensor,
    held_out: Tensor,
    progress: Progress = silent,
    keep: Callable[[QuantizedLinearResult], None] = _drop,
    *,
    tuning: Tensor | None = None,
    copies: int = 1,
) -> Quality:
    """Quantize with a plan, and compare with the float model on the held-out windows.

    Args:
        tokens: calibration windows (n_samples, seq_len).
        held_out: windows (n, seq_len) of the same length.
        keep: called with each linear as it is done, e.g. to write it.
        tuning: windows (n, seq_len) to tune all scales on at the end. The codes of all linears
            are held in memory until then, a byte a weight.
        copies: how often each calibration window is there; see Streams.start().
    """
    n = tokens.shape[0]
    tunes = tuning is not None and len(tuning) > 0
    waiting: list[QuantizedLinearResult] = []
    streams = Streams.start(decoder, torch.cat([tokens, held_out]), n, copies)
    for done in quantize_with(decoder, streams, plan, rounding, progress):
        (waiting.append if tunes else keep)(done)
    quantized = streams.quantized[n:]
    if tuning is not None and waiting:
        weights = {done.spec.name: done.weight for done in waiting}
        weights = tune_scales(decoder, weights, tuning, progress=progress)
        quantized = last_quantized(decoder, weights, held_out)
        for done in waiting:
            keep(replace(done, weight=weights[done.spec.name]))
    return compare_streams(decoder, quantized, streams.floating[n:], held_out)


def measure_on(
    opened: OpenModel,
    plan: BitPlan,
    rounding: Rounding,
    windows: Windows,
    progress: Progress = silent,
    keep: Callable[[QuantizedLinearResult], None] = _drop,
    *,
    tested: Tensor | None = None,
) -> Quality:
    """measure_plan() with each kind of window used for its purpose.

    Args:
        tested: windows (n, seq_len) to compare on instead of the held-out ones.
    """
    return measure_plan(
        opened.decoder,
        plan,
        rounding,
        windows.calibration.tokens,
        windows.held_out if tested is None else tested,
        progress,
        keep,
        tuning=windows.tuning,
        copies=windows.calibration.copies,
    )


def compare_streams(
    decoder: Decoder, quantized: Tensor, floating: Tensor, tokens: Tensor
) -> Quality:
    """Compare two last-block outputs (n_samples, seq_len, hidden) of the same tokens.

    The final norm is the same for both, the head unless it was rounded.
    """
    measured = compare(
        Predictions(quantized, partial(decoder.head, packed=True)),
        tokens,
        reference=Predictions(floating, decoder.head),
    )
    assert measured.reference_perplexity is not None
    assert measured.kl_divergence is not None and measured.top1_agreement is not None
    return Quality(
        measured.perplexity,
        measured.reference_perplexity,
        measured.kl_divergence,
        measured.top1_agreement,
        measured.tokens,
    )
