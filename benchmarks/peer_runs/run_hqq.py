"""HQQ: half-quadratic rounding without calibration. Settings: bits, group_size."""

from __future__ import annotations

from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from shared import LINEAR, hand_back, own_logits, read_job, stored_bits
from transformers import AutoModelForCausalLM


def main() -> None:
    job = read_job()
    config = BaseQuantizeConfig(
        nbits=job.settings["bits"], group_size=job.settings["group_size"], axis=1
    )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    found = {n: m for n, m in model.named_modules() if LINEAR.fullmatch(f"{n}.weight")}
    layers: dict[str, HQQLinear] = {}
    for name, module in found.items():
        layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, layer)
        layers[name] = layer
    seconds = job.seconds()
    parts = {}
    for name, layer in layers.items():
        # Counted at 16 bits, so that is what they get.
        for part in ("scale", "zero"):
            layer.meta[part] = layer.meta[part].half().float()
        parts[name] = {"codes": layer.W_q, **{p: layer.meta[p] for p in ("scale", "zero")}}
    weights = {name: layer.dequantize() for name, layer in layers.items()}
    hand_back(
        job,
        weights,
        stored_bits(parts),
        seconds,
        f"hqq {version('hqq')}",
        logits=own_logits(model, job.probe),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
