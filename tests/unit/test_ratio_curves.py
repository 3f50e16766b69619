"""Curves of loss against the share of weights lowered."""

import csv
import itertools
import json

import pytest
import torch

import lwquant
from lwquant.errors import BudgetError, LwquantError
from lwquant.evaluation import plot
from lwquant.ratio_curves import plans_of_share, share_of
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.types import LinearSpec, SensitivityReport

LOW, HIGH = QuantScheme(2, 32), QuantScheme(4, 32)
RECIPE = Recipe(
    n_samples=4, seq_len=64, held_out=3, sensitivity_samples=2, group_size=32,
    metric="hessian", quantizer="rtn", correction="none",
)  # fmt: skip
QUIET = {"progress": lambda *_: None}


def report_of(costs, sizes):
    """Two linears a block; what lowering each costs."""
    linears = tuple(
        LinearSpec(f"model.layers.{n // 2}.{'qo'[n % 2]}_proj", n // 2, size, 64, n % 2)
        for n, size in enumerate(sizes)
    )
    both = torch.tensor([[cost, 0.0] for cost in costs], dtype=torch.float64)
    return SensitivityReport(linears, (LOW, HIGH), both, {"name": "given"})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_plans_are_the_cheapest_of_all_that_lower_enough(share):
    costs, sizes = [5.0, 1.0, 2.0, 2.5, 0.5, 4.0], [32, 64, 32, 32, 64, 32]
    report = report_of(costs, sizes)
    total = sum(sizes)
    plans = plans_of_share(report, share)

    def cost_of(plan):
        pairs = zip(report.linears, costs, strict=True)
        return sum(cost for spec, cost in pairs if plan.schemes[spec.name] == LOW)

    choices = list(itertools.product([False, True], repeat=6))
    enough = [c for c in choices if sum(itertools.compress(sizes, c)) >= share * total - 1e-9]
    by_block = [c for c in enough if c[::2] == c[1::2]]
    for series, allowed in (("linears", enough), ("blocks", by_block)):
        best = min(sum(itertools.compress(costs, c)) for c in allowed)
        assert cost_of(plans[series]) == pytest.approx(best)
        assert share_of(plans[series], report, LOW) >= share - 1e-9
    names = [{p.schemes[s.name] for s in report.linears[2:4]} for p in [plans["blocks"]]]
    assert all(len(widths) == 1 for widths in names)


def test_the_curves_start_and_end_together_and_are_written(tiny_folder, tmp_path, monkeypatch):
    drawn = []
    save = plot._save
    monkeypatch.setattr(
        plot, "_save", lambda figure, *rest: (drawn.append(figure), save(figure, *rest))
    )
    rows = lwquant.ratio_curves(
        tiny_folder,
        low=2,
        high=4,
        shares=[0, 0.5, 1],
        output=tmp_path / "out",
        recipe=RECIPE,
        **QUIET,
    )
    assert len(rows) == 6
    by_series = {
        series: [row for row in rows if row.series == series] for series in ("blocks", "linears")
    }
    for start_or_end in (0, 2):
        pair = [curve[start_or_end] for curve in by_series.values()]
        assert pair[0].kl_divergence == pytest.approx(pair[1].kl_divergence)
        assert pair[0].share == pair[1].share == start_or_end / 2
    for curve in by_series.values():
        assert [row.share for row in curve] == sorted(row.share for row in curve)
        assert curve[0].kl_divergence < curve[1].kl_divergence < curve[2].kl_divergence
        assert curve[1].share == pytest.approx(0.5, abs=0.2)
    assert by_series["linears"][1].predicted_cost <= by_series["blocks"][1].predicted_cost
    with (tmp_path / "out" / "ratio.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["share"]) for row in table] == [row.share for row in rows]
    labels = [line.get_label() for line in drawn[0].axes[0].get_lines()]
    assert labels == ["whole blocks", "single linears"]
    assert len(list((tmp_path / "out").glob("plan-*.json"))) == 6
    report = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert report["schemes"] == ["2b-g32-s8-z8", "4b-g32-s8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 4, "high": 4}, "low=4"),
        ({"shares": [0.5, 1.5]}, "1.5"),
        ({"shares": []}, "shares"),
        ({"low": 9}, "low=9|bits=9"),
    ],
)
def test_impossible_curves_are_refused_before_the_work(tiny_folder, tmp_path, arguments, message):
    with pytest.raises(LwquantError, match=message):
        lwquant.ratio_curves(
            tiny_folder, output=tmp_path / "out", recipe=RECIPE, **arguments, **QUIET
        )
    assert not (tmp_path / "out").exists()
    assert issubclass(BudgetError, LwquantError)
