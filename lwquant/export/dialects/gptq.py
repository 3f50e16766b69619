"""GPTQ's format with a width per module (`dynamic`), as GPTQModel writes and loads it.

Codes are packed along the inputs, in columns of (in_features · bits / 32, out_features) words:
lwquant's rows, transposed. Zeros are stored as they are ("gptq_v2"), not less one as in the first
version of the format: a zero of 0 less one is no code, and readers disagree on what it means.
"""

from __future__ import annotations

import re
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
    why_not_whole,
)
from lwquant.scheme import WHOLE_ROW, WORD_BITS, QuantScheme

WIDTHS = (2, 3, 4, 8)
# vLLM asks for the rule of a fused matrix by its own name, and for one of its parts otherwise.
FUSED = {"q_proj": "(q|qkv)_proj", "gate_proj": "(gate|gate_up)_proj"}


class Gptq:
    loader = Loader(
        quant_method="gptq",
        library="transformers",
        install="gptqmodel",
        usage='from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{name}")',
    )
    rounded_embeddings = False

    def why_not(self, scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
        if in_features % WORD_BITS or out_features % WORD_BITS:
            return f"{out_features} x {in_features} are no multiples of {WORD_BITS}"
        return why_not_plain(scheme, in_features, WIDTHS) or why_not_whole(scheme)

    def tensors(
        self, name: str, linear: StoredLinear, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        group_of = torch.arange(linear.in_features, dtype=torch.int32)
        yield f"{name}.qweight", linear.qweight.T.contiguous()
        yield f"{name}.qzeros", linear.packed_zeros()
        yield f"{name}.scales", linear.scales.T.contiguous().to(in_16_bits(dtype))
        yield f"{name}.g_idx", group_of // linear.scheme.group_size

    def config(
        self, model: Mapping[str, Any], schemes: Mapping[str, QuantScheme], head: str
    ) -> dict[str, Any]:
        usual = commonest(schemes.values())
        return {
            "quantization_config": {
                "quant_method": self.loader.quant_method,
                "checkpoint_format": "gptq_v2",
                "desc_act": False,
                "lm_head": False,
                **_entry(usual),
                "dynamic": {
                    _rule(name, scheme): {} if scheme.is_float else _entry(scheme)
                    for name, scheme in schemes.items()
                    if scheme != usual
                },
            }
        }

    def notes(self, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
        if len(set(schemes.values())) > 1:
            yield "transformers by itself reads one width only: load it with GPTQModel or vLLM"


def _entry(scheme: QuantScheme) -> dict[str, Any]:
    group_size = -1 if scheme.group_size == WHOLE_ROW else scheme.group_size
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _rule(name: str, scheme: QuantScheme) -> str:
    """
    >>> _rule("model.layers.0.self_attn.q_proj", QuantScheme(4))
    '+:^model\\\\.layers\\\\.0\\\\.self_attn\\\\.(q|qkv)_proj$'
    """
    parent, _, leaf = name.rpartition(".")
    pattern = re.escape(f"{parent}.") if parent else ""
    return f"{'-' if scheme.is_float else '+'}:^{pattern}{FUSED.get(leaf, re.escape(leaf))}$"
