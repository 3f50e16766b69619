"""The embedding table and the head rounded to a few bits, each weight to its nearest step.

They are most of a small model's file, and the head most of what a decoded token reads. No
calibration is spent on them: at 8 bits, in groups of 64, rounding costs little by itself
(benchmarks/embeddings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwquant.errors import UnsupportedModelError
from lwquant.export.format import tensors_of
from lwquant.model.decoder import Decoder
from lwquant.model.embeddings import Embeddings, find_embeddings
from lwquant.nn.embedding import QuantizedEmbedding, fill_table
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.replace import embedding_modules
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import QuantizedWeight

GROUP_SIZE = 64
CHUNK_VALUES = 2**24  # rounded at once: 64 MiB in float32


@dataclass(frozen=True)
class RoundedEmbeddings:
    """What is stored in place of the embedding's weight, and of the head's where it has its own."""

    places: Embeddings
    schemes: Mapping[str, QuantScheme]  # by module path
    tensors: Mapping[str, Tensor]  # as they are stored, by name

    @property
    def replaced(self) -> frozenset[str]:
        """Parameters of the model that are not stored as they are."""
        return frozenset(f"{name}.weight" for name in (self.places.table, self.places.head))


@torch.no_grad()
def round_embeddings(decoder: Decoder, bits: int) -> RoundedEmbeddings:
    """Round what the decoder holds. UnsupportedModelError where the model has no plain ones.

    From then on the decoder can run with the rounded ones: see Decoder.embed().
    """
    places = find_embeddings(decoder.model)
    scheme = QuantScheme(bits, GROUP_SIZE, symmetric=True, scale_bits=8)
    weights = {
        name: _rounded(decoder.model.get_parameter(f"{name}.weight"), scheme)
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
    return RoundedEmbeddings(places, dict.fromkeys(weights, scheme), tensors)


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


def _rounded(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Rows are rounded each by itself, so some at a time will do."""
    rows = max(1, CHUNK_VALUES // weight.shape[1])
    parts = [rtn(part.cpu(), None, scheme, search=True) for part in weight.split(rows)]
    return QuantizedWeight(
        scheme,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
    )
