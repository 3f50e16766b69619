"""quantize(): a checkpoint goes in, a smaller model that transformers loads comes out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwquant import __version__
from lwquant.allocators.plan import read_plan, write_plan
from lwquant.embedding_choice import (
    check_embeddings,
    check_size,
    target_within,
    with_best_embeddings,
    with_embeddings,
)
from lwquant.errors import BudgetError, PlanError
from lwquant.export.folder import check_output, new_folder, write_manifest
from lwquant.export.hub import push_to_hub
from lwquant.export.record import (
    EVALUATION_FILE,
    RUN_FILE,
    CalibrationRecord,
    EvaluationRecord,
    LinearRecord,
    RunRecord,
)
from lwquant.export.save import ModelWriter
from lwquant.guidance import check_row_groups
from lwquant.held_out import Quality, measure_on
from lwquant.local_search import searched_plan
from lwquant.massive_channels import check_roles
from lwquant.matmul import fast_float32
from lwquant.methods import describe
from lwquant.pair_terms import paired_plan
from lwquant.prepare import OpenModel, Windows, open_model, prepare_tokens
from lwquant.progress import Progress, StderrProgress
from lwquant.recipe import (
    Recipe,
    allocator_of,
    metric_of,
    transform_of,
)
from lwquant.remeasure import remeasured_plan
from lwquant.rounding import Rounding, refuse_schemes
from lwquant.search import smallest_plan
from lwquant.sensitivity.report import read_report, write_report
from lwquant.sequential import QuantizedLinearResult
from lwquant.stages import (
    check_budget,
    check_report,
    check_times,
    measure,
    merged,
    plan_report,
)
from lwquant.types import BitPlan, QuantizedWeight, SensitivityReport, plan_bytes

SENSITIVITY_FILE, PLAN_FILE = "sensitivity.json", "plan.json"


@dataclass(frozen=True)
class Result:
    """What quantize() made."""

    folder: Path
    plan: BitPlan
    report: SensitivityReport | None
    held_out: Quality  # on further windows of the calibration texts, not on a benchmark
    size_bytes: int
    notes: tuple[str, ...] = ()  # of the transform and the plan

    @property
    def bpw(self) -> float:
        return self.plan.bpw

    def push_to_hub(self, repo_id: str, *, private: bool = True, **settings: Any) -> str:
        """Upload the folder with a model card; returns the URL."""
        return push_to_hub(self.folder, repo_id, private=private, **settings)


def quantize(
    model: str | Path,
    *,
    bpw: float | None = None,
    size: str | int | None = None,
    max_kl: float | None = None,
    output: str | Path,
    plan: str | Path | BitPlan | None = None,
    report: str | Path | SensitivityReport | None = None,
    recipe: str | Path | Recipe = "default",
    calibration: str | Sequence[str] | None = None,
    device: str = "cpu",
    revision: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Quantize a decoder-only causal LM to a budget and save it as a transformers folder.

    Args:
        model: folder with safetensors, a .gguf file, or a Hub id.
        bpw, size, max_kl: the budget, exactly one of them (none with `plan`): true stored bits per
            weight of the linears; size of all weight files ("80MB"); largest mean KL in nats to
            the original on held-out windows of the calibration texts. Within a size or a KL
            embedding and head get what bits serve it best, see embedding_choice.py.
        output: folder to make; it must not exist, or be empty.
        plan, report: a result of an earlier stage, perhaps edited, which is then not made again.
        recipe: name or .toml file of the remaining settings; see Recipe.
        calibration: a source ("self", the default: the model writes; "builtin", a text file,
            "datasets:NAME") or a list of texts.
        settings: single settings of the recipe, e.g. metric="measured_kl", group_size=128, or
            max_decode_us=900, decode_times="times.json" for a limit on decode time beside the
            budget.

    Raises LwquantError with what is wrong and which limit it broke; nothing is left in `output`.
    """
    progress = progress or StderrProgress()
    chosen, texts = merged(recipe, calibration, settings)
    rounding = chosen.rounding()
    transform = transform_of(chosen.transform)
    metric_of(chosen.metric), allocator_of(chosen.allocator)  # unknown names fail here, not later
    budget = _one_budget(bpw, size, max_kl, plan)
    if chosen.max_decode_us is not None:
        budget["max_decode_us"] = chosen.max_decode_us
    if plan is not None or max_kl is not None:
        chosen.refuse_replanning(
            "needs a budget in bpw or size, not a plan or max_kl", "max_decode_us"
        )
    check_output(output, overwrite)
    with fast_float32():
        opened = open_model(model, device, revision, transform)
        check_roles(opened.decoder.linears, rounding.unclipped_qk)
        check_embeddings(opened, chosen)
        given = _given_plan(plan, opened, chosen, rounding)
        known = read_report(Path(report)) if isinstance(report, str | Path) else report
        if given is None:
            check_times(opened, chosen)
            if known is not None:
                refuse_schemes(rounding.quantizer, rounding.polish, known.schemes)
        check_report(known, opened)
        check_row_groups(opened.decoder, rounding.guided)
        if bpw is not None:
            check_budget(opened, chosen, bpw)
        elif size is not None:
            check_size(opened, chosen, size)
        windows = prepare_tokens(opened, chosen, texts, progress)
        tokens = windows.calibration.tokens
        opened = with_embeddings(opened, chosen, tokens, progress)
        if given is None:
            if known is None:
                known = measure(opened, windows.calibration, chosen, progress)
            opened = with_best_embeddings(
                opened, known, chosen, tokens, progress, size=size, max_kl=max_kl
            )
            target = bpw if size is None else target_within(opened, known, chosen, size)
            plan_at = partial(plan_report, known, recipe=chosen)
            if target is not None and chosen.remeasure:
                known, given = remeasured_plan(opened, known, target, chosen, windows, progress)
            elif target is not None:
                given = plan_at(target)
            else:
                assert max_kl is not None
                given = smallest_plan(opened, known, plan_at, rounding, windows, max_kl, progress)
            if target is not None and chosen.pair_terms:
                given = paired_plan(opened, known, given, target, chosen, windows, progress)
            if target is not None and chosen.local_search:
                given = searched_plan(opened, known, given, target, chosen, windows, progress)
        return _quantize_and_save(
            opened,
            given,
            known,
            windows,
            rounding,
            chosen,
            budget,
            Path(output),
            overwrite,
            command or f"lwquant.quantize({str(model)!r}, {budget})",
            progress,
        )


