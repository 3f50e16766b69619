"""Perplexity and KL against bits on SmolLM2-135M: rounding, propagation, allocation, block order.

    python benchmarks/quality.py            # every row that results/quality.csv does not have yet
    python benchmarks/quality.py --only 3   # rows whose name holds "3"
    python benchmarks/quality.py --table    # print the table and draw the block-order curve

Protocol of the peers' table: 64 calibration windows of 512 tokens, half C4, half Wikipedia; 12
evenly spread windows of 512 of the WikiText-2 raw test; bits count scales and zeros. Each row is a
process of its own, so its seconds and peak memory are its own too. Scales take 16 bits, as in most
formats, but for the rows of the default preset, which stores them in 8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

from rows import HERE, commit, kept_report, machine, measure_missing, stored

RESULTS = HERE / "results"
CSV = RESULTS / "quality.csv"
WORK = HERE.parent / "demo"  # git-ignored: the model and the sensitivity reports
DATA = HERE.parent.parent / "shared" / "data"
WINDOWS, SEQ_LEN = 12, 512
GROUP = 64
# Shares of blocks at 2 bits. None and all are rows of their own, where the order does not matter;
# half is what allocation-rtn/3/ranked-... measures.
SHARES = (0.25, 0.75, 0.125)
# Peers' sizes, and those of the uniform rows at 3 and 4 bits.
PRESET_BUDGETS = (3.5, 2.8, 3.3, 3.8, 4.3, 3.2968, 4.3125)
RANDOM_SEEDS = (0, 1, 2)
REMEASURE_ROUNDS, REMEASURE_WINDOWS = 3, 16
TUNE_WINDOWS = 64
LOWERED = ("lim", "zd", *(f"random-{seed}" for seed in RANDOM_SEEDS))
# How each section rounds; the rows of the section "rounding" say it themselves.
ROUNDING = {
    "allocation-rtn": "rtn",
    "allocation-gptq": "gptq",
    "allocation": "gptq+qep",
    "blocks": "rtn",
    "preset": "preset",
    "tuned": "preset",
}
# The uniform row that each section's mixed plans are compared with: same rounding, same bits.
UNIFORM = {
    "allocation-rtn": "allocation-rtn/{}/uniform",
    "allocation-gptq": "rounding/{}/gptq",
    "allocation": "rounding/{}/gptq+qep",
}


@dataclass(frozen=True)
class Row:
    """One measured plan."""

    name: str
    bpw: float
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    seconds: float  # statistics, rounding and propagation of the whole model
    sensitivity_seconds: float  # measuring the costs, once per metric; 0 where none were needed
    peak_mb: float
    commit: str
    machine: str


def jobs() -> list[str]:
    """Names say everything: section / setting / ..., the most telling rows first."""
    rounding = [f"rounding/{b}/{m}" for b in (3, 4, 2) for m in ("rtn", "gptq", "gptq+qep")]
    orders = ["ranked-lim", "ranked-zd", "ranked-lim-reversed"]
    orders += [f"ranked-random-{seed}" for seed in RANDOM_SEEDS]
    # The uniform rows of the other roundings are those of the first section.
    allocation = [f"allocation-gptq/{b}/exact" for b in (3, 4)]
    allocation += [f"allocation/{b}/{m}" for b in (3, 4) for m in ("exact", "spikes")]
    # Plain rounding: a row takes seconds, but for the costs.
    plain = ["uniform", "exact", "remeasured", "spikes", *orders]
    allocation += [f"allocation-rtn/{b}/{m}" for b in (3, 4) for m in plain]
    blocks = [f"blocks/{order}/{share}" for order in LOWERED for share in SHARES]
    blocks += [f"blocks/any/{share}" for share in (0.0, 1.0)]
    slow = [f"allocation/{b}/{m}" for b in (3, 4) for m in orders]
    presets = [f"preset/{bpw}" for bpw in PRESET_BUDGETS]
    tuned = ["tuned/2.8", "tuned/3.3"]
    return [*rounding, *allocation, *presets, *tuned, *blocks, *slow]


def run(name: str) -> Row:
    """Measure one row in this process."""

    from lwquant.evaluation.windows import windows_of
    from lwquant.held_out import measure_plan
    from lwquant.matmul import fast_float32
    from lwquant.prepare import open_model, prepare_tokens
    from lwquant.recipe import load_recipe
    from lwquant.rounding import rounding_of

    sys.path.insert(0, str(HERE))
    from pypi_models import SMOLLM2

    section, *rest = name.split("/")
    recipe = load_recipe("default").changed(
        sources=(str(DATA / "c4.utf8"), str(DATA / "wiki.utf8")), group_size=GROUP, held_out=2
    )
    if section not in ("preset", "tuned"):
        recipe = recipe.changed(scale_bits=16, fine_zeros=())
    with fast_float32():
        opened = open_model(SMOLLM2.fetch(WORK))
        if section == "tuned":
            recipe = recipe.changed(tune=TUNE_WINDOWS)
        drawn = prepare_tokens(opened, recipe)
        windows = drawn.calibration
        text = (DATA / "wikitext-2-raw-test.txt").read_text(encoding="utf-8")
        tested = windows_of(text, opened.tokenizer, SEQ_LEN, WINDOWS)
        how = rest[-1] if section == "rounding" else ROUNDING[section]
        rounding = recipe.rounding()
        if how != "preset":
            quantizer, _, correction = how.partition("+")
            rounding = rounding_of(quantizer, correction or "none")
            recipe = recipe.changed(quantizer=quantizer)
        plan, measuring = plan_for(section, rest, opened, windows, recipe)
        start = time.monotonic()
        tokens = windows.tokens if how != "rtn" else windows.tokens[:1]
        quality = measure_plan(
            opened.decoder,
            plan,
            rounding,
            tokens,
            tested,
            progress=_quiet,
            tuning=drawn.tuning,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(
        name,
        plan.bpw,
        quality.perplexity,
        quality.reference_perplexity,
        quality.kl_divergence,
        quality.top1_agreement,
        quality.tokens,
        time.monotonic() - start,
        measuring,
        peak,
        commit(),
        machine(),
    )


def plan_for(section, rest, opened, windows, recipe):
    """The row's plan, and the seconds its sensitivity report took."""
    from lwquant.allocators import exact, ranked, spikes
    from lwquant.allocators.plan import make_plan, uniform_plan
    from lwquant.scheme import QuantScheme

    linears = opened.decoder.linears
    if section == "rounding" or rest[-1] == "uniform":
        return uniform_plan(linears, QuantScheme(int(rest[0]), GROUP)), 0.0
    if section in ("preset", "tuned"):
        report, seconds = report_of(recipe.metric, opened, windows, recipe)
        return make_plan(report, float(rest[0]), exact), seconds
    blocks = list(range(opened.decoder.n_blocks))
    if section == "blocks":
        share = float(rest[1])
        raised = len(blocks) - round(share * len(blocks))
        order = "lim" if rest[0] == "any" else rest[0]
        top = set(_order(order, opened, windows, recipe, blocks)[:raised])
        schemes = {s.name: QuantScheme(4 if s.block in top else 2, GROUP) for s in linears}
        return _plan(schemes, linears), 0.0
    bpw = uniform_plan(linears, QuantScheme(int(rest[0]), GROUP)).bpw
    how = rest[1]
    if how in ("exact", "spikes"):
        report, seconds = report_of(recipe.metric, opened, windows, recipe)
        return make_plan(report, bpw, {"exact": exact, "spikes": spikes}[how]), seconds
    if how == "remeasured":
        return remeasured_plan(opened, windows, bpw, recipe)
    metric = "outlier_count" if "zd" in how else "embedding_delta"
    report, seconds = report_of(metric, opened, windows, recipe)
    # Around 3 bits the paper's pair 4/2; around 4 bits the closest pair with 4 in the middle.
    widths = (4, 2) if int(rest[0]) == 3 else (5, 3)
    settings = {"bits": widths, "reverse": how.endswith("reversed")}
    if "random" in how:
        settings["order"] = _order(how.removeprefix("ranked-"), opened, windows, recipe, blocks)
    plan = make_plan(report, bpw, partial(ranked, **settings), allow_worse=True)
    return plan, seconds


