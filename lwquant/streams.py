"""The calibration tokens' hidden states on their way through the quantized and the float model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lwquant.capture.record import catching_inputs
from lwquant.importance import BlockView
from lwquant.model.attention import attention_probabilities
from lwquant.model.decoder import Decoder
from lwquant.model.residual import Residual, residual_writers
from lwquant.types import LinearSpec, Records

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
    first_half: Tensor | None = None  # (n_calibration, seq_len) bool; None: half of every chunk

    @classmethod
    def start(
        cls, decoder: Decoder, tokens: Tensor, n_calibration: int, copies: int = 1
    ) -> Streams:
        """Both streams before the first block.

        Args:
            copies: how often each calibration window is there, in the order of shifted_around();
                more than once takes two different windows at least.
        """
        quantized, floating = (
            torch.cat([decoder.embed(row[None], packed=packed) for row in tokens])
            for packed in (True, False)
        )
        half = first_half(n_calibration, tokens.shape[1], copies) if copies > 1 else None
        return cls(quantized, floating, n_calibration, tokens, half)


@dataclass
class FloatBlock:
    """What the float model's block reads in the calibration samples, and how it is wired."""

    entry: Tensor  # the block's input, (n_calibration, seq_len, hidden)
    inputs: dict[int, list[Tensor]]  # of its linears by input group, one tensor per chunk
    writers: Mapping[str, Residual]  # linears, by name in the block, that write into the residual


def first_half(n_samples: int, seq_len: int, copies: int) -> Tensor:
    """Which tokens form the half of a cross-validation, (n_samples, seq_len) bool.

    Those of every other window, and of its copies: what is learned from one half would not be
    tested on the other if it held the same text.
    """
    chosen = torch.arange(n_samples // copies) % 2 == 0
    return chosen.repeat(copies)[:, None].expand(-1, seq_len).clone()


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
        key: module_of(decoder, block, spec)
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


def calibration_chunks(streams: Streams) -> Iterator[slice]:
    return chunks(streams.n_calibration, streams.quantized.shape[1])


def chunks(n_samples: int, seq_len: int) -> Iterator[slice]:
    """Slices of samples of about TOKENS_PER_RUN tokens."""
    step = max(1, TOKENS_PER_RUN // seq_len)
    for start in range(0, n_samples, step):
        yield slice(start, min(start + step, n_samples))


def module_of(decoder: Decoder, block: nn.Module, spec: LinearSpec) -> nn.Module:
    return block.get_submodule(decoder.local_name(spec))
