"""The records a result folder keeps of itself: `lwquant.json`, the run, and `evaluation.json`.

Field names are the JSON keys. A field with the default None may be absent from the file; a key
that is no field here is ignored, so that a later lwquant may add some.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lwquant.errors import OutputError
from lwquant.export.format import QUANT_METHOD
from lwquant.scheme import QuantScheme

RUN_FILE = "lwquant.json"
EVALUATION_FILE = "evaluation.json"

T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationRecord:
    """Where the calibration windows came from and what they were."""

    source: str
    n_samples: int
    seq_len: int
    sha256: str  # of the tokens


@dataclass(frozen=True)
class LinearRecord:
    """How one linear was stored, and the cost the metric predicted for that."""

    scheme: QuantScheme
    cost: float | None = None
    activation_bits: int | None = None  # None where the linear was left at 16 bits
    int8_weights: bool | None = None  # whether many tokens may run in int8 throughout


@dataclass(frozen=True)
class RunRecord:
    """What was done, with what, and what came out."""

    lwquant: str  # version
    base_model: str  # a Hub id "user/name", or the absolute path of a local folder or file
    command: str
    seed: int
    calibration: CalibrationRecord
    metric: Mapping[str, Any]
    allocator: Mapping[str, Any]
    quantizer: Mapping[str, Any]
    budget: Mapping[str, Any]
    bpw: float  # stored bits per weight of the linears
    size_bytes: int
    original_size_bytes: int
    linears: Mapping[str, LinearRecord]
    format: str = QUANT_METHOD  # or one of export/dialects
    correction: Mapping[str, Any] | None = None
    transform: Mapping[str, Any] | None = None  # None where the model was quantized as it is
    embedding_bits: int | None = None  # of embedding and head, None where they are as they were
    uniform_bpw: float | None = None
    original_bpw: float | None = None
    decode_bytes: int | None = None  # of the linears, that a decoded token reads
    decode_us: float | None = None  # predicted for the linears, None where no times were given
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The text of lwquant.json; OutputError where a number is NaN or infinite."""
        linears = {
            name: {
                **asdict(linear.scheme),
                "cost": linear.cost,
                "activation_bits": linear.activation_bits,
                "int8_weights": linear.int8_weights,
            }
            for name, linear in self.linears.items()
        }
        return _dump({**asdict(self), "linears": linears}, RUN_FILE)

    @classmethod
    def from_json(cls, text: str, where: str = RUN_FILE) -> RunRecord:
        """Read what `to_json` wrote; OutputError names `where` and the first bad key."""
        keys = _Keys(_load(text, where), where)
        linears = {
            name: LinearRecord(
                entry.read(QuantScheme.from_fields),
                entry.optional("cost", _number),
                entry.optional("activation_bits", _integer),
                entry.optional("int8_weights", _boolean),
            )
            for name, entry in keys.children("linears")
        }
        return cls(
            lwquant=keys.get("lwquant", _string),
            base_model=keys.get("base_model", _string),
            command=keys.get("command", _string),
            seed=keys.get("seed", _integer),
            calibration=_calibration(keys.child("calibration")),
            metric=keys.get("metric", _mapping),
            allocator=keys.get("allocator", _mapping),
            quantizer=keys.get("quantizer", _mapping),
            budget=keys.get("budget", _mapping),
            bpw=keys.get("bpw", _number),
            size_bytes=keys.get("size_bytes", _integer),
            original_size_bytes=keys.get("original_size_bytes", _integer),
            linears=linears,
            format=keys.optional("format", _string) or QUANT_METHOD,
            correction=keys.optional("correction", _mapping),
            transform=keys.optional("transform", _mapping),
            embedding_bits=keys.optional("embedding_bits", _integer),
            uniform_bpw=keys.optional("uniform_bpw", _number),
            original_bpw=keys.optional("original_bpw", _number),
            decode_bytes=keys.optional("decode_bytes", _integer),
            decode_us=keys.optional("decode_us", _number),
            notes=keys.optional("notes", _strings) or (),
        )


@dataclass(frozen=True)
class EvaluationRecord:
    """What an evaluation measured; the reference's numbers are None where it had no reference."""

    text: str
    perplexity: float
    tokens: int
    bpw: float
    size_bytes: int
    reference_perplexity: float | None = None
    kl_divergence: float | None = None  # nats per token
    top1_agreement: float | None = None  # share of tokens, 0 to 1
    seq_len: int | None = None
    windows: int | None = None

    def to_json(self) -> str:
        """The text of evaluation.json; OutputError where a number is NaN or infinite."""
        return _dump(asdict(self), EVALUATION_FILE)

    @classmethod
    def from_json(cls, text: str, where: str = EVALUATION_FILE) -> EvaluationRecord:
        """Read what `to_json` wrote; OutputError names `where` and the first bad key."""
        keys = _Keys(_load(text, where), where)
        return cls(
            text=keys.get("text", _string),
            perplexity=keys.get("perplexity", _number),
            tokens=keys.get("tokens", _integer),
            bpw=keys.get("bpw", _number),
            size_bytes=keys.get("size_bytes", _integer),
            reference_perplexity=keys.optional("reference_perplexity", _number),
            kl_divergence=keys.optional("kl_divergence", _number),
            top1_agreement=keys.optional("top1_agreement", _number),
            seq_len=keys.optional("seq_len", _integer),
            windows=keys.optional("windows", _integer),
        )


def read_run(folder: Path) -> RunRecord:
    """The run record of a result folder; OutputError where it is missing or malformed."""
    path = folder / RUN_FILE
    return RunRecord.from_json(_read(path), str(path))


def read_evaluation(folder: Path) -> EvaluationRecord | None:
    """The evaluation of a result folder, None where none was made; OutputError if malformed."""
    path = folder / EVALUATION_FILE
    return EvaluationRecord.from_json(_read(path), str(path)) if path.exists() else None


def _calibration(keys: _Keys) -> CalibrationRecord:
    return CalibrationRecord(
        source=keys.get("source", _string),
        n_samples=keys.get("n_samples", _integer),
        seq_len=keys.get("seq_len", _integer),
        sha256=keys.get("sha256", _string),
    )


class _Keys:
    """A JSON object whose values are taken out checked, with an error that says where."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise OutputError(f"{where}: is not a JSON object")
        self._values, self._where = values, where

    def get(self, key: str, kind: Callable[[Any], T]) -> T:
        if key not in self._values:
            raise OutputError(f"{self._where}: lacks {key!r}")
        try:
            return kind(self._values[key])
        except TypeError as error:
            value = repr(self._values[key])
            raise OutputError(f"{self._where}: {key!r} is {value:.60}, not {error}") from error

    def read(self, make: Callable[[Mapping[str, Any]], T]) -> T:
        """What `make` makes of the whole object, or its ValueError with where it is."""
        try:
            return make(self._values)
        except ValueError as error:
            raise OutputError(f"{self._where}: {error}") from error

    def optional(self, key: str, kind: Callable[[Any], T]) -> T | None:
        return None if self._values.get(key) is None else self.get(key, kind)

    def child(self, key: str) -> _Keys:
        return _Keys(self.get(key, _mapping), f"{self._where}: {key!r}")

    def children(self, key: str) -> list[tuple[str, _Keys]]:
        entries = self.get(key, _mapping)
        return [(name, _Keys(entries[name], f"{self._where}: {name!r}")) for name in entries]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a whole number")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("a list of strings")
    return tuple(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from error


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OutputError(f"{where}: is not JSON: {error}") from error


def _dump(record: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"{where}: holds NaN or infinity, which JSON has no word for") from error
