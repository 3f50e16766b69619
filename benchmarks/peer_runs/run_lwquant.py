"""lwquant itself, through its public API: the default preset at a budget, or uniform GPTQ.

Settings: sources (paths of the calibration texts), held_out, and bpw, or uniform_bits and
group_size. The weights are those of the saved folder, unpacked. The presets of one commit and one
calibration measure their costs once, and each row's seconds include those of that measurement.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shared import LINEAR, Job, hand_back, own_logits, read_job
from transformers import AutoModelForCausalLM

import lwquant
from lwquant.nn.linear import QuantizedLinear
from lwquant.recipe import load_recipe
from lwquant.sensitivity.report import write_report


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
        recipe = load_recipe("default").changed(group_size=wanted["group_size"])
        scheme = recipe.scheme(wanted["uniform_bits"])
        stored = sum(scheme.stored_bits(*linear.weight.shape) for linear in linears)
        bpw = stored / sum(linear.weight.numel() for linear in linears)
        # A uniform plan needs no costs; the cheapest metric fills the report.
        settings |= {"allocator": "uniform", "correction": "none", "metric": "outlier_count"}
        settings |= {"quantizer": "gptq", "group_size": wanted["group_size"]}
        settings |= {"polish": 0, "tune": 0}
        report, costs = None, 0.0
    else:
        report, costs = costs_of(job, settings)
    folder = job.output / "saved"
    start = job.seconds()
    lwquant.quantize(job.model, bpw=bpw, report=report, output=folder, **settings)
    seconds = costs + job.seconds() - start
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


def costs_of(job: Job, settings: dict[str, Any]) -> tuple[Path, float]:
    """The sensitivity report of this commit and these texts, and the seconds that it took."""
    texts = hashlib.sha256(repr(settings["sources"]).encode()).hexdigest()[:8]
    path = job.output.parent / f"lwquant-costs-{job.settings['commit']}-{texts}.json"
    took = path.with_suffix(".seconds")
    if not took.exists():
        start = job.seconds()
        write_report(lwquant.measure_model(job.model, **settings), path)
        took.write_text(str(job.seconds() - start), encoding="utf-8")
    return path, float(took.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
