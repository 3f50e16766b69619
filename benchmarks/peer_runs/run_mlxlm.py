"""mlx-lm: its affine rounding, uniform or with the widths of its dynamic_quant, on the Linux CPU.

Settings: bits, group_size; for dynamic_quant also high_bits and target_bpw of the linears.
"""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.quant.dynamic_quant import estimate_sensitivities
from mlx_lm.utils import load, quantize_model
from shared import LINEAR, Job, hand_back, read_job


def main() -> None:
    job = read_job()
    bits, group_size = job.settings["bits"], job.settings["group_size"]
    # mlx-lm looks for the rotary base where transformers kept it before version 5, and without it
    # takes 10000 in silence.
    stored = json.loads((job.model / "config.json").read_text())["rope_parameters"]
    if "full_attention" in stored:  # Gemma 3 has two
        base = {
            "rope_theta": stored["full_attention"]["rope_theta"],
            "rope_local_base_freq": stored["sliding_attention"]["rope_theta"],
        }
    else:
        base = {"rope_theta": stored["rope_theta"]}
    model, _, config = load(str(job.model), model_config=base, return_config=True)
    linears = {
        name: module
        for name, module in tree_flatten(
            model.leaf_modules(), is_leaf=lambda m: hasattr(m, "to_quantized")
        )
        if LINEAR.fullmatch(f"{name}.weight")
    }
    raised = raised_linears(job, model, linears) if "target_bpw" in job.settings else set()

    def widths(path, module):
        if path not in linears:
            return False
        high = {"bits": job.settings.get("high_bits"), "group_size": group_size}
        return high if path in raised else {"bits": bits, "group_size": group_size}

    model, config = quantize_model(
        model, config, group_size=group_size, bits=bits, quant_predicate=widths
    )
    mx.eval(model.parameters())
    seconds = job.seconds()
    total, weights = 0, {}
    for name, module in tree_flatten(
        model.leaf_modules(), is_leaf=lambda m: hasattr(m, "scales") or hasattr(m, "weight")
    ):
        if name in linears:
            # Codes as stored, scales and biases 16 bits each.
            total += module.weight.nbytes * 8 + 16 * (module.scales.size + module.biases.size)
            weight = mx.dequantize(
                module.weight,
                scales=module.scales.astype(mx.float16).astype(mx.float32),
                biases=module.biases.astype(mx.float16).astype(mx.float32),
                bits=module.bits,
                group_size=module.group_size,
            )
            weights[name] = torch.from_numpy(np.array(weight))
    logits = model(mx.array(job.probe[None].numpy())).astype(mx.float32)
    hand_back(
        job,
        weights,
        total,
        seconds,
        f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}",
        logits=torch.from_numpy(np.array(logits))[0],
        note=f"{len(raised)} of {len(linears)} linears raised" if raised else "",
    )


def raised_linears(job: Job, model, linears) -> set[str]:
    """Those that dynamic_quant gives the higher width.

    Its own rule: every linear above a threshold of its own sensitivities is raised. It finds the
    threshold by the bits of the whole model, embedding included; here the linears alone count, and
    the largest number of raised ones that keeps the target is taken.
    """
    low, high = job.settings["bits"], job.settings["high_bits"]
    group_size = job.settings["group_size"]
    found = dict(
        estimate_sensitivities(
            model, mx.array(job.calibration.numpy()), low, group_size, high, group_size
        )
    )
    (job.output / "sensitivities.txt").write_text(str(found))
    sizes = {name: math.prod(module.weight.shape) for name, module in linears.items()}
    overhead = 32 / group_size
    left = (job.settings["target_bpw"] - low - overhead) * sum(sizes.values())
    raised: set[str] = set()
    for name in sorted(linears, key=lambda name: -found[name]):
        left -= (high - low) * sizes[name]
        if left < 0:
            break
        raised.add(name)
    return raised


if __name__ == "__main__":
    main()
