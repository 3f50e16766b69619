"""Writes a quantized model as a transformers folder, one linear at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lwquant.errors import OutputError
from lwquant.export.format import quantization_config, tensors_of
from lwquant.export.shards import ShardWriter
from lwquant.model.checkpoint import WeightSource
from lwquant.model.model_folder import CONFIG, member
from lwquant.nn.replace import find_linear
from lwquant.rounded_embeddings import RoundedEmbeddings
from lwquant.scheme import FLOAT_BITS, QuantScheme
from lwquant.types import LinearSpec, QuantizedWeight

MAX_SHARD_BYTES = 2 * 2**30

# Everything beside the weights that transformers reads for a text model. A list of what may be
# copied, so that no code (*.py), pickle (*.bin, *.pt) or second set of weights ever travels along.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


class ModelWriter:
    """Takes linears as they are quantized, then everything else from the checkpoint.

    Args:
        folder: where the model goes; it must exist.
        checkpoint: the model that is being quantized.
        linears: every linear that will be handed to `linear`.
        model: the architecture, its weights may be on meta. Tensors are stored under the names
            in its state dict, whatever prefix the checkpoint uses: another prefix loads too, but
            transformers 5.17 then ignores the `dtype` argument for renamed tensors.
        key_of: the checkpoint's name of a model parameter, None where it has none.
        embeddings: embedding and the head, where they are not stored as the checkpoint has them.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: WeightSource,
        linears: Iterable[LinearSpec],
        model: nn.Module,
        key_of: Callable[[str], str | None],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        embeddings: RoundedEmbeddings | None = None,
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._model = model
        self._shards = ShardWriter(folder, max_shard_bytes)
        self._names = {key: name for name in model.state_dict() if (key := key_of(name))}
        self._missing = {spec.name for spec in linears}
        self._weights = {f"{name}.weight" for name in self._missing}
        self._embeddings = embeddings
        self._written: dict[str, QuantScheme] = {}
        # Of the quantized linears written so far.
        self.activation_bits: dict[str, int] = {}
        self.int8_weights: dict[str, bool] = {}

    def linear(self, spec: LinearSpec, weight: QuantizedWeight | Tensor) -> None:
        """Write one linear: quantized, or float16/bfloat16 (out_features, in_features).

        Raises OutputError for a linear that is unknown or already written, and ValueError for a
        weight of another shape or dtype.
        """
        if spec.name not in self._missing:
            state = "already written" if spec.name in self._written else "not one of the linears"
            raise OutputError(f"{spec.name!r} is {state}")
        shape = (weight.codes if isinstance(weight, QuantizedWeight) else weight).shape
        if shape != (spec.out_features, spec.in_features):
            raise ValueError(
                f"{spec.name}: weight is {tuple(shape)}, the linear "
                f"{(spec.out_features, spec.in_features)}"
            )
        if isinstance(weight, QuantizedWeight):
            for name, tensor in tensors_of(spec.name, weight):
                self._shards.add(name, tensor)
            self._written[spec.name] = weight.scheme
            self.activation_bits[spec.name] = weight.activation_bits
            self.int8_weights[spec.name] = weight.int8_weights and weight.activation_bits == 8
        else:
            self._shards.add(f"{spec.name}.weight", self._as_stored(spec.name, weight))
            self._written[spec.name] = QuantScheme(FLOAT_BITS)
        self._missing.remove(spec.name)

    def finish(self, schemes: Mapping[str, QuantScheme], bpw: float, extra_files_from: Path) -> int:
        """Write all that is left and return the bytes of the weight files.

        The checkpoint's other tensors follow as it carries them, then config.json, then the
        tokenizer's files and generation_config.json of `extra_files_from`. Raises OutputError
        when a linear is missing or was written in another scheme than `schemes` says.
        """
        if self._missing:
            raise OutputError(
                f"{len(self._missing)} linears were not written: {min(self._missing)!r}"
            )
        for name in sorted({*self._written, *schemes}):
            planned, written = schemes.get(name), self._written.get(name)
            if planned != written:
                raise OutputError(f"{name!r} is planned as {planned} and was written as {written}")
        rounded = self._embeddings.places.weights if self._embeddings is not None else ()
        for key in self._checkpoint.names():
            name = self._names.get(key, key)
            if name not in self._weights and name not in rounded:
                tensor = self._checkpoint.read(key)
                self._shards.add(name, tensor.to(self._checkpoint.carried_dtype(key)))
        if self._embeddings is not None:
            for name, tensor in self._embeddings.tensors.items():
                self._shards.add(name, tensor)
        size = self._shards.finish()
        self._write_config(schemes, bpw)
        copy_extra_files(extra_files_from, self._folder)
        return size

    def _as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A 16-bit weight in its module's own orientation."""
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {weight.dtype} is not a 16-bit float")
        transposed = isinstance(find_linear(self._model, name), Conv1D)
        return weight.T if transposed else weight

    def _write_config(self, schemes: Mapping[str, QuantScheme], bpw: float) -> None:
        config = dict(self._checkpoint.config)
        if not {"dtype", "torch_dtype"} & config.keys():
            # Without it dtype="auto" takes the dtype of the first float in the file: our scales.
            key = next(key for key, name in self._names.items() if name in self._weights)
            config["dtype"] = str(self._checkpoint.dtype(key)).removeprefix("torch.")
        narrow = [name for name, bits in self.activation_bits.items() if bits == 8]
        narrower = [name for name, allowed in self.int8_weights.items() if allowed]
        embeddings = self._embeddings.schemes if self._embeddings is not None else {}
        config["quantization_config"] = quantization_config(
            schemes, bpw, narrow, narrower, embeddings
        )
        write_config(self._folder, config)


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def copy_extra_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and generation files of one model folder into another.

    Raises CheckpointError for a link that leaves the source folder.
    """
    for pattern in CARRIED_FILES:
        for path in sorted(source.glob(pattern)):
            relative = path.relative_to(source)
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(member(source, relative.as_posix()), target)