def remeasured_plan(opened, windows, bpw, recipe):
    """The exact plan of costs measured around the plan, and the seconds they took."""
    import torch

    from lwquant.remeasure import remeasured
    from lwquant.stages import plan_report
    from lwquant.types import SensitivityReport

    start = time.monotonic()
    linears, schemes = opened.decoder.linears, recipe.schemes()
    blank = SensitivityReport(linears, schemes, torch.zeros(len(linears), len(schemes)), {})
    report = remeasured(
        opened,
        blank,
        plan_report(blank, bpw, recipe=recipe.changed(allocator="uniform")),
        lambda costs: plan_report(costs, bpw, recipe=recipe),
        recipe.cost_quantizer(),
        windows.tokens[:REMEASURE_WINDOWS],
        REMEASURE_ROUNDS,
        _quiet,
    )
    return plan_report(report, bpw, recipe=recipe), time.monotonic() - start


def _order(name, opened, windows, recipe, blocks):
    """Blocks, most important first."""
    if name.startswith("random"):
        shuffled = list(blocks)
        random.Random(int(name.rsplit("-", 1)[1])).shuffle(shuffled)
        return shuffled
    metric = {"lim": "embedding_delta", "zd": "outlier_count"}[name]
    report, _ = report_of(metric, opened, windows, recipe)
    return sorted(blocks, key=lambda block: -report.scores[block])


