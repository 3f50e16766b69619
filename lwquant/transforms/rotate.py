"""Rotate the residual stream and the heads' values, with every rotation folded into the weights.

A rotated stream has no outlier channels, and a rotated weight no outlier entries, so that grids fit
better; Ashkboos et al., "QuaRot", arXiv:2404.00456, and Sung et al., "RSQ", arXiv:2503.01820. We
fold everything and add nothing at run time: the result is a plain model of the same architecture.
So the inputs of o_proj are mixed only inside heads, and those of down_proj not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwquant.errors import TransformError
from lwquant.model.decoder import Decoder
from lwquant.model.rewritten import Edit, Rewrite, Step
from lwquant.transforms.hadamard import Rotation, random_rotation
from lwquant.transforms.wiring import BlockWiring, StreamNorm, block_wirings, final_norm, per_head


def rotate(decoder: Decoder, *, stream: bool = True, heads: bool = True, seed: int = 0) -> Rewrite:
    """A rewrite that multiplies stream and heads by Hadamard matrices with random signs.

    With x the stream and Q the rotation, the rotated model's stream is x Q. RMSNorm gains go into
    the linears that read the norm (W -> W diag(g) Q) and the final one into the head, since a norm
    without gain commutes with Q; what writes the stream becomes Qᵀ W, and the embedding E Q. The
    values of every head are rotated by one matrix R in v_proj and o_proj.

    Args:
        stream: rotate the residual stream. Tied embeddings are untied by it.
        heads: rotate the values inside the heads, where they are found.
        seed: of the signs, and of the matrix where no Hadamard matrix of the size is known.

    Raises TransformError for a model whose logits would change; see wiring.py.
    """
    if not stream and not heads:
        raise TransformError("rotate: stream and heads are both off, so nothing would change")
    wirings = block_wirings(decoder)
    edits = _Edits(decoder)
    notes = []
    if stream:
        notes += _rotate_stream(decoder, wirings, edits, seed)
    if heads:
        notes.append(_rotate_heads(decoder, wirings, edits, seed))
    return Rewrite(
        f"rotate stream={stream} heads={heads} seed={seed}",
        edits.by_key,
        edits.copies,
        {"tie_word_embeddings": False} if edits.copies else {},
        tuple(notes),
    )


class _Edits:
    """Edits by the checkpoint's name, gathered by the model's."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.by_key: dict[str, Edit] = {}
        self.copies: dict[str, str] = {}

    def add(self, name: str, *, columns: Sequence[Step] = (), rows: Sequence[Step] = ()) -> None:
        key = self.key(name)
        self.by_key[key] = self.by_key.get(key, Edit()).then(columns=columns, rows=rows)

    def add_outputs(self, name: str, step: Step) -> None:
        """The step over the outputs of the linear `name`: its weight, and its bias if any."""
        self.add(f"{name}.weight", rows=[step])
        if self._decoder.key_of(f"{name}.bias") is not None:
            self.add(f"{name}.bias", rows=[step])

    def key(self, name: str) -> str:
        key = self._decoder.key_of(name)
        return name if key is None else key  # what the file lacks is a copy under the model's name

    def read(self, name: str) -> Tensor:
        return self._decoder.source.read(self.key(name)).double()


def _rotate_stream(
    decoder: Decoder, wirings: Sequence[BlockWiring], edits: _Edits, seed: int
) -> list[str]:
    model: Any = decoder.model
    embedding, head = (
        _name_of(model, module)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    last = final_norm(decoder, head)
    _refuse_others(decoder, {embedding, head, last.name})
    rotation = random_rotation(model.get_submodule(embedding).weight.shape[1], seed)
    notes = [
        f"rotate: the residual stream of {rotation.size} is turned by {_kind(rotation)} (seed "
        f"{seed}), norm gains are folded into the linears"
    ]
    for index, wiring in enumerate(wirings):
        prefix = f"{decoder.blocks_path}.{index}."
        for norm in wiring.norms:
            gains = _fold(edits, prefix, norm)
            for reader in norm.readers:
                edits.add(f"{prefix}{reader}.weight", columns=[*gains, rotation.apply])
        for writer in wiring.writers:
            edits.add_outputs(prefix + writer, rotation.apply)
    if model.get_submodule(head).weight is model.get_submodule(embedding).weight:
        notes += _untie(decoder, embedding, head, edits)
    edits.add(f"{embedding}.weight", columns=[rotation.apply])
    edits.add(f"{head}.weight", columns=[*_fold(edits, "", last), rotation.apply])
    return notes


def _kind(rotation: Rotation) -> str:
    if rotation.is_hadamard:
        return "a Hadamard matrix with random signs"
    return "a random orthogonal matrix (no Hadamard matrix of this size is known here)"


def _fold(edits: _Edits, prefix: str, norm: StreamNorm) -> list[Step]:
    """Make the norm's gain 1; returns the step that its readers take for it."""
    if norm.offset is None:
        return []
    name = f"{prefix}{norm.name}.weight"
    gain, neutral = norm.offset + edits.read(name), 1.0 - norm.offset
    edits.add(name, rows=[lambda values: torch.full_like(values, neutral)])
    return [lambda values: values * gain]


def _untie(decoder: Decoder, embedding: str, head: str, edits: _Edits) -> list[str]:
    """Let the head start from a copy of the embedding."""
    source, original = decoder.source, edits.key(f"{embedding}.weight")
    key = edits.key(f"{head}.weight")
    edits.copies[key] = original
    if key in source.names():
        return []
    n_bytes = torch.Size(source.shape(original)).numel() * source.carried_dtype(original).itemsize
    return [
        "rotate: the head takes the final norm's gain, so it is stored beside the embedding it "
        f"was tied to: {n_bytes:,} bytes more"
    ]


def _rotate_heads(
    decoder: Decoder, wirings: Sequence[BlockWiring], edits: _Edits, seed: int
) -> str:
    sizes: Counter[int] = Counter()
    for index, wiring in enumerate(wirings):
        if wiring.heads is None:
            continue
        prefix = f"{decoder.blocks_path}.{index}."
        found = wiring.heads
        rotation = random_rotation(found.size, seed)
        edits.add_outputs(prefix + found.value, per_head(rotation, found.first_row))
        edits.add(f"{prefix}{found.output}.weight", columns=[per_head(rotation)])
        sizes[found.size] += 1
    if not sizes:
        return "rotate: the values of no head are turned: no block has heads that this finds"
    turned = ", ".join(f"of {size} in {count} blocks" for size, count in sizes.items())
    return f"rotate: the values of heads are turned ({turned} of {len(wirings)}, seed {seed})"


def _refuse_others(decoder: Decoder, known: set[str]) -> None:
    """TransformError for a weight outside the blocks that might touch the stream."""
    inside = f"{decoder.blocks_path}."
    for name, _ in decoder.model.named_parameters():
        if not name.startswith(inside) and name.rpartition(".")[0] not in known:
            raise TransformError(
                f"{name!r} lies outside the blocks and is neither embedding, final norm nor head"
            )


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    names = [name for name, found in model.named_modules() if found is module]
    if len(names) != 1 or not isinstance(module, nn.Linear | nn.Embedding):
        raise TransformError(f"{type(model).__name__} has no plain embedding or head")
    return names[0]
