"""Lets `from_pretrained` of transformers load folders in lwquant's format, packed as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lwquant.errors import CheckpointError
from lwquant.export.format import (
    QUANT_METHOD,
    layout_of,
    parse_quantization_config,
    quantization_config,
)
from lwquant.model.names import parameter_names
from lwquant.model.safetensors_header import TensorEntry, read_header
from lwquant.model.structure import features_of
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.packed import PACKED_MODULES, compile_kernels
from lwquant.nn.replace import find_linear, replace_embeddings, replace_linears
from lwquant.scheme import QuantScheme

# Dtype (None: whatever the checkpoint had) and shape of one tensor in a file.
Layout = tuple[torch.dtype | None, tuple[int, ...]]


class LwquantConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json as transformers carries it on `model.config`."""

    quant_method: Any = QUANT_METHOD

    def __init__(
        self,
        schemes: Mapping[str, QuantScheme],
        bpw: float,
        int8_activations: Collection[str] = (),
        int8_weights: Collection[str] = (),
        embeddings: Mapping[str, QuantScheme] = MappingProxyType({}),
    ) -> None:
        self.schemes = dict(schemes)
        self.bpw = bpw
        self.int8_activations = frozenset(int8_activations)
        self.int8_weights = frozenset(int8_weights)
        self.embeddings = dict(embeddings)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        parsed = parse_quantization_config(config_dict)
        config = cls(
            parsed.schemes,
            parsed.bpw,
            parsed.int8_activations,
            parsed.int8_weights,
            parsed.embeddings,
        )
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return quantization_config(
            self.schemes, self.bpw, self.int8_activations, self.int8_weights, self.embeddings
        )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class LwquantQuantizer(HfQuantizer):
    """What `from_pretrained` calls before and after it fills the model."""

    # With this set, transformers refuses a LwquantConfig for a model that is not quantized yet.
    requires_calibration = True
    quantization_config: LwquantConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Swap the linears on meta, and compare what the model needs with what the files hold."""
        if not checkpoint_files or not all(f.endswith(".safetensors") for f in checkpoint_files):
            raise CheckpointError("a model quantized by lwquant is loaded from safetensors files")
        schemes = self.quantization_config.schemes
        packed: dict[str, Layout] = {}
        for name, scheme in schemes.items():
            packed |= layout_of(name, *features_of(find_linear(model, name)), scheme)
        config = self.quantization_config
        replace_linears(model, schemes, config.int8_activations, config.int8_weights)
        if config.embeddings:
            replace_embeddings(model, config.embeddings)
            for name, scheme in config.embeddings.items():
                table: Any = model.get_submodule(name)
                packed |= layout_of(name, table.out_features, table.in_features, scheme)
        _skip_initialization(model)

        entries: dict[str, TensorEntry] = {}
        for file in checkpoint_files:
            entries |= read_header(Path(file)).tensors
        found = {name: entries[key] for key, name in parameter_names(model, entries).items()}
        needed: dict[str, Layout] = {
            name: (None, tuple(tensor.shape)) for name, tensor in model.state_dict().items()
        }
        for one, other in model.all_tied_weights_keys.items():
            needed.pop(one if other in found else other, None)  # one of the two is enough
        check_tensors(needed | packed, found)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Lay the weights out for the kernels, and compile those of GPUs.

        Raises CheckpointError where the outliers of a linear lie outside it.
        """
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedLinear):
                continue
            # An architecture may ask for some modules in float32 by name. These tensors were
            # float16 in the file, so this narrowing is exact.
            if module.scales.dtype == torch.float32:
                module.scales = module.scales.half()
            if module.outlier_values is not None:
                module.outlier_values = module.outlier_values.half()
            try:
                module.check_outliers()
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from error
        compile_kernels(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def check_tensors(needed: Mapping[str, Layout], found: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError for tensors that are missing, or the first of another layout.

    Left to itself, transformers fills a missing tensor at random with no more than a warning.
    """
    if missing := [name for name in needed if name not in found]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"tensor {missing[0]!r} is missing{more}")
    for name, (dtype, shape) in needed.items():
        entry = found[name]
        if entry.shape != shape or dtype not in (None, entry.dtype):
            raise CheckpointError(
                f"tensor {name!r} is {entry.dtype} {entry.shape}, "
                f"the model needs {dtype or 'a float'} {shape}"
            )


def _skip_initialization(model: PreTrainedModel) -> None:
    """Keep transformers from initializing modules around packed linears at random.

    It would do no harm, as loaded tensors are left alone, but GPT-2's attention asks for
    `c_proj.weight` in order to do so. Only modules that fill all their tensors from the file are
    marked; buffers that are not stored (rotary tables) still have to be computed.
    """
    for module in model.modules():
        packed = any(isinstance(inner, PACKED_MODULES) for inner in module.modules())
        if packed and not module._non_persistent_buffers_set:
            module._is_hf_initialized = True  # type: ignore[assignment]


def register() -> None:
    """Make `quant_method: lwquant` known to transformers; calling it again changes nothing."""
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is not LwquantConfig:
        register_quantization_config(QUANT_METHOD)(LwquantConfig)
    if AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not LwquantQuantizer:
        register_quantizer(QUANT_METHOD)(LwquantQuantizer)
