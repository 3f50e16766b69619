"""Running a metric over a model, and reports as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lwquant.errors import PlanError
from lwquant.jsonfile import read_json, write_json
from lwquant.methods import describe
from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity import Metric
from lwquant.types import CalibrationSet, LinearSpec, SensitivityReport

KIND, VERSION = "lwquant-sensitivity", 1


def measure_sensitivity(
    decoder: Decoder,
    calibration: CalibrationSet,
    schemes: Sequence[QuantScheme],
    metric: Metric,
    quantizer: Quantizer,
    *,
    model: str = "",
    progress: Progress = silent,
) -> SensitivityReport:
    """Costs of every linear in every scheme of the menu."""
    measured = partial(metric, progress=progress)
    result = measured(decoder, calibration.tokens, tuple(schemes), quantizer)
    if not torch.isfinite(result.costs).all():
        row = int((~torch.isfinite(result.costs)).any(1).nonzero()[0])
        raise ValueError(f"{decoder.linears[row].name}: the measured cost is not finite")
    return SensitivityReport(
        decoder.linears,
        tuple(schemes),
        result.costs,
        describe(metric),
        model,
        {
            "source": calibration.source,
            "n_samples": calibration.tokens.shape[0],
            "seq_len": calibration.tokens.shape[1],
            "sha256": calibration.sha256,
        },
        result.scores,
    )


def write_report(report: SensitivityReport, path: Path) -> None:
    labels = [scheme.label for scheme in report.schemes]
    linears = {
        spec.name: {
            "block": spec.block,
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "input_group": spec.input_group,
            "costs": dict(zip(labels, row, strict=True)),
        }
        for spec, row in zip(report.linears, report.costs.tolist(), strict=True)
    }
    body = {
        "model": report.model,
        "metric": report.metric,
        "calibration": report.calibration,
        "schemes": labels,
        "scores": report.scores,
        "transform": report.transform,
        "linears": linears,
    }
    write_json(path, KIND, VERSION, body)


def read_report(path: Path) -> SensitivityReport:
    """A report, perhaps edited by hand. PlanError names what is wrong in it."""
    body = read_json(path, KIND, VERSION)
    try:
        labels = body["schemes"]
        schemes = tuple(QuantScheme.parse(label) for label in labels)
        linears, costs = [], []
        for name, entry in body["linears"].items():
            linears.append(
                LinearSpec(
                    name,
                    int(entry["block"]),
                    int(entry["out_features"]),
                    int(entry["in_features"]),
                    int(entry["input_group"]),
                )
            )
            row = [float(entry["costs"][label]) for label in labels]
            if not all(math.isfinite(cost) and cost >= 0 for cost in row):
                raise PlanError(f"{path}: {name}: costs must be finite and not negative")
            costs.append(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path}: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from error
    if not linears:
        raise PlanError(f"{path}: no linears")
    scores = body.get("scores")
    return SensitivityReport(
        tuple(linears),
        schemes,
        torch.tensor(costs, dtype=torch.float64),
        body.get("metric", {}),
        body.get("model", ""),
        body.get("calibration", {}),
        tuple(scores) if scores is not None else None,
        body.get("transform"),
    )
