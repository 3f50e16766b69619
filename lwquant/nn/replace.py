"""Swap the linears of a transformers model for empty QuantizedLinears."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from lwquant.errors import CheckpointError
from lwquant.model.structure import features_of
from lwquant.nn.linear import QuantizedLinear
from lwquant.scheme import QuantScheme


def find_linear(model: nn.Module, name: str) -> nn.Linear | Conv1D:
    """The linear at module path `name`; CheckpointError where there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{type(model).__name__} has no module {name!r}") from error
    if not isinstance(module, nn.Linear | Conv1D):
        raise CheckpointError(f"{name!r} is a {type(module).__name__}, not a linear")
    return module


def replace_linears(
    model: nn.Module,
    schemes: Mapping[str, QuantScheme],
    int8_activations: Collection[str] = (),
    int8_weights: Collection[str] = (),
) -> None:
    """Put an empty QuantizedLinear in place of every linear whose scheme is not 16 bits.

    The new module has the device of the old one, and its dtype for the bias. Raises
    CheckpointError for a name that is no linear, or one whose weight is tied to another module.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    for name, scheme in schemes.items():
        old = find_linear(model, name)
        if scheme.is_float:
            continue
        if f"{name}.weight" in tied_names:
            raise CheckpointError(f"{name!r} shares its weight with another module")
        out_features, in_features = features_of(old)
        new = QuantizedLinear(
            in_features,
            out_features,
            scheme,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
            activation_bits=8 if name in int8_activations else 16,
            int8_weights=name in int8_weights,
        )
        new.train(old.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
