"""Results of lwquant in other engines: do they compute what lwquant does?

    python benchmarks/engines.py                   # SmolLM2-135M in mlx-lm, GPTQModel, transformers
    python benchmarks/engines.py --bpw 3.5 --engines mlx

For each engine the model is quantized by the recipe of its format (`--effort fast`, the calibration
of peers.py), converted, loaded by the engine in an environment of its own, and run on windows of
WikiText-2. KL is of the engine's predictions to those of lwquant's kernels from the same weights
(16-bit activations): what a conversion and another engine's arithmetic change, not what
quantization loses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PEERS_WORK, environment_of, model_of
from rows import commit, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwquant
from lwquant.evaluation.windows import windows_of
from lwquant.progress import StderrProgress

SEQ_LEN, WINDOWS = 256, 4
RUNS = Path(__file__).parent / "engine_runs"


@dataclass(frozen=True)
class Engine:
    to: str  # the format
    script: str
    peer: str  # of peers.py, whose environment it has
    settings: dict[str, Any] = field(default_factory=dict)  # of the recipe, beside the format's own
    environment: dict[str, str] = field(default_factory=dict)


ENGINES = {
    "mlx": Engine("mlx", "run_mlx.py", "mlxlm"),
    "gptqmodel": Engine(
        "gptq", "run_gptqmodel.py", "gptqmodel", environment={"GPTQMODEL_CPU_WORKERS": "2"}
    ),
    # transformers cannot load zeros of this format.
    "transformers": Engine(
        "compressed-tensors", "run_transformers.py", "lwquant", {"symmetric": True}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bpw", type=float, default=4.0)
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=ENGINES)
    arguments = parser.parse_args()
    model = model_of("smollm2")
    (PEERS_WORK / "out").mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {commit()}: {' '.join(sys.argv)}")
    print("| engine | format | bpw | bpw there | MB there | perplexity | perplexity there | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.engines:
        engine = ENGINES[name]
        own, other = (PEERS_WORK / "out" / f"engine-{name}-{kind}" for kind in ("own", "other"))
        for folder in (own, other):
            shutil.rmtree(folder, ignore_errors=True)
        fast = lwquant.load_recipe("fast")
        recipe = replace(
            lwquant.load_recipe(engine.to),
            quantizer=fast.quantizer,
            n_samples=fast.n_samples,
            sensitivity_samples=fast.sensitivity_samples,
            held_out=2,
            sources=tuple(map(str, model.calibration)),
            **engine.settings,
        )
        made = lwquant.quantize(
            model.folder, bpw=arguments.bpw, output=own, recipe=recipe, progress=StderrProgress()
        )
        done = lwquant.convert(own, other, to=engine.to)
        reference = PEERS_WORK / "out" / "engine-reference.npz"
        perplexity = write_reference(own, next(iter(model.tests.values())), reference)
        there = run(engine, other, reference)
        size = f"{done.size_bytes / 1e6:.1f}"
        bits = f"{made.bpw:.3f} | {done.bpw:.3f}"
        quality = f"{perplexity:.3f} | {there['perplexity']:.3f} | {there['kl']:.1e}"
        print(f"| {name} | {engine.to} | {bits} | {size} | {quality} |", flush=True)


def write_reference(folder: Path, text: Path, to: Path) -> float:
    """Windows and lwquant's log-probabilities there; returns its perplexity on them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    lwquant.set_activation_bits(model, 16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = windows_of(text.read_text(encoding="utf-8"), tokenizer, SEQ_LEN, WINDOWS)
    with torch.no_grad():
        found = [model(ids[None]).logits[0].float().log_softmax(-1) for ids in windows]
    np.savez(to, windows=windows.numpy(), log_probabilities=torch.stack(found).numpy())
    losses = [
        torch.nn.functional.nll_loss(own[:-1], ids[1:])
        for own, ids in zip(found, windows, strict=True)
    ]
    return float(torch.stack(losses).mean().exp())


def run(engine: Engine, folder: Path, reference: Path) -> dict[str, float]:
    command = [environment_of(engine.peer), RUNS / engine.script, folder, reference]
    environment = dict(os.environ, **engine.environment)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{engine.script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


if __name__ == "__main__":
    main()
