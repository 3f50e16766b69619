"""The model card: README.md of a published result, made from its run record.

A card is public. Every string of the record that could hold a path of this machine goes through
`public.mask` here, so a caller cannot forget it; of a local base model only the folder's name is
shown, and it is not claimed as a `base_model` in the metadata, where only a Hub id has meaning.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lwquant.errors import OutputError
from lwquant.export.loaders import Loader, loader_of
from lwquant.export.public import is_hub_id, mask, mask_path
from lwquant.export.record import EvaluationRecord, LinearRecord, RunRecord
from lwquant.scheme import FLOAT_BITS

CARD = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
MEGABYTE = 10**6
BAR_WIDTH = 40  # characters of the longest bar of the histogram


def model_card(
    record: RunRecord,
    evaluation: EvaluationRecord | None,
    files: Mapping[str, int],
    *,
    repo_id: str = "user/name",
    license: Mapping[str, Any] | None = None,
) -> str:
    """README.md of one result.

    Args:
        files: name and bytes of everything that is published beside the card.
        repo_id: where the card will lie, for the lines that load the model.
        license: what the base model's card states under LICENSE_KEYS, None where it states none.

    Raises OutputError for a record that names no linear, as there is nothing to tell, or a format
    that nothing is known of.
    """
    if not record.linears:
        raise OutputError("the run record names no linear, so there is nothing to put on a card")
    loader = loader_of(record.format)
    sections = [
        _front_matter(record, license or {}, loader),
        f"# {repo_id.rsplit('/', 1)[-1]}",
        _introduction(record),
        "## Original and quantized\n\n" + _comparison(record, evaluation),
        "## Where the bits are\n\n" + _roles(record.linears) + "\n\n" + _histogram(record.linears),
        "## Use\n\n" + _usage(repo_id, loader),
        "## How it was made\n\n" + _making(record),
        "## Files\n\n" + _table(("file", "bytes"), ((f"`{n}`", f"{files[n]:,}") for n in files)),
    ]
    if record.notes:
        sections.insert(-1, "## Notes\n\n" + "\n".join(f"- {_line(note)}" for note in record.notes))
    return "\n\n".join(sections) + "\n"


def license_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The license keys of a base model's card; empty where it states none.

    >>> license_of({"license": "mit", "tags": ["x"]}), license_of({"license_name": "x"})
    ({'license': 'mit'}, {})
    """
    metadata = metadata or {}
    if not metadata.get("license"):
        return {}
    return {key: metadata[key] for key in LICENSE_KEYS if metadata.get(key)}


def _front_matter(record: RunRecord, license: Mapping[str, Any], loader: Loader) -> str:
    entries: dict[str, Any] = {}
    if is_hub_id(record.base_model):
        entries["base_model"] = record.base_model
        entries["base_model_relation"] = "quantized"
    entries["library_name"] = loader.library
    entries["pipeline_tag"] = "text-generation"
    entries.update(license)
    tags = ["lwquant", "quantized", "mixed-precision", record.format]
    entries["tags"] = list(dict.fromkeys(tags))
    # JSON values are YAML values, and quoted ones need no further care.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(record: RunRecord) -> str:
    base = mask_path(record.base_model)
    name = (
        f"[{base}](https://huggingface.co/{base})" if is_hub_id(record.base_model) else f"`{base}`"
    )
    rounded = f"Embedding and head are rounded to {record.embedding_bits} bits"
    others = "Embeddings, norms and head are unchanged."
    if record.embedding_bits is not None:
        others = f"{rounded}, norms are unchanged."
    if record.transform:
        kept = "Embeddings and head are stored as wide as they were"
        others = (
            f"Before that all weights were transformed ({_settings(record.transform)}), which "
            "changes nothing in what the model computes. "
            f"{kept if record.embedding_bits is None else rounded}."
        )
    return (
        f"{name} with its linear layers quantized to {record.bpw:.3f} bits per weight on average "
        f"by lwquant {record.lwquant}, each layer with a width of its own. {others}"
    )


