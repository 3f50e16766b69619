"""A folder of lwquant in the format of another engine, with the weights that it has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lwquant.errors import LwquantError
from lwquant.export.card import CARD
from lwquant.export.dialects import DIALECTS, Dialect
from lwquant.export.folder import new_folder, write_manifest
from lwquant.export.public import manifest
from lwquant.export.record import EVALUATION_FILE, RUN_FILE, read_evaluation, read_run
from lwquant.export.save import MAX_SHARD_BYTES, write_config
from lwquant.export.shards import ShardWriter
from lwquant.export.stored import StoredModel
from lwquant.model.model_folder import CONFIG, member
from lwquant.progress import Progress, silent
from lwquant.scheme import FLOAT_BITS, QuantScheme

STAGE = "convert"
MADE_ANEW = (CONFIG, RUN_FILE, EVALUATION_FILE, CARD)
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Conversion:
    """What was made, and what to know of it."""

    path: Path
    bpw: float  # stored bits per weight of the linears, as the format stores them
    size_bytes: int  # of all weight files
    notes: tuple[str, ...]


def convert(
    folder: str | Path,
    output: str | Path,
    *,
    to: str,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write what quantize() made at `folder` as a new folder in the format of another engine.

    Codes, scales and zeros are the same numbers; scales may be rounded to the model's 16-bit type.
    Embedding and head that were rounded stay so where the format can say it, and are otherwise
    stored as the numbers they stand for. A linear is in memory at a time.

    Args:
        to: "mlx", "gptq" or "compressed-tensors".
        overwrite: replace an earlier result of lwquant at `output`.

    Raises LwquantError for another format, for linears that the format does not have, naming the
    first, and where none is quantized; OutputError where `folder` is not a complete result in
    lwquant's own format, or `output` cannot be made. Nothing is written then.
    """
    if to not in DIALECTS:
        raise LwquantError(f"there is no format {to!r}: {', '.join(sorted(DIALECTS))}")
    dialect, model = DIALECTS[to], StoredModel(Path(folder))
    tables = _kept_tables(model, dialect)
    schemes = {**model.linears, **tables}
    packed = [name for name, scheme in schemes.items() if not scheme.is_float]
    if all(scheme.is_float for scheme in model.linears.values()):
        raise LwquantError(f"{folder}: every linear was left at 16 bits, so nothing is to convert")
    _refuse(model, dialect, packed, to)
    notes = [*dialect.notes(schemes)]
    if model.tables and not tables:
        notes.append("embedding and head take 16 bits again, rounded as they are")

    with new_folder(output, overwrite) as made:
        shards = ShardWriter(made, MAX_SHARD_BYTES)
        n_bits = 0  # of the linears
        for i, name in enumerate(packed):
            progress(STAGE, name, i, len(packed))
            for key, tensor in dialect.tensors(name, model.read(name), model.dtype):
                shards.add(key, tensor)
                n_bits += 8 * tensor.nbytes if name in model.linears else 0
        for key, tensor in model.others():
            shards.add(key, tensor)
        for name in model.tables.keys() - tables.keys():
            shards.add(f"{name}.weight", model.unpacked(name))
        size_bytes = shards.finish()
        floats = [name for name, scheme in model.linears.items() if scheme.is_float]
        n_bits += FLOAT_BITS * sum(map(model.n_weights, floats))
        bpw = n_bits / sum(map(model.n_weights, model.linears))
        added = dialect.config(model.config, schemes, model.head)
        write_config(made, {**model.config, **added})
        _copy_others(model.folder, made)
        _write_records(model.folder, made, to, bpw, size_bytes, notes, bool(tables))
        write_manifest(made)
    progress(STAGE, to, len(packed), len(packed))
    return Conversion(Path(output), bpw, size_bytes, tuple(notes))


def _kept_tables(model: StoredModel, dialect: Dialect) -> Mapping[str, QuantScheme]:
    """Embedding and head, where they were rounded and the dialect can say so."""
    said = dialect.rounded_embeddings and not any(
        dialect.why_not(scheme, *model.features(name)) for name, scheme in model.tables.items()
    )
    return model.tables if said else {}


def _refuse(model: StoredModel, dialect: Dialect, packed: list[str], to: str) -> None:
    """LwquantError where the dialect does not have all these linears."""
    refused = []
    for name in packed:
        why = dialect.why_not(model.scheme(name), *model.features(name))
        if model.is_transposed(name):
            why = "the weights of this architecture are stored transposed (Conv1D)"
        if why:
            refused.append(f"{name} as {model.scheme(name).label}: {why}")
    if refused:
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise LwquantError(
            f"{model.folder}: {to} cannot store {refused[0]}{more}; "
            f"`lwquant quantize --recipe {to}` takes only what it has"
        )


def _copy_others(source: Path, made: Path) -> None:
    """Tokenizer, plan and report."""
    for name in manifest(source):
        if name not in MADE_ANEW and not name.endswith(WEIGHT_SUFFIXES):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(member(source, name), made / name)


def _write_records(
    source: Path,
    made: Path,
    to: str,
    bpw: float,
    size_bytes: int,
    notes: list[str],
    rounded_tables: bool,
) -> None:
    record, evaluation = read_run(source), read_evaluation(source)
    record = replace(
        record,
        format=to,
        bpw=bpw,
        size_bytes=size_bytes,
        embedding_bits=record.embedding_bits if rounded_tables else None,
        notes=(*record.notes, f"converted to {to}; quality was measured before that", *notes),
    )
    (made / RUN_FILE).write_text(record.to_json(), encoding="utf-8")
    if evaluation is not None:
        evaluation = replace(evaluation, bpw=bpw, size_bytes=size_bytes)
        (made / EVALUATION_FILE).write_text(evaluation.to_json(), encoding="utf-8")
