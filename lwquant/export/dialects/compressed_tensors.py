"""compressed-tensors' `pack-quantized`, which vLLM, SGLang and transformers read.

Codes are packed along the inputs, bit for bit as they are here (dense at every width from
compressed-tensors 0.18 on), zero-points along the outputs, lwquant's words transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lwquant.allocators.problem import fused_groups
from lwquant.export.dialects.dialect import (
    Loader,
    StoredLinear,
    in_16_bits,
    why_not_plain,
    why_not_whole,
)
from lwquant.scheme import WHOLE_ROW, QuantScheme

FORMAT = "pack-quantized"


class CompressedTensors:
    loader = Loader(
        quant_method="compressed-tensors",
        library="transformers",
        install="transformers 'compressed-tensors>=0.18'",
        usage=(
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("{name}")'
        ),
    )
    rounded_embeddings = False

    def why_not(self, scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
        return why_not_plain(scheme, in_features) or why_not_whole(scheme)

    def tensors(
        self, name: str, linear: StoredLinear, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight_packed", linear.qweight
        yield f"{name}.weight_scale", linear.scales.to(in_16_bits(dtype))
        yield f"{name}.weight_shape", torch.tensor([linear.out_features, linear.in_features])
        if not linear.scheme.symmetric:
            yield f"{name}.weight_zero_point", linear.packed_zeros().T.contiguous()

    def config(
        self, model: Mapping[str, Any], schemes: Mapping[str, QuantScheme], head: str
    ) -> dict[str, Any]:
        floats = [name for name, scheme in schemes.items() if scheme.is_float]
        members: dict[QuantScheme, list[str]] = {}
        for name, scheme in schemes.items():
            if not scheme.is_float:
                members.setdefault(scheme, []).append(name)
        return {
            "quantization_config": {
                "quant_method": self.loader.quant_method,
                "format": FORMAT,
                "quantization_status": "compressed",
                "ignore": [head, *floats],
                "config_groups": {
                    f"group_{i}": {
                        "targets": names,
                        "weights": _weights(scheme),
                        "format": FORMAT,
                    }
                    for i, (scheme, names) in enumerate(members.items())
                },
            }
        }

    def notes(self, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
        for group in fused_groups(list(schemes)):
            if len({schemes[name] for name in group}) > 1:
                yield (
                    f"vLLM and SGLang fuse {', '.join(group)}, which differ here, and refuse that:"
                    " quantize with tie_fused for them"
                )
                break
        if any(not scheme.symmetric and not scheme.is_float for scheme in schemes.values()):
            yield (
                "transformers cannot load zero-points of this format (seen with compressed-tensors"
                " 0.18 to 0.20): quantize with symmetric = true for it"
            )


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    by_row = scheme.group_size == WHOLE_ROW
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