def _quantize_and_save(
    opened: OpenModel,
    plan: BitPlan,
    report: SensitivityReport | None,
    windows: Windows,
    rounding: Rounding,
    recipe: Recipe,
    budget: Mapping[str, object],
    output: Path,
    overwrite: bool,
    command: str,
    progress: Progress,
) -> Result:
    decoder = opened.decoder
    notes = [*opened.notes, *plan.notes]
    if rounding.polish:
        notes.append(f"rounding learned block by block, {rounding.polish} steps each")
    if share := rounding.unclipped_qk:
        notes.append(f"{share:.1%} of the rows of queries and keys rounded without clipping")
    if len(windows.tuning):
        notes.append(f"scales tuned together on {len(windows.tuning)} further windows")
    if recipe.expand > 1:
        notes.append(f"each calibration window used {recipe.expand} times, shifted around")
    if rounding.weighting is not None:
        settings = {**describe(rounding.weighting.score), "floor": rounding.weighting.floor}
        score = settings.pop("name")
        listed = ", ".join(f"{key} {value}" for key, value in settings.items())
        notes.append(f"calibration tokens weighted by {score} ({listed})")
    if rounding.guided:
        notes.append(f"calibration tokens weighted by gradients, in {rounding.guided} row groups")
    calibration, held_out = windows.calibration, windows.held_out
    n_samples, seq_len = calibration.tokens.shape
    with new_folder(output, overwrite) as folder, extra_files(opened) as extras:
        writer = ModelWriter(
            folder,
            opened.source,
            decoder.linears,
            decoder.model,
            decoder.key_of,
            embeddings=opened.embeddings,
        )

        def keep(done: QuantizedLinearResult) -> None:
            if isinstance(done.weight, QuantizedWeight):
                notes.extend(f"{done.spec.name}: {note}" for note in done.weight.notes)
                writer.linear(done.spec, done.weight)
            else:
                writer.linear(done.spec, sixteen_bits(done.weight, opened, done.spec.name))

        quality = measure_on(opened, plan, rounding, windows, progress, keep)
        size_bytes = writer.finish(plan.schemes, plan.bpw, extras)
        write_plan(plan, folder / PLAN_FILE)
        if report is not None:
            write_report(report, folder / SENSITIVITY_FILE)
        record = RunRecord(
            lwquant=__version__,
            base_model=_public_name(opened),
            command=command,
            seed=recipe.seed,
            calibration=CalibrationRecord(
                calibration.source, n_samples, seq_len, calibration.sha256
            ),
            metric=report.metric if report is not None else {"name": "none"},
            allocator=plan.allocator,
            quantizer=describe(rounding.quantizer),
            correction=describe(rounding.correction),
            budget=budget,
            bpw=plan.bpw,
            original_bpw=opened.original_bpw,
            size_bytes=size_bytes,
            original_size_bytes=opened.source.size_bytes,
            linears={
                name: LinearRecord(
                    scheme,
                    plan.costs.get(name),
                    writer.activation_bits.get(name),
                    writer.int8_weights.get(name),
                )
                for name, scheme in plan.schemes.items()
            },
            transform=opened.transform,
            embedding_bits=opened.embedding_bits if opened.embeddings is not None else None,
            decode_bytes=plan_bytes(plan.schemes, decoder.linears),
            decode_us=plan.decode_us,
            notes=tuple(notes),
        )
        (folder / RUN_FILE).write_text(record.to_json(), encoding="utf-8")
        evaluation = EvaluationRecord(
            text=f"held-out windows of the calibration text ({calibration.source})",
            bpw=plan.bpw,
            size_bytes=size_bytes,
            seq_len=held_out.shape[1],
            windows=held_out.shape[0],
            **asdict(quality),
        )
        (folder / EVALUATION_FILE).write_text(evaluation.to_json(), encoding="utf-8")
        write_manifest(folder)
    return Result(output, plan, report, quality, size_bytes, (*opened.notes, *plan.notes))


