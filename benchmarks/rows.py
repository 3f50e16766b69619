"""Rows of a result file: one dataclass, one CSV, appended to as they are measured."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lwquant.types import SensitivityReport

HERE = Path(__file__).parent
T = TypeVar("T")


def stored(kind: type[T], path: Path) -> list[T]:
    """The rows of a file, none where it does not exist; an empty cell is None."""
    if not path.exists():
        return []
    kinds = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{name: _value(kinds[name], text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def append(row: Any, path: Path) -> None:
    """Add one row, with six digits of every number."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        cells = asdict(row).items()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells})


def measure_missing(
    kind: type[T],
    path: Path,
    script: str,
    jobs: Iterable[tuple[Any, ...]],
    job_of: Callable[[T], tuple[Any, ...]],
) -> None:
    """Run `script --row JOB`, in a process of its own, for every job that no row in `path` is of.

    The last line of its output is a JSON list of rows, which have bpw, a KL, and perhaps a text.
    """
    done = {job_of(row) for row in stored(kind, path)}
    for job in jobs:
        if job in done:
            continue
        command = [sys.executable, script, "--row", *map(str, job)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for values in json.loads(output.splitlines()[-1]):
            append(kind(**values), path)
            what = f"{values.get('text', '')} {values['bpw']:.3f} bits"
            print(
                f"{' '.join(map(str, job))} {what}: KL {values['kl_divergence']:.4f}",
                file=sys.stderr,
            )


def commit() -> str:
    """The commit of the code; "-dirty" where the code, not only the results, differs from it."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    code = ["lwquant", "csrc", "calibration", "benchmarks/*.py", "benchmarks/peer_runs"]
    same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=HERE.parent)
    return name if same.returncode == 0 else f"{name}-dirty"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}, {platform.machine()}" if models else platform.machine()


def kept_report(
    path: Path, measure: Callable[[], SensitivityReport]
) -> tuple[SensitivityReport, float]:
    """The sensitivity report in `path`, and the seconds it took; measured where it is not there."""
    from lwquant.sensitivity.report import read_report, write_report

    took = path.with_suffix(".seconds")
    if not took.exists():
        start = time.monotonic()
        write_report(measure(), path)
        took.write_text(str(time.monotonic() - start), encoding="utf-8")
    return read_report(path), float(took.read_text(encoding="utf-8"))


def _value(kind: str, text: str) -> Any:
    if "None" in kind and not text:
        return None
    if kind == "bool":
        return text == "True"
    return {"float": float, "int": int, "str": str}[kind.split(" ")[0]](text)