def _plan(schemes, linears):
    from lwquant.types import BitPlan, plan_bpw

    return BitPlan(schemes, plan_bpw(schemes, linears))


def report_of(metric, opened, windows, recipe):
    """The metric's report, measured once per commit and kept beside the model."""
    from lwquant.stages import measure

    path = WORK / f"report-{metric}-{recipe.quantizer}-s{recipe.scale_bits}-{commit()}.json"
    return kept_report(
        path, lambda: measure(opened, windows, recipe.changed(metric=metric), _quiet)
    )


def _quiet(stage, item, done, total):
    pass


def print_table(rows: list[Row]) -> None:
    """Markdown, as in the README: every row, then what each mixed plan gains on the uniform one."""
    print("| row | bpw | perplexity | KL | top-1 | seconds (+ costs) | peak MB | commit |")
    print("|---|---|---|---|---|---|---|---|")
    order = {name: position for position, name in enumerate(jobs())}
    for row in sorted(rows, key=lambda row: order.get(row.name, len(order))):
        if not row.name.startswith("blocks/"):
            print(
                f"| {row.name} | {row.bpw:.3f} | {row.perplexity:.2f} | {row.kl_divergence:.4f} | "
                f"{row.top1_agreement:.3f} | {row.seconds:.0f} (+ {row.sensitivity_seconds:.0f}) | "
                f"{row.peak_mb:.0f} | {row.commit} |"
            )
    print()
    kl = {row.name: row.kl_divergence for row in rows}
    for section, uniform in UNIFORM.items():
        for bits, how in itertools.product("34", ("exact", "remeasured")):
            mixed, same = f"{section}/{bits}/{how}", uniform.format(bits)
            if mixed in kl and same in kl:
                print(f"{mixed}: {1 - kl[mixed] / kl[same]:.1%} less KL than {same}")


def draw_blocks(rows: list[Row]) -> None:
    """KL against the share of blocks lowered from 4 to 2 bits, in score order and at random."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for order in LOWERED:
        points = {
            float(row.name.rsplit("/", 1)[1]): row.kl_divergence
            for row in rows
            if row.name.startswith((f"blocks/{order}/", "blocks/any/"))
        }
        for row in rows:
            if row.name == f"allocation-rtn/3/ranked-{order}":
                points[0.5] = row.kl_divergence
        style = {"color": "0.65", "lw": 1} if "random" in order else {"marker": "o"}
        label = None if order in ("random-1", "random-2") else order.removesuffix("-0")
        axes.plot(
            sorted(points),
            [points[share] for share in sorted(points)],
            label=label,
            **style,
        )
    axes.set(
        xlabel="share of blocks at 2 bits, the rest at 4 (least important first)",
        ylabel="KL to the original, nats per token",
        yscale="log",
        title="SmolLM2-135M, plain rounding, WikiText-2 test",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "block_order.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps([asdict(run(arguments.row))]))
        return
    wanted = [(name,) for name in jobs() if arguments.only in name]
    if not arguments.table:
        measure_missing(Row, CSV, __file__, wanted, lambda row: (row.name,))
    print_table(stored(Row, CSV))
    if any(row.name.startswith("blocks/") for row in stored(Row, CSV)):
        draw_blocks(stored(Row, CSV))


if __name__ == "__main__":
    main()
