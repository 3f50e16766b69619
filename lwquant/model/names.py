"""Which parameter of a transformers model each tensor name of a checkpoint stands for."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Each key's name in the model, as from_pretrained would resolve it.

    transformers adds or strips the base model's prefix, and renames what some architectures call
    otherwise in files: GPT-NeoX's lm_head is embed_out there, and save_pretrained renames it back.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        names[key] = key if key in state and name not in state else name
    return names
