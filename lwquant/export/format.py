"""The on-disk format, version 6: tensor names and the `quantization_config` of config.json.

A quantized linear `name` is stored as
    name.qweight  int32    (out_features, row_words(in_features, bits))  codes, row by row
    name.scales   float16  (out_features, n_groups), or
                  uint8    (out_features, 1 + n_groups)  with scale_bits 8; ops/scale_bytes.py
    name.zeros    int32    (n_groups, row_words(out_features, bits)), or
                  uint8    (n_groups, out_features)  with fine_zeros; absent when symmetric
and where the scheme has outliers, n of them, as compressed rows
    name.outlier_values   float16  (n,)
    name.outlier_columns  int16    (n,), or int32 from 65537 inputs on; ops/outliers.py
    name.outlier_rows     int32    (out_features + 1,)
and `name.bias` as it was. A linear left at 16 bits keeps `name.weight`. Names are module paths of
the transformers model. No other file makes up these names. A linear with a `codebook` is stored as
a symmetric one; what its codes stand for is in lwquant/codebooks.py, not in the file.

`int8_activations` names the linears whose kernels may round inputs to 8 bits, `int8_weights` those
of them that may round weights, too; see lwquant/activation_choice.py. `embeddings` names the
embedding where it is rounded, and the head unless it shares the embedding's weight; both are stored
as symmetric linears with scale_bits 8. Version 4 had only the first of the three, 5 the first two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import lwquant.ops  # noqa: F401  (declares torch.ops.lwquant)
from lwquant.errors import CheckpointError
from lwquant.nn.linear import (
    outlier_layout,
    scale_dtype,
    stored_outliers,
    stored_scales,
    stored_zeros,
    zero_layout,
)
from lwquant.scheme import FLOAT_BITS, QuantScheme, row_words
from lwquant.types import QuantizedWeight

QUANT_METHOD = "lwquant"
FORMAT_VERSION = 6
# What an earlier version that can be read does not have, and what that means.
_ADDED: dict[int, dict[str, Any]] = {
    4: {"int8_weights": [], "embeddings": {}},
    5: {"embeddings": {}},
    FORMAT_VERSION: {},
}

_FLOAT = QuantScheme(FLOAT_BITS)
_CONFIG_KEYS = {"quant_method", "version", "bpw", "linears"}
_CONFIG_KEYS |= {"int8_activations", "int8_weights", "embeddings"}
_LINEAR_KEYS = {entry.name for entry in fields(QuantScheme)}


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says about the quantization."""

    schemes: Mapping[str, QuantScheme]  # of every linear
    bpw: float  # stored bits per weight
    int8_activations: frozenset[str]  # linears
    int8_weights: frozenset[str]  # some of those
    embeddings: Mapping[str, QuantScheme]  # empty, or of the embedding, and of a head of its own


def quantization_config(
    schemes: Mapping[str, QuantScheme],
    bpw: float,
    int8_activations: Collection[str] = (),
    int8_weights: Collection[str] = (),
    embeddings: Mapping[str, QuantScheme] = MappingProxyType({}),
) -> dict[str, Any]:
    """What config.json says about the quantization; `parse_quantization_config` reads it back."""
    return {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "bpw": bpw,
        "linears": {name: asdict(scheme) for name, scheme in schemes.items()},
        "int8_activations": sorted(int8_activations),
        "int8_weights": sorted(int8_weights),
        "embeddings": {name: asdict(scheme) for name, scheme in embeddings.items()},
    }


