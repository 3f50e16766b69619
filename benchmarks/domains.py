"""Calibrated on texts of one kind, tested on others: what a plan owes to its calibration.

    python benchmarks/domains.py            # every row that results/domains.csv lacks
    python benchmarks/domains.py --table

SmolLM2-135M is calibrated on C4, on Wikipedia, or on source code alone, on all three, or on what
lwquant has without any file, and tested on all of them and on WikiText-2. The first half of each
text calibrates, the second tests. At the size of the uniform 3-bit plan, with the rounding and the
propagation of the default preset: its mixed plan beside the uniform one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

from ablation import costs_of, quantize_and_compare
from pypi_models import SMOLLM2
from rows import HERE, commit, machine, measure_missing, stored

CSV = HERE / "results" / "domains.csv"
WORK = HERE.parent / "demo"
DATA = HERE.parent.parent / "shared" / "data"
TEXTS = {"C4": "c4.utf8", "Wikipedia": "wiki.utf8", "code": "code.utf8"}
TESTS = {**TEXTS, "WikiText-2": "wikitext-2-raw-test.txt"}
# Files, or sources that lwquant has itself; several share the windows.
KINDS = {
    **{name: (file,) for name, file in TEXTS.items()},
    "C4, Wikipedia and code": tuple(TEXTS.values()),
    "Python's documentation": ("builtin",),
    "the model's own text": ("self",),
    "both of these": ("builtin", "self"),
}
PLANS = {"mixed": {}, "uniform": {"allocator": "uniform", "metric": "outlier_count"}}
BITS, GROUP, WINDOWS, SEQ_LEN = 3, 64, 12, 512


@dataclass(frozen=True)
class Row:
    """One quantized model on one text."""

    calibration: str
    plan: str
    text: str
    bpw: float
    kl_divergence: float
    perplexity: float
    seconds: float  # metric, plan and quantization; shared by its texts
    commit: str
    machine: str


def run(calibration: str, plan_name: str) -> list[Row]:
    """One quantization, tested on all texts, in this process."""
    from lwquant.allocators.plan import uniform_plan
    from lwquant.evaluation.windows import windows_of
    from lwquant.matmul import fast_float32
    from lwquant.prepare import open_model, prepare_tokens
    from lwquant.recipe import load_recipe
    from lwquant.stages import plan_report

    recipe = load_recipe("default").changed(
        sources=tuple(map(source_of, KINDS[calibration])),
        group_size=GROUP,
        seq_len=SEQ_LEN,
        held_out=2,
        **PLANS[plan_name],
    )
    with fast_float32():
        opened = open_model(SMOLLM2.fetch(WORK))
        tokens = prepare_tokens(opened, recipe).calibration
        windows = {
            name: windows_of(halves(file)[1], opened.tokenizer, SEQ_LEN, WINDOWS)
            for name, file in TESTS.items()
        }
        report, measuring = costs_of(opened, tokens, recipe)
        start = time.monotonic()
        size = uniform_plan(opened.decoder.linears, recipe.scheme(BITS)).bpw
        plan = plan_report(report, size, recipe=recipe)
        found = quantize_and_compare(opened, tokens, plan, recipe.rounding(), windows)
    seconds = measuring + time.monotonic() - start
    return [
        Row(
            calibration,
            plan_name,
            name,
            plan.bpw,
            quality.kl_divergence,
            quality.perplexity,
            seconds,
            commit(),
            machine(),
        )
        for name, quality in found.items()
    ]


def source_of(kind: str) -> str:
    """The first half of a file of DATA, as a file; other sources as they are."""
    if kind not in TEXTS.values():
        return kind
    WORK.mkdir(exist_ok=True)
    half = WORK / f"domain-{kind}.txt"
    half.write_text(halves(kind)[0], encoding="utf-8")
    return str(half)


def halves(file: str) -> tuple[str, str]:
    text = (DATA / file).read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2)
    return text[:middle], text[middle:]


def print_table(rows: list[Row]) -> None:
    """Markdown: KL of the mixed and of the uniform plan, by calibration and text."""
    print("| calibrated on | plan | bpw |", " | ".join(TESTS), "|")
    print("|---" * (3 + len(TESTS)) + "|")
    for calibration in KINDS:
        for plan in PLANS:
            mine = {r.text: r for r in rows if (r.calibration, r.plan) == (calibration, plan)}
            if mine:
                cells = [f"{mine[text].kl_divergence:.3f}" for text in TESTS]
                bpw = next(iter(mine.values())).bpw
                print(f"| {calibration} | {plan} | {bpw:.3f} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps([asdict(row) for row in run(*arguments.row)]))
        return
    # The uniform plan beside those of one kind only.
    wanted = [(name, plan) for plan in PLANS for name in (TEXTS if plan == "uniform" else KINDS)]
    if not arguments.table:
        measure_missing(Row, CSV, __file__, wanted, lambda row: (row.calibration, row.plan))
    print_table(stored(Row, CSV))


if __name__ == "__main__":
    main()
