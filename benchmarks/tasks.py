"""Accuracy on tasks beside KL on SmolLM2-135M: do LAMBADA, ARC-easy and recall move with KL?

    python benchmarks/tasks.py                # every row that results/tasks.csv does not have yet
    python benchmarks/tasks.py --only preset  # rows whose name holds "preset"
    python benchmarks/tasks.py --table        # print the table of what is stored

KL is that of quality.py: 12 evenly spread windows of 512 tokens of the WikiText-2 raw test. The
tasks use the first --limit examples of each file of ../shared/data, and the passkey texts that
evaluate_tasks() makes. A quantized model is made once, in demo/tasks/ROW, and measured packed as a
user runs it; delete its folder and demo/tasks/sensitivity.json to make it anew. Each row is a
process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from pypi_models import SMOLLM2
from quality import DATA, GROUP, RESULTS, SEQ_LEN, WINDOWS, WORK
from rows import append, commit, machine, stored

CSV = RESULTS / "tasks.csv"
MADE = WORK / "tasks"
LIMIT = 1000
TEXT = DATA / "wikitext-2-raw-test.txt"
TASK_FILES = {"lambada": DATA / "lambada_openai.jsonl", "arc": DATA / "arc_easy.jsonl"}
SETTINGS = {"sources": (str(DATA / "c4.utf8"), str(DATA / "wiki.utf8")), "held_out": 2}
# Uniform plans need no costs; the cheapest metric fills the report.
UNIFORM = {
    "allocator": "uniform",
    "metric": "outlier_count",
    "correction": "none",
    "group_size": GROUP,
    "more_group_sizes": (),
    "tune": 0,
    "remeasure": 0,
}
ROWS = {
    "original": None,
    "rtn-3": {"bpw": 3.184, "quantizer": "rtn", **UNIFORM},
    "gptq-3": {"bpw": 3.184, "quantizer": "gptq", **UNIFORM},
    **{f"preset-{bpw}": {"bpw": bpw} for bpw in (2.8, 3.3, 3.8, 4.3)},
    # Recall is where the preset is weak at 2.8 bits: does full range for the rows of q and k with
    # the largest outputs help? By seeds, as recall differs widely between runs of the same KL.
    "again-2.8": {"bpw": 2.8},
    "unclipped-2.8": {"bpw": 2.8, "unclipped_qk": 0.1},
    **{f"seed-{seed}-2.8": {"bpw": 2.8, "seed": seed} for seed in (1, 2)},
    **{
        f"seed-{seed}-unclipped-2.8": {"bpw": 2.8, "seed": seed, "unclipped_qk": 0.1}
        for seed in (1, 2)
    },
}
SHOWN = ("lambada", "arc", "arc-normalized", "passkey")


@dataclass(frozen=True)
class Row:
    """One model on one task."""

    model: str  # a key of ROWS
    limit: int
    bpw: float
    kl_divergence: float
    task: str
    examples: int
    correct: int
    accuracy: float
    standard_error: float
    log_prob: float
    right: str  # a bit per example, the first one highest, in hexadecimal
    quantized: str  # the commit that made the model
    commit: str  # the commit that measured it
    machine: str

    @property
    def answers(self) -> list[bool]:
        return [bit == "1" for bit in f"{int(self.right, 16):0{self.examples}b}"]


def run(name: str, limit: int, threads: int) -> list[Row]:
    """Make the model where it is not there yet, and measure it in this process."""
    import torch

    import lwquant
    from lwquant.progress import StderrProgress

    torch.set_num_threads(threads)
    original = SMOLLM2.fetch(WORK)
    model, quantized = (original, "") if name == "original" else make(name, original)
    measured = lwquant.evaluate(
        model,
        text=TEXT,
        reference=original,
        seq_len=SEQ_LEN,
        windows=WINDOWS,
        progress=StderrProgress(),
    )
    tasks = lwquant.evaluate_tasks(model, **TASK_FILES, limit=limit, progress=StderrProgress())
    return [
        Row(
            name,
            limit,
            measured.bpw,
            measured.kl_divergence,
            task,
            score.examples,
            score.correct,
            score.accuracy,
            score.standard_error,
            score.log_prob,
            f"{int(''.join(str(int(right)) for right in tasks.answers[task].right), 2):x}",
            quantized,
            commit(),
            machine(),
        )
        for task, score in tasks.tasks.items()
    ]


def make(name: str, original: Path) -> tuple[Path, str]:
    """The quantized folder, and the commit that made it."""
    import lwquant
    from lwquant.export.folder import verify
    from lwquant.sensitivity.report import write_report

    folder, stamp = MADE / name, MADE / f"{name}.commit"
    if not stamp.exists():
        MADE.mkdir(parents=True, exist_ok=True)
        settings = {**SETTINGS, **ROWS[name]}
        if "allocator" not in settings:  # the presets share their costs
            report = MADE / "sensitivity.json"
            if not report.exists():
                write_report(lwquant.measure_model(original, **SETTINGS), report)
            settings["report"] = report
        lwquant.quantize(original, output=folder, overwrite=True, **settings)
        stamp.write_text(commit(), encoding="utf-8")
    verify(folder)
    return folder, stamp.read_text(encoding="utf-8")


def by_model(limit: int) -> dict[str, dict[str, Row]]:
    """Rows by model and task, in the order of ROWS; of one model on one task the latest."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in stored(Row, CSV):
        if row.limit == limit:
            found[row.model][row.task] = row
    return {name: found[name] for name in ROWS if name in found}


