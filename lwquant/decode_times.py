"""Measured times of single linears, from which the decode time of a plan is predicted.

A table is written by benchmarks/kernels.py on the machine that is to decode, and holds
microseconds of one linear for one token. Attention, norms, embeddings and head take the same time
in every plan and are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwquant.errors import PlanError
from lwquant.jsonfile import read_json, write_json
from lwquant.scheme import QuantScheme
from lwquant.types import LinearSpec

KIND, VERSION = "lwquant-decode-times", 1
BENCHMARK = "benchmarks/kernels.py"  # what writes a table
ARGUMENTS = "--no-peers --tokens 1 --group-sizes 64"

Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class DecodeTimes:
    """Microseconds of a linear for one token, by its shape and the label of its scheme."""

    path: str  # of the file, for messages
    machine: Mapping[str, Any]  # where it was measured, and the commit of what was
    times: Mapping[Shape, Mapping[str, float]]

    def of(
        self, linears: Sequence[LinearSpec], schemes: Sequence[QuantScheme]
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Microseconds (n_linears, n_schemes).

        Raises PlanError naming every shape that the table lacks, else every scheme.
        """
        shapes = [(spec.out_features, spec.in_features) for spec in linears]
        missing = sorted({shape for shape in shapes if shape not in self.times})
        if missing:
            wanted = ",".join(shape_label(shape) for shape in missing)
            raise PlanError(
                f"{self.path} has no times for linears of {wanted}; measure them: "
                f"python {BENCHMARK} {ARGUMENTS} --shapes {wanted} --write FILE"
            )
        labels = [scheme.label for scheme in schemes]
        for shape in sorted(set(shapes)):
            unknown = [label for label in labels if label not in self.times[shape]]
            if unknown:
                raise PlanError(
                    f"{self.path} has no times for linears of {shape_label(shape)} in "
                    f"{', '.join(unknown)}: take its schemes ({', '.join(self.times[shape])}) "
                    f"or measure again, with {BENCHMARK}'s --group-sizes and --scale-bits"
                )
        return np.array([[self.times[shape][label] for label in labels] for shape in shapes])

    def of_plan(self, schemes: Mapping[str, QuantScheme], linears: Sequence[LinearSpec]) -> float:
        """Microseconds per decoded token of all linears together; PlanError as of()."""
        return sum(self.of([spec], [schemes[spec.name]]).item() for spec in linears)

    @property
    def machine_label(self) -> str:
        """One line: processor, instructions, threads and commit, as far as they are known."""
        known = {key: self.machine[key] for key in ("cpu", "isa") if self.machine.get(key)}
        words = [str(value) for value in known.values()]
        words += [f"{k} {self.machine[k]}" for k in ("threads", "commit") if k in self.machine]
        return ", ".join(words)


def shape_label(shape: Shape) -> str:
    """
    >>> shape_label((1536, 576))
    '1536x576'
    """
    return f"{shape[0]}x{shape[1]}"


def parse_shape(label: str) -> Shape:
    """The inverse of shape_label(); ValueError where the text is no shape.

    >>> parse_shape("1536x576")
    (1536, 576)
    """
    out_features, separator, in_features = label.partition("x")
    if not (separator and out_features.isdecimal() and in_features.isdecimal()):
        raise ValueError(f"shape {label!r} is not of the form 1536x576, outputs x inputs")
    shape = int(out_features), int(in_features)
    if min(shape) < 1:
        raise ValueError(f"shape {label!r} is empty")
    return shape


def write_decode_times(
    path: Path, times: Mapping[Shape, Mapping[str, float]], machine: Mapping[str, Any]
) -> None:
    """OutputError where the file cannot be written."""
    shapes = {shape_label(shape): dict(row) for shape, row in times.items()}
    write_json(path, KIND, VERSION, {"machine": dict(machine), "microseconds": shapes})


def read_decode_times(path: Path) -> DecodeTimes:
    """A table, perhaps edited by hand. PlanError names what is wrong in it."""
    body = read_json(path, KIND, VERSION)
    machine, shapes = body.get("machine"), body.get("microseconds")
    if not isinstance(machine, dict):
        raise PlanError(f"{path}: 'machine' is missing")
    if not isinstance(shapes, dict) or not shapes:
        raise PlanError(f"{path}: 'microseconds' is missing or empty")
    times = {}
    for label, row in shapes.items():
        try:
            shape = parse_shape(label)
            if not isinstance(row, dict):
                raise ValueError("is not an object of scheme labels")
            times[shape] = {QuantScheme.parse(name).label: _positive(row[name]) for name in row}
        except ValueError as error:
            raise PlanError(f"{path}: {label}: {error}") from error
    return DecodeTimes(str(path), machine, times)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number of microseconds")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} microseconds must be finite and above 0")
    return float(value)
