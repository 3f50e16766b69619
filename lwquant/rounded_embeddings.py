"""The embedding table and the head rounded to a few bits.

They are most of a small model's file, and the head most of what a decoded token reads. A head, and
a table that is one, too, is rounded by GPTQ on what the float model's head reads, which halves the
KL (benchmarks/embeddings.py); a table that is only looked up, each weight to its nearest step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwquant.capture.record import catching_inputs
from lwquant.capture.stats import StatsAccumulator
from lwquant.errors import UnsupportedModelError
from lwquant.export.format import tensors_of
from lwquant.model.decoder import Decoder
from lwquant.model.embeddings import Embeddings, find_embeddings
from lwquant.nn.embedding import QuantizedEmbedding, fill_table
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.replace import embedding_modules
from lwquant.quantizers.gptq import gptq
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight, join_rows

GROUP_SIZE = 64
CHUNK_VALUES = 2**24  # rounded at once: 64 MiB in float32
SHRINKAGE = 0.35  # as of the linears, see quantizers/quantease.py


@dataclass(frozen=True)
class RoundedEmbeddings:
    """What is stored in place of the embedding's weight, and of the head's where it has its own."""

    places: Embeddings
    scheme: QuantScheme
    tensors: Mapping[str, Tensor]  # as they are stored, by name
    modules: Mapping[str, nn.Module]  # what computes with them, for Decoder.packed

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """By module path."""
        return dict.fromkeys(self.places.names, self.scheme)


def embedding_scheme(bits: int) -> QuantScheme:
    return QuantScheme(bits, GROUP_SIZE, symmetric=True, scale_bits=8)


@torch.no_grad()
def head_stats(decoder: Decoder, hidden: Tensor) -> LayerStats:
    """Of what the head reads after a last block's output of (n_samples, seq_len, hidden).

    UnsupportedModelError where the model computes its logits without calling the head.
    """
    accumulator = StatsAccumulator()
    head: Any = decoder.model.get_output_embeddings()
    for row in hidden:
        with catching_inputs({0: head}, stop=True) as caught:
            decoder.head(row[None])
        if not caught:
            raise UnsupportedModelError(
                f"{type(decoder.model).__name__} does not call its head, so that embedding_bits "
                "must be 16"
            )
        accumulator.add(caught[0])
    return accumulator.result()


@torch.no_grad()
def round_embeddings(decoder: Decoder, bits: int, stats: LayerStats) -> RoundedEmbeddings:
    """Round what the decoder holds. UnsupportedModelError where the model has no plain ones.

    From then on the decoder can run with the rounded ones: see Decoder.embed().

    Args:
        stats: head_stats().
    """
    places = find_embeddings(decoder.model)
    scheme = embedding_scheme(bits)

    def looked_up(weight: Tensor) -> QuantizedWeight:
        return rtn(weight, None, scheme, search=True)

    def multiplied(weight: Tensor) -> QuantizedWeight:
        return gptq(weight, stats, scheme, shrinkage=SHRINKAGE)

    weights = {
        name: _by_rows(
            decoder.model.get_parameter(f"{name}.weight"),
            multiplied if places.tied or name == places.head else looked_up,
        )
        for name in places.names
    }
    decoder.packed = _modules(decoder, places, weights)
    try:  # a forward may ask modules for more than their results
        probe = torch.zeros(1, 2, dtype=torch.long)
        decoder.head(decoder.embed(probe, packed=True), packed=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} does not run with a packed embedding and head "
            f"({error}), so that embedding_bits must be 16"
        ) from error
    tensors = {
        key: tensor for name, weight in weights.items() for key, tensor in tensors_of(name, weight)
    }
    return RoundedEmbeddings(places, scheme, tensors, decoder.packed)


def _modules(
    decoder: Decoder, places: Embeddings, weights: Mapping[str, QuantizedWeight]
) -> dict[str, nn.Module]:
    """What computes with them, by the names of the modules whose place they take."""
    schemes = {name: weight.scheme for name, weight in weights.items()}
    made = embedding_modules(decoder.model, places, schemes)
    for name, weight in weights.items():
        module: Any = made[name]
        if isinstance(module, QuantizedEmbedding):
            fill_table(module, weight)
        else:
            made[name] = QuantizedLinear.from_weight(weight, module.bias)
    return {name: module.to(decoder.device) for name, module in made.items()}


def _by_rows(weight: Tensor, rounded: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Rows are rounded each by itself, so some at a time will do."""
    rows = max(1, CHUNK_VALUES // weight.shape[1])
    return join_rows([rounded(part.cpu()) for part in weight.split(rows)])
