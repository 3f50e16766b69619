"""Tables on stdout for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lwquant.types import BitPlan, SensitivityReport

if TYPE_CHECKING:  # these modules import what draws the tables
    from lwquant.evaluation.evaluate import Evaluation
    from lwquant.evaluation.evaluate_tasks import TaskEvaluation
    from lwquant.export.convert import Conversion
    from lwquant.export.record import LinearRecord
    from lwquant.inspection import Inspection
    from lwquant.measured_plans import MeasuredPlan
    from lwquant.pipeline import Result
    from lwquant.ratio_curves import RatioRow


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print one table; all columns but the first are right-aligned."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        drawn.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    Console().print(drawn)


def print_result(result: Result) -> None:
    quality = result.held_out
    table(
        f"{result.folder}",
        ["", "bits/weight", "MB", "perplexity", "KL", "top-1"],
        [
            ["original", "", "", f"{quality.reference_perplexity:.2f}", "0", "100 %"],
            [
                "quantized",
                f"{result.bpw:.3f}",
                f"{result.size_bytes / 1e6:.1f}",
                f"{quality.perplexity:.2f}",
                f"{quality.kl_divergence:.4f}",
                f"{quality.top1_agreement:.1%}",
            ],
        ],
    )
    print(f"measured on {quality.tokens} held-out tokens of the calibration text")
    print_widths({name: scheme.bits for name, scheme in result.plan.schemes.items()})
    for note in result.notes:
        print(f"note: {note}")


def print_conversion(done: Conversion) -> None:
    size = f"{done.size_bytes / 1e6:.1f}"
    table(f"{done.path}", ["", "bits/weight", "MB"], [["converted", f"{done.bpw:.3f}", size]])
    for note in done.notes:
        print(f"note: {note}")


def print_widths(bits: Mapping[str, int]) -> None:
    """How many linears of each role got which width."""
    widths = sorted(set(bits.values()))
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for name, width in bits.items():
        counts[name.rsplit(".", 1)[-1]][width] += 1
    table(
        "linears per width",
        ["role", *(f"{width} bits" for width in widths)],
        [[role, *(row[width] or "" for width in widths)] for role, row in counts.items()],
    )


def print_report(report: SensitivityReport) -> None:
    """The costliest linears, by the narrowest scheme."""
    labels = [scheme.label for scheme in report.schemes]
    order = report.costs[:, 0].argsort(descending=True).tolist()
    rows = [
        [report.linears[row].name, *(f"{cost:.3g}" for cost in report.costs[row].tolist())]
        for row in order[:20]
    ]
    table(
        f"cost by {report.metric.get('name')}: the 20 costliest linears", ["linear", *labels], rows
    )


def print_plan(plan: BitPlan) -> None:
    print(f"{plan.bpw:.4f} bits per weight, predicted cost {sum(plan.costs.values()):.4g}")
    print(decoding(plan.decode_bytes, plan.decode_us))
    print_widths({name: scheme.bits for name, scheme in plan.schemes.items()})
    for note in plan.notes:
        print(f"note: {note}")


def decoding(n_bytes: int, microseconds: float | None) -> str:
    """What decoding costs: predicted time where it is known, else the bytes that are read.

    >>> decoding(46_500_000, None)
    'the linears read 46.50 MB per decoded token'
    >>> decoding(46_500_000, 1812.34)
    'the linears take 1812.3 µs per decoded token, predicted from measured times'
    """
    if microseconds is None:
        return f"the linears read {n_bytes / 1e6:.2f} MB per decoded token"
    return (
        f"the linears take {microseconds:.1f} µs per decoded token, predicted from measured times"
    )


def print_evaluation(measured: Evaluation) -> None:
    rows = [
        [key, f"{value:.4f}" if isinstance(value, float) else value]
        for key, value in asdict(measured).items()
        if value is not None
    ]
    table("evaluation", ["", "value"], rows)


def print_tasks(measured: TaskEvaluation) -> None:
    """Accuracies and how far they are from the reference's, in percent ± standard error."""
    columns = ["task", "examples", "accuracy", "log-prob"]
    if any(task.difference is not None for task in measured.tasks.values()):
        columns += ["difference", "changed"]
    rows = []
    for name, task in measured.tasks.items():
        row = [name, task.examples, percent(task.accuracy, task.standard_error)]
        row.append(f"{task.log_prob:.3f}")
        if task.difference is not None and task.difference_error is not None:
            row.append(percent(task.difference, task.difference_error, sign="+"))
            row.append(f"{task.changed:.1%}")
        rows.append(row)
    table("tasks, in percent ± standard error", columns, rows)


def percent(value: float, error: float, sign: str = "") -> str:
    """
    >>> percent(0.25, 0.0316), percent(0.25, 0.0316, sign="+")
    ('25.0 ± 3.2', '+25.0 ± 3.2')
    """
    return f"{100 * value:{sign}.1f} ± {100 * error:.1f}"


def print_sweep(rows: Sequence[MeasuredPlan]) -> None:
    reference = rows[0].reference_perplexity
    table(
        f"the original has perplexity {reference:.2f}; {rows[0].tokens} tokens",
        ["plan", "bits/weight", "MB", "perplexity", "KL", "top-1", "predicted"],
        [
            [
                row.series,
                f"{row.bpw:.3f}",
                f"{row.megabytes:.1f}",
                f"{row.perplexity:.2f}",
                f"{row.kl_divergence:.4f}",
                f"{row.top1_agreement:.1%}",
                f"{row.predicted_cost:.4g}",
            ]
            for row in sorted(rows, key=lambda row: row.bpw)
        ],
    )


def print_ratio(rows: Sequence[RatioRow]) -> None:
    reference = rows[0].reference_perplexity
    table(
        f"the original has perplexity {reference:.2f}; {rows[0].tokens} tokens",
        ["lowered", "share", "bits/weight", "perplexity", "KL", "predicted"],
        [
            [
                row.series,
                f"{row.share:.1%}",
                f"{row.bpw:.3f}",
                f"{row.perplexity:.2f}",
                f"{row.kl_divergence:.4f}",
                f"{row.predicted_cost:.4g}",
            ]
            for row in sorted(rows, key=lambda row: (row.share, row.series))
        ],
    )


def activations(entry: LinearRecord) -> str:
    if entry.activation_bits is None:
        return ""
    return f"{entry.activation_bits} bits" + ", weights too" * bool(entry.int8_weights)


def print_inspection(found: Inspection) -> None:
    record = found.record
    print(
        f"{record.base_model}: {record.bpw:.4f} bits per weight, "
        f"{record.size_bytes / 1e6:.1f} MB (original {record.original_size_bytes / 1e6:.1f} MB)"
    )
    if record.decode_bytes is not None:  # files of an earlier lwquant do not say
        print(decoding(record.decode_bytes, record.decode_us))
    table(
        f"cost by {record.metric.get('name')}",
        ["linear", "scheme", "activations", "cost"],
        [
            [
                name,
                entry.scheme.label,
                activations(entry),
                "" if entry.cost is None else f"{entry.cost:.3g}",
            ]
            for name, entry in record.linears.items()
        ],
    )
    print_widths({name: entry.scheme.bits for name, entry in record.linears.items()})
