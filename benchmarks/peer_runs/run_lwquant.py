"""lwquant itself, through its public API: the default preset at a budget, or uniform GPTQ.

Settings: sources (paths of the calibration texts), held_out, and bpw, or uniform_bits and
group_size. The weights are those of the saved folder, unpacked.
"""

from __future__ import annotations

import json

from shared import LINEAR, hand_back, own_logits, read_job
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.nn.linear import QuantizedLinear
from lwquant.types import QuantScheme


def main() -> None:
    job = read_job()
    wanted = job.settings
    settings = {"sources": tuple(wanted["sources"]), "held_out": wanted["held_out"]}
    bpw = wanted.get("bpw")
    if bpw is None:
        linears = [
            module
            for name, module in AutoModelForCausalLM.from_pretrained(job.model).named_modules()
            if LINEAR.fullmatch(f"{name}.weight")
        ]
        scheme = QuantScheme(wanted["uniform_bits"], wanted["group_size"])
        stored = sum(scheme.stored_bits(*linear.weight.shape) for linear in linears)
        bpw = stored / sum(linear.weight.numel() for linear in linears)
        # A uniform plan needs no costs; the cheapest metric fills the report.
        settings |= {"allocator": "uniform", "correction": "none", "metric": "outlier_count"}
        settings |= {"quantizer": "gptq", "group_size": wanted["group_size"]}
        settings |= {"polish": 0, "tune": 0}
    folder = job.output / "saved"
    start = job.seconds()
    lwquant.quantize(job.model, bpw=bpw, output=folder, **settings)
    seconds = job.seconds() - start
    run = json.loads((folder / "lwquant.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights, bits = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights[name] = module.dequantize()
            bits += module.scheme.stored_bits(*weights[name].shape)
        elif LINEAR.fullmatch(f"{name}.weight"):
            weights[name] = module.weight
            bits += 16 * module.weight.numel()
    hand_back(
        job,
        weights,
        bits,
        seconds,
        f"lwquant {lwquant.__version__}",
        logits=own_logits(model, job.probe),
        calibration=run["calibration"]["sha256"],
    )


if __name__ == "__main__":
    main()
