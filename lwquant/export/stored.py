"""What a complete folder of lwquant stores, read back one linear at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lwquant import ops
from lwquant.errors import OutputError
from lwquant.export.dialects import StoredLinear
from lwquant.export.folder import verify
from lwquant.export.format import QUANT_METHOD, layout_of, parse_quantization_config
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.decoder import causal_config
from lwquant.model.model_folder import CONFIG, read_json
from lwquant.model.structure import features_of
from lwquant.ops.scale_bytes import decode_scales
from lwquant.scheme import QuantScheme


class StoredModel:
    """Names are module paths. OutputError where `folder` is no complete result of ours.

    Attributes:
        config: config.json without what it says of the quantization.
        linears: scheme of every linear, those left at 16 bits too.
        tables: scheme of embedding and head, where they were rounded.
        head: the output layer.
        dtype: of what is not quantized.
    """

    def __init__(self, folder: Path) -> None:
        verify(folder)
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        quantization = self.config.pop("quantization_config", None)
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise OutputError(f"{folder}: is not in lwquant's own format")
        parsed = parse_quantization_config(quantization)
        self.linears: Mapping[str, QuantScheme] = parsed.schemes
        self.tables: Mapping[str, QuantScheme] = parsed.embeddings
        named = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        found = getattr(torch, named, None)
        self.dtype = found if isinstance(found, torch.dtype) else torch.float32
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(causal_config(self.config))
        last = self._model.get_output_embeddings()
        self.head = next(name for name, module in self._model.named_modules() if module is last)
        self._weights = Checkpoint.packed(folder, self.config)

    def scheme(self, name: str) -> QuantScheme:
        return self.linears[name] if name in self.linears else self.tables[name]

    def features(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear; rows and columns of a table."""
        module = self._model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        return features_of(module)

    def n_weights(self, name: str) -> int:
        out_features, in_features = self.features(name)
        return out_features * in_features

    def is_transposed(self, name: str) -> bool:
        """Whether the module holds its weight as (in_features, out_features), as GPT-2's do."""
        return isinstance(self._model.get_submodule(name), Conv1D)

    def read(self, name: str) -> StoredLinear:
        """A linear, or a table, that is stored in few bits."""
        scheme = self.scheme(name)
        scales = self._weights.read(f"{name}.scales")
        return StoredLinear(
            scheme,
            *self.features(name),
            self._weights.read(f"{name}.qweight"),
            decode_scales(scales) if scheme.scale_bits == 8 else scales,
            None if scheme.symmetric else self._weights.read(f"{name}.zeros"),
        )

    def unpacked(self, table: str) -> Tensor:
        """The weight of a rounded table, in the model's dtype."""
        stored = self.read(table)
        scheme = stored.scheme
        weight = ops.dequantize(
            stored.qweight,
            stored.scales,
            None,
            scheme.bits,
            scheme.group_size,
            stored.in_features,
        )
        return weight.to(self.dtype)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that read() does not give, by its name: norms, biases, plain weights."""
        taken = {
            key
            for name, scheme in {**self.linears, **self.tables}.items()
            for key in layout_of(name, *self.features(name), scheme)
        }
        names = self._weights.names()
        yield from ((key, self._weights.read(key)) for key in names if key not in taken)