def sixteen_bits(weight: Tensor, opened: OpenModel, name: str) -> Tensor:
    """bfloat16 where the checkpoint is, else float16 unless the weight overflows it."""
    key = opened.decoder.key_of(f"{name}.weight")
    stored = opened.source.dtype(key) if key else torch.float32
    overflows = weight.abs().max() > torch.finfo(torch.float16).max
    return weight.to(torch.bfloat16 if stored == torch.bfloat16 or overflows else torch.float16)


def _given_plan(
    plan: str | Path | BitPlan | None, opened: OpenModel, recipe: Recipe, rounding: Rounding
) -> BitPlan | None:
    """The plan, checked, with the decode time that the recipe's table predicts for it."""
    linears = opened.decoder.linears
    if isinstance(plan, str | Path):
        plan = read_plan(Path(plan), linears)
    if plan is None:
        return None
    if plan.schemes.keys() != {spec.name for spec in linears}:
        raise PlanError("the plan names other linears than the model has")
    refuse_schemes(rounding.quantizer, rounding.polish, plan.schemes.values())
    times = recipe.times()
    return plan if times is None else replace(plan, decode_us=times.of_plan(plan.schemes, linears))


def _one_budget(
    bpw: float | None, size: str | int | None, max_kl: float | None, plan: object
) -> dict[str, object]:
    given: dict[str, object] = {
        k: v for k, v in {"bpw": bpw, "size": size, "max_kl": max_kl}.items() if v is not None
    }
    if plan is not None and not given:
        return {"plan": str(plan) if isinstance(plan, str | Path) else "given"}
    if len(given) != 1 or plan is not None:
        raise BudgetError(f"give exactly one of bpw, size, max_kl and plan, not {sorted(given)}")
    if max_kl is not None and not max_kl > 0:
        raise BudgetError(f"max_kl={max_kl} must be above 0")
    if bpw is not None and not bpw > 0:
        raise BudgetError(f"bpw={bpw} must be above 0")
    return given


@contextmanager
def extra_files(opened: OpenModel) -> Iterator[Path]:
    """A folder with the tokenizer and generation files; GGUF files carry theirs inside."""
    if opened.path.is_dir():
        yield opened.path
        return
    with tempfile.TemporaryDirectory() as folder:
        opened.tokenizer.save_pretrained(folder)
        yield Path(folder)


def _public_name(opened: OpenModel) -> str:
    """A Hub id as given; anything local as an absolute path, which the model card masks."""
    local = Path(opened.name).exists()
    return str(Path(opened.name).resolve()) if local else opened.name