def parse_quantization_config(config: Mapping[str, Any]) -> QuantizationConfig:
    """The inverse of `quantization_config`.

    Raises CheckpointError for another method or version, for keys that are missing or unknown, for
    widths or group sizes that no scheme has, and for int8 activations of linears that are not
    quantized.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"quantization_config: quant_method={config.get('quant_method')!r} is not "
            f"{QUANT_METHOD!r}"
        )
    version = config.get("version")
    if not isinstance(version, int) or version not in _ADDED:
        raise CheckpointError(
            f"quantization_config: version={version!r} is not one that this lwquant reads: "
            f"{tuple(_ADDED)}"
        )
    added = _ADDED[version]
    _check_keys("quantization_config", config, _CONFIG_KEYS - added.keys())
    config = {**config, **added}
    bpw, linears = config["bpw"], config["linears"]
    if not _is_number(bpw) or not (math.isfinite(bpw) and bpw > 0):
        raise CheckpointError(f"quantization_config: bpw={bpw!r} is not a positive number")
    if not isinstance(linears, Mapping) or not linears:
        raise CheckpointError("quantization_config: linears names no linear")
    if not isinstance(config["embeddings"], Mapping):
        raise CheckpointError("quantization_config: embeddings is not an object")
    schemes, tables = (
        {name: _parse_linear(name, entry) for name, entry in named.items()}
        for named in (linears, config["embeddings"])
    )
    quantized = {name for name, scheme in schemes.items() if not scheme.is_float}
    activations = _parse_names(config, "int8_activations", quantized, "quantized linear")
    weights = _parse_names(config, "int8_weights", activations, "linear with int8 activations")
    return QuantizationConfig(schemes, float(bpw), activations, weights, tables)


def tensors_of(name: str, quantized: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything stored for one quantized linear, its bias aside.

    Raises ValueError where a symmetric weight has a zero off the middle of the codes, or there are
    not as many outliers as the scheme says.
    """
    scheme = quantized.scheme
    middle = 2 ** (scheme.bits - 1)
    if scheme.symmetric and not bool((quantized.zeros == middle).all()):
        raise ValueError(f"{name}: a symmetric scheme stores no zeros, so all must be {middle}")
    pack = torch.ops.lwquant.pack
    yield f"{name}.qweight", pack(quantized.codes.contiguous(), scheme.bits)
    yield f"{name}.scales", stored_scales(quantized)
    if not scheme.symmetric:
        yield f"{name}.zeros", stored_zeros(quantized)
    for leaf, tensor in stored_outliers(quantized):
        yield f"{name}.{leaf}", tensor


def layout_of(
    name: str, out_features: int, in_features: int, scheme: QuantScheme
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that `tensors_of` yields; none for a linear at 16 bits.

    >>> for tensor, layout in layout_of("up", 8, 96, QuantScheme(3, 64)).items():
    ...     print(tensor, *layout)
    up.qweight torch.int32 (8, 9)
    up.scales torch.float16 (8, 2)
    up.zeros torch.int32 (2, 1)
    """
    if scheme.is_float:
        return {}
    n_groups = scheme.n_groups(in_features)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.qweight": (torch.int32, (out_features, row_words(in_features, scheme.bits))),
        f"{name}.scales": (scale_dtype(scheme), (out_features, scheme.row_scales(in_features))),
    }
    if not scheme.symmetric:
        dtype, width = zero_layout(scheme, out_features)
        layout[f"{name}.zeros"] = (dtype, (n_groups, width))
    if scheme.outliers:
        stored = outlier_layout(scheme, out_features, in_features)
        layout |= {f"{name}.{leaf}": entry for leaf, entry in stored.items()}
    return layout


def _parse_linear(name: str, entry: Any) -> QuantScheme:
    where = f"quantization_config: linear {name!r}"
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where} is {entry!r}, not an object")
    _check_keys(where, entry, _LINEAR_KEYS)
    if entry["bits"] == FLOAT_BITS and dict(entry) != asdict(_FLOAT):
        raise CheckpointError(f"{where}: 16 bits have no groups, got {dict(entry)}")
    try:
        scheme = QuantScheme.from_fields(entry)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if scheme.codebook and not entry["symmetric"]:
        raise CheckpointError(f"{where}: a codebook has no zeros, so symmetric must be true")
    return scheme


def _parse_names(
    config: Mapping[str, Any], key: str, known: Collection[str], what: str
) -> frozenset[str]:
    names, where = config[key], f"quantization_config: {key}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where} is not a list of names")
    for name in names:
        if name not in known:
            raise CheckpointError(f"{where} names {name!r}, which is no {what}")
    return frozenset(names)


def _check_keys(where: str, found: Mapping[str, Any], known: set[str]) -> None:
    if missing := sorted(known - set(found)):
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(map(str, set(found) - known)):
        raise CheckpointError(f"{where} has unknown keys: {', '.join(unknown)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