def _comparison(record: RunRecord, evaluation: EvaluationRecord | None) -> str:
    unknown, missing = "not recorded", "not evaluated"
    original = [
        unknown if record.original_bpw is None else f"{record.original_bpw:.3f}",
        f"{record.original_size_bytes / MEGABYTE:.1f}",
    ]
    quantized = [f"{record.bpw:.3f}", f"{record.size_bytes / MEGABYTE:.1f}"]
    if evaluation is None:
        original += [missing, "0", "100 %"]
        quantized += [missing] * 3
        note = "Quality: not evaluated."
    else:
        original += [_fixed(evaluation.reference_perplexity, ".3f", missing), "0", "100 %"]
        quantized += [
            f"{evaluation.perplexity:.3f}",
            _fixed(evaluation.kl_divergence, ".4f", missing),
            _fixed(evaluation.top1_agreement, ".2%", missing).replace("%", " %"),
        ]
        note = f"Measured on {evaluation.tokens:,} tokens of `{_line(mask_path(evaluation.text))}`"
        if evaluation.windows is not None and evaluation.seq_len is not None:
            note += f", {evaluation.windows} windows of {evaluation.seq_len}"
        note += "."
    measures = (
        "bits per weight of the linear layers",
        "size of all weights, MB (10⁶ bytes)",
        "perplexity",
        "mean KL to the original, nats per token",
        "top-1 agreement with the original",
    )
    rows = zip(measures, original, quantized, strict=True)
    return _table(("", "original", "quantized"), rows) + "\n\n" + note


def _roles(linears: Mapping[str, LinearRecord]) -> str:
    """One row per role: how many linears it has, their mean width, and how often each width."""
    widths: dict[str, list[int]] = {}
    for name, linear in linears.items():
        widths.setdefault(name.rsplit(".", 1)[-1], []).append(linear.scheme.bits)
    rows = (
        (
            f"`{role}`",
            str(len(bits)),
            f"{sum(bits) / len(bits):.2f}",
            ", ".join(f"{count} × {width}" for width, count in sorted(Counter(bits).items())),
        )
        for role, bits in widths.items()
    )
    return _table(("layer", "count", "mean width", "layers × code bits"), rows)


def _histogram(linears: Mapping[str, LinearRecord]) -> str:
    counts = Counter(linear.scheme.bits for linear in linears.values())
    longest = max(counts.values())
    lines = [
        f"{width:>2} bits{' (float)' if width == FLOAT_BITS else '        '} "
        f"{'█' * max(1, round(BAR_WIDTH * count / longest))} {count}"
        for width, count in sorted(counts.items())
    ]
    return _fenced("\n".join(lines))


def _usage(repo_id: str, loader: Loader) -> str:
    return "\n\n".join(
        [
            _fenced(f"pip install {loader.install}", "sh"),
            _fenced(loader.usage.format(name=repo_id), "python"),
        ]
    )


def _making(record: RunRecord) -> str:
    calibration = record.calibration
    rows = [
        ("calibration", f"`{_line(mask_path(calibration.source))}`"),
        ("windows", f"{calibration.n_samples} of {calibration.seq_len} tokens"),
        ("sha256 of the tokens", f"`{_line(calibration.sha256)}`"),
        ("seed", str(record.seed)),
        ("sensitivity metric", _settings(record.metric)),
        ("allocator", _settings(record.allocator)),
        ("transform", _settings(record.transform) if record.transform else "none"),
        ("quantizer", _settings(record.quantizer)),
        ("correction", _settings(record.correction) if record.correction else "none"),
        ("budget", _settings(record.budget)),
    ]
    if record.uniform_bpw is not None:
        rows.append(("uniform plan at this budget", f"{record.uniform_bpw:.3f} bits per weight"))
    return _fenced(mask(record.command), "sh") + "\n\n" + _table(("", ""), rows)


def _settings(values: Mapping[str, Any]) -> str:
    """
    >>> _settings({"name": "gptq", "damping": 0.01, "text": "/home/ann/a.txt"})
    '`gptq`, damping = 0.01, text = a.txt'
    """
    rest = [f"{key} = {value}" for key, value in values.items() if key != "name"]
    name = [f"`{values['name']}`"] if "name" in values else []
    return _line(", ".join(name + rest))


def _fixed(value: float | None, spec: str, missing: str) -> str:
    return missing if value is None else format(value, spec)


def _line(text: str) -> str:
    """One line of Markdown that neither a table nor a list is broken by."""
    return " ".join(mask(text).split())


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