def print_table(models: dict[str, dict[str, Row]]) -> None:
    """Markdown: accuracies in percent with their standard errors."""
    if not models:
        print("nothing is stored for this limit")
        return
    from lwquant.tables import percent

    print(f"| model | bpw | KL | {' | '.join(SHOWN)} |")
    print("|---" * (3 + len(SHOWN)) + "|")
    for name, tasks in models.items():
        first = next(iter(tasks.values()))
        cells = [percent(tasks[task].accuracy, tasks[task].standard_error) for task in SHOWN]
        print(f"| {name} | {first.bpw:.3f} | {first.kl_divergence:.4f} | {' | '.join(cells)} |")
    print()
    for task in SHOWN:
        print_trend([tasks[task] for tasks in models.values()])


def print_trend(rows: list[Row]) -> None:
    """Whether one task's accuracy falls where KL rises."""
    task, n_examples = rows[0].task, rows[0].examples
    if len(rows) < 3:
        print(f"{task}: {len(rows)} models are too few for a trend")
        return
    wrong = inversions(rows)
    print(
        f"{task} ({n_examples} examples): Spearman correlation with KL "
        f"{spearman(rows, 'accuracy')} of the accuracy, "
        f"{spearman(rows, 'log_prob')} of the log-probability; "
        f"{len(wrong) or 'no'} inversions beyond two standard errors"
    )
    for better, worse, difference, error in wrong:
        print(
            f"  {worse.model} (KL {worse.kl_divergence:.4f}) is above {better.model} "
            f"(KL {better.kl_divergence:.4f}) by {100 * difference:.1f} ± {100 * error:.1f}"
        )


def spearman(rows: list[Row], quantity: str) -> str:
    """The rank correlation of KL and `quantity`; -1 where one always falls as the other rises."""
    from scipy.stats import spearmanr

    values = [getattr(row, quantity) for row in rows]
    if len(set(values)) == 1:
        return "undefined (all models are equal)"
    return f"{spearmanr([row.kl_divergence for row in rows], values).statistic:+.2f}"


def inversions(rows: list[Row]) -> list[tuple[Row, Row, float, float]]:
    """Pairs whose model of more KL has the higher accuracy by more than two standard errors.

    The difference and its error are over the examples of both, (less KL, more KL, ...).
    """
    from lwquant.evaluation.tasks import paired_difference

    found = []
    for better, worse in itertools.combinations(sorted(rows, key=lambda r: r.kl_divergence), 2):
        difference, error = paired_difference(worse.answers, better.answers)
        if difference > 2 * error and better.kl_divergence < worse.kl_divergence:
            found.append((better, worse, difference, error))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--limit", type=int, default=LIMIT, help="examples of each file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(
            json.dumps(
                [asdict(row) for row in run(arguments.row, arguments.limit, arguments.threads)]
            )
        )
        return
    done = by_model(arguments.limit)
    for name in [] if arguments.table else ROWS:
        if arguments.only in name and name not in done:
            command = [sys.executable, __file__, "--row", name, "--limit", str(arguments.limit)]
            command += ["--threads", str(arguments.threads)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for row in json.loads(output.splitlines()[-1]):
                append(Row(**row), CSV)
    print_table(by_model(arguments.limit))


if __name__ == "__main__":
    main()
