"""Where a model's embedding table is, and the head that multiplies by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lwquant.errors import UnsupportedModelError


@dataclass(frozen=True)
class Embeddings:
    """Module paths; `factor` is what the model multiplies looked-up rows by, if it does."""

    table: str
    head: str
    tied: bool  # they share the weight
    factor: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that have a weight of their own."""
        return (self.table,) if self.tied else (self.table, self.head)

    @property
    def weights(self) -> tuple[str, str]:
        """The parameters of both, which may be one."""
        return f"{self.table}.weight", f"{self.head}.weight"


def find_embeddings(model: PreTrainedModel) -> Embeddings:
    """Its weights may be on meta. UnsupportedModelError for anything but a lookup and a linear."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a {type(embedding).__name__} and a {type(head).__name__} "
            "for embedding and head, so that embedding_bits must be 16"
        )
    names = {module: name for name, module in model.named_modules()}
    table, last = names[embedding], names[head]
    pairs = {*model.all_tied_weights_keys.items()}
    weights = f"{last}.weight", f"{table}.weight"
    tied = head.weight is embedding.weight or weights in pairs or weights[::-1] in pairs
    return Embeddings(table, last, tied, _factor(embedding))


def _factor(embedding: nn.Embedding) -> float | None:
    if type(embedding).forward is nn.Embedding.forward and embedding.max_norm is None:
        return None
    # BioGPT's is a number, Gemma's a tensor beside the number it is made of.
    for name in ("scalar_embed_scale", "embed_scale"):
        found = getattr(embedding, name, None)
        if isinstance(found, int | float):
            return float(found)
    raise UnsupportedModelError(
        f"what a {type(embedding).__name__} does with its rows is not known, so that "
        "embedding_bits must be 16"
    )
