"""Loss against the share of weights at a low width: whole blocks lowered, or single linears.

The curves of "Scaling Laws for Mixed Quantization", arXiv:2410.06722. Both choose what to lower by
the same costs, so that the gap between them is what the finer unit is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lwquant.allocators import exact
from lwquant.allocators.plan import make_plan, uniform_plan
from lwquant.errors import BudgetError
from lwquant.evaluation.plot import plot_ratio
from lwquant.export.folder import check_output, new_folder, write_manifest
from lwquant.matmul import fast_float32
from lwquant.measured_plans import MeasuredPlan, bench_for, measure_plans, write_rows
from lwquant.prepare import open_model
from lwquant.progress import Progress, StderrProgress
from lwquant.recipe import Recipe, transform_of
from lwquant.scheme import QuantScheme
from lwquant.stages import merged
from lwquant.types import BitPlan, SensitivityReport


@dataclass(frozen=True)
class RatioRow(MeasuredPlan):
    """One plan of two widths."""

    share: float  # of the weights that are at the low width


def ratio_curves(
    model: str | Path,
    *,
    low: int = 2,
    high: int = 4,
    shares: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    output: str | Path,
    text: str | Path | None = None,
    windows: int = 12,
    recipe: str | Path | Recipe = "default",
    calibration: str | Sequence[str] | None = None,
    device: str = "cpu",
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> list[RatioRow]:
    """Lower growing shares of the weights from `high` to `low` bits, least costly first, measure.

    Series "blocks" lowers whole blocks, "linears" single ones. Writes ratio.csv, ratio.png,
    sensitivity.json and the plans into `output`.

    Args:
        shares: the least to lower, as fractions of the linears' weights.
        text, windows: as for sweep().

    Raises BudgetError for shares outside [0, 1] and widths that do not fall, else LwquantError as
    quantize() does.
    """
    progress = progress or StderrProgress()
    chosen, texts = merged(recipe, calibration, settings)
    if not low < high:
        raise BudgetError(f"low={low} must be below high={high}")
    wrong = [share for share in shares if not 0 <= share <= 1]
    if wrong or not shares:
        raise BudgetError(f"shares={list(shares)} must be fractions between 0 and 1")
    chosen = chosen.changed(bits=(low, high), more_group_sizes=())
    rounding = chosen.rounding()
    chosen.refuse_replanning("is for one budget, not for curves", "max_decode_us")
    check_output(output, overwrite)
    with fast_float32(), new_folder(output, overwrite) as folder:
        opened = open_model(model, device, revision, transform_of(chosen.transform))
        bench = bench_for(opened, chosen, texts, folder, progress, text=text, n_windows=windows)
        report = bench.report
        plans = [
            (series, plan)
            for share in sorted(set(shares))
            for series, plan in plans_of_share(report, share).items()
        ]
        measured = measure_plans(bench, plans, rounding, progress)
        rows = [
            RatioRow(**asdict(row), share=share_of(plan, report, chosen.scheme(low)))
            for row, (_, plan) in zip(measured, plans, strict=True)
        ]
        write_rows(rows, folder / "ratio.csv")
        plot_ratio(rows, folder / "ratio.png", low, high, model=opened.name)
        write_manifest(folder)
    return rows


def plans_of_share(report: SensitivityReport, share: float) -> dict[str, BitPlan]:
    """The cheapest plans with at least `share` of the weights lowered, by block and by linear.

    The report has two schemes, narrow then wide.
    """
    blocks: dict[int, list[str]] = {}
    for spec in report.linears:
        blocks.setdefault(spec.block, []).append(spec.name)
    return {
        "blocks": _lowered(report, share, list(blocks.values())),
        "linears": _lowered(report, share, []),
    }


def _lowered(report: SensitivityReport, share: float, ties: list[list[str]]) -> BitPlan:
    """Spend as few bits as lowering `share` of the weights would, where it costs least."""
    narrow, wide = (uniform_plan(report.linears, scheme).bpw for scheme in report.schemes)
    rounding = 0.25 / sum(spec.n_weights for spec in report.linears)  # a quarter of one bit
    bpw = wide - share * (wide - narrow) + rounding
    return make_plan(report, bpw, exact, ties=ties, allow_worse=True)


def share_of(plan: BitPlan, report: SensitivityReport, scheme: QuantScheme) -> float:
    """The share of the weights that the plan stores in `scheme`."""
    lowered = sum(s.n_weights for s in report.linears if plan.schemes[s.name] == scheme)
    return lowered / sum(s.n_weights for s in report.linears)
