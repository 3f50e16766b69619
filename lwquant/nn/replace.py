"""Swap the linears, the embedding and the head of a transformers model for empty packed ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lwquant.errors import CheckpointError, UnsupportedModelError
from lwquant.model.embeddings import Embeddings, find_embeddings
from lwquant.model.structure import features_of
from lwquant.nn.embedding import QuantizedEmbedding, TiedHead, check_table_scheme
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


def replace_embeddings(model: PreTrainedModel, schemes: Mapping[str, QuantScheme]) -> None:
    """Put empty packed modules in place of the embedding and the head.

    `schemes` names those with a weight of their own: the head is left out where it is tied.
    Raises CheckpointError for other names and for schemes that no table has.
    """
    try:
        places = find_embeddings(model)
        for scheme in schemes.values():
            check_table_scheme(scheme)
    except (UnsupportedModelError, ValueError) as error:
        raise CheckpointError(f"quantization_config: embeddings: {error}") from error
    if {*schemes} != {*places.names}:
        raise CheckpointError(
            f"quantization_config: embeddings names {sorted(schemes)}, those of "
            f"{type(model).__name__} are {sorted(places.names)}"
        )
    for name, module in embedding_modules(model, places, schemes).items():
        model.set_submodule(name, module)
    # There is no weight any more that transformers could tie.
    gone = f"{places.table}.weight"
    kept = {k: v for k, v in model.all_tied_weights_keys.items() if gone not in (k, v)}
    model.all_tied_weights_keys = kept
    if places.tied:
        model._tied_weights_keys = {}


def embedding_modules(
    model: PreTrainedModel, places: Embeddings, schemes: Mapping[str, QuantScheme]
) -> dict[str, nn.Module]:
    """The packed modules by the names of those whose place they take; biases are shared."""
    embedding, head = model.get_submodule(places.table), model.get_submodule(places.head)
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    weight = embedding.weight
    table = QuantizedEmbedding(
        embedding.num_embeddings,
        embedding.embedding_dim,
        schemes[places.table],
        factor=places.factor,
        device=weight.device,
        dtype=weight.dtype,
    )
    if places.tied:
        return {places.table: table, places.head: TiedHead(table, head.bias)}
    linear = QuantizedLinear(
        head.in_features,
        head.out_features,
        schemes[places.head],
        bias=False,
        device=head.weight.device,
    )
    linear.bias = head.bias
    return {places.table: table, places.head: linear}
