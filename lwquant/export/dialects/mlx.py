"""MLX's affine format, for mlx-lm: w = scale · code + bias, any of six widths per module.

Codes lie in MLX as they do here, a little-endian stream per row, so they stay as they are. A bias
is −scale · zero, rounded to 16 bits like the scale itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lwquant.export.dialects.dialect import (
    Loader,
    StoredLinear,
    commonest,
    in_16_bits,
    why_not_plain,
)
from lwquant.scheme import QuantScheme

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class Mlx:
    loader = Loader(
        quant_method=None,  # mlx-lm asks for none
        library="mlx",
        install="mlx-lm",
        usage='from mlx_lm import load\n\nmodel, tokenizer = load("{name}")',
    )
    rounded_embeddings = True

    def why_not(self, scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
        if scheme.group_size not in GROUP_SIZES:
            return f"groups have {', '.join(map(str, GROUP_SIZES))} inputs"
        return why_not_plain(scheme, in_features, WIDTHS)

    def tensors(
        self, name: str, linear: StoredLinear, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        stored = in_16_bits(dtype)
        scales = linear.scales.to(stored)
        yield f"{name}.weight", linear.qweight.view(torch.uint32)
        yield f"{name}.scales", scales
        # Of the scales as they are stored, so that zero stays at zero.
        yield f"{name}.biases", (-scales.float() * linear.zero_points()).to(stored)

    def config(
        self, model: Mapping[str, Any], schemes: Mapping[str, QuantScheme], head: str
    ) -> dict[str, Any]:
        usual = commonest(schemes.values())
        quantization: dict[str, Any] = {**_entry(usual), "mode": "affine"}
        for name, scheme in schemes.items():
            quantization[name] = False if scheme.is_float else _entry(scheme)
        both = {"quantization": quantization, "quantization_config": quantization}
        return {**both, **rotary_settings(model)}

    def notes(self, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
        yield "MLX computes with a bias per group, -scale * zero rounded to 16 bits"


def rotary_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Those of config.json where transformers 4 had them.

    mlx-lm 0.32 reads `rope_parameters` of transformers 5 for few architectures, and takes defaults
    of its own for the others: another model.

    >>> rotary_settings({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})
    {'rope_theta': 100000.0}
    >>> rotary_settings({"rope_parameters": {"rope_type": "linear", "factor": 2}})
    {'rope_scaling': {'rope_type': 'linear', 'factor': 2}}
    >>> kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    >>> rotary_settings({"rope_parameters": kinds})
    {'rope_theta': 1000000.0, 'rope_local_base_freq': 10000.0}
    """
    found = model.get("rope_parameters")
    if not isinstance(found, Mapping):
        return {}
    settings: dict[str, Any] = {}
    if "full_attention" in found:  # Gemma 3: one for each kind of layer
        local = found.get("sliding_attention", {})
        found = found["full_attention"]
        if "rope_theta" in local:
            settings["rope_local_base_freq"] = local["rope_theta"]
    scaling = {key: value for key, value in found.items() if key != "rope_theta"}
    if "rope_theta" in found:
        settings = {"rope_theta": found["rope_theta"], **settings}
    if scaling.get("rope_type", "default") != "default":
        settings["rope_scaling"] = scaling
    return {key: value for key, value in settings.items() if key not in model}


def _entry(scheme: QuantScheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits}
