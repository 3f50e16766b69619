"""What is evaluated: a float checkpoint, run block by block, or a quantized folder, run packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lwquant.devices import usable
from lwquant.errors import CheckpointError, UnsupportedModelError
from lwquant.evaluation.measure import Predictions
from lwquant.evaluation.reference import reference_predictions
from lwquant.export.format import QUANT_METHOD, parse_quantization_config
from lwquant.model.checkpoint import resolve
from lwquant.model.model_folder import CONFIG, read_json
from lwquant.nn.packed import compile_kernels
from lwquant.prepare import OpenModel, open_model
from lwquant.progress import Progress


class Subject(Protocol):
    """A model that predicts, and what it takes on disk."""

    tokenizer: Any
    config: Any  # of transformers
    bpw: float | None  # stored bits per weight of the linears, None where unknown
    size_bytes: int  # of all weight files

    def predictions(self, windows: Tensor, cache: Path | None, progress: Progress) -> Predictions:
        """Of windows (n, seq_len)."""
        ...


def open_subject(model: str | Path, device: str) -> Subject:
    """Open what `model` (a folder, a .gguf file or a hub id) holds.

    Raises CheckpointError where it cannot be read, UnsupportedModelError, and LwquantError for a
    device that cannot be used.
    """
    where = usable(device)
    path = resolve(model)
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    quantization = config.get("quantization_config")
    # Left behind where transformers unpacked a GGUF file into plain floats.
    if isinstance(quantization, dict) and quantization.get("quant_method") != "gguf":
        return PackedModel(path, quantization, where)
    return FloatModel(open_model(path, device))


class FloatModel:
    """A plain checkpoint, computed in float32 one block at a time."""

    def __init__(self, opened: OpenModel) -> None:
        self._decoder = opened.decoder
        self.path = opened.path
        self.tokenizer = opened.tokenizer
        self.config = opened.decoder.model.config
        self.bpw: float | None = opened.original_bpw
        self.size_bytes = opened.source.size_bytes

    def predictions(self, windows: Tensor, cache: Path | None, progress: Progress) -> Predictions:
        return reference_predictions(self._decoder, windows, cache=cache, progress=progress)


class PackedModel:
    """A folder of ours, or of another method that transformers can load, in its stored dtype.

    The hidden states kept are those after the final norm. The head is whatever the model's own
    forward does with them, caps and scales of logits included.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any], device: torch.device) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no safetensors")
        self.path = folder
        self.bpw: float | None = None
        if quantization.get("quant_method") == QUANT_METHOD:
            self.bpw = parse_quantization_config(quantization).bpw
        self.size_bytes = sum(file.stat().st_size for file in files)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
        self.config = model.config
        self._model = model.to(device).eval().requires_grad_(False)
        compile_kernels(model)
        self._decoder = model.get_decoder()

    def predictions(self, windows: Tensor, cache: Path | None, progress: Progress) -> Predictions:
        return Predictions(self._hidden(windows), self._head)

    @torch.no_grad()
    def _hidden(self, windows: Tensor) -> Iterator[Tensor]:
        for window in windows:
            ids = window[None].to(self._model.device)
            yield self._decoder(input_ids=ids, use_cache=False)[0][0]

    @torch.no_grad()
    def _head(self, hidden: Tensor) -> Tensor:
        """The model's forward with the decoder's output given, so on these tokens alone."""
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
        used = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            used = True
            return output

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        self._decoder.forward = forward
        try:
            logits = self._model(input_ids=ids, use_cache=False).logits
        finally:
            del self._decoder.forward
        if not used:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} does not get its logits from its decoder's output"
            )
        return logits
