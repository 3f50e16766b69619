"""The `lwquant` command: parse, call one function, show its result on stdout."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import lwquant
from lwquant import tables
from lwquant.allocators.plan import write_plan
from lwquant.errors import LwquantError, OutputError
from lwquant.evaluation.evaluate import save_evaluation
from lwquant.evaluation.evaluate_tasks import LENGTHS
from lwquant.export.folder import verify
from lwquant.inspection import inspect_folder
from lwquant.progress import StderrProgress
from lwquant.sensitivity.report import write_report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mixed-precision, layer-wise quantization of language models.",
)

Model = Annotated[str, typer.Argument(help="Model folder, .gguf file or Hub id.")]
Output = Annotated[Path, typer.Option(help="What to make; must not exist yet.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Transform = Annotated[str | None, typer.Option(help="rotate or none.")]
Metric = Annotated[str | None, typer.Option(help="Sensitivity metric.")]
Allocator = Annotated[str | None, typer.Option(help="uniform, ranked, spikes or exact.")]
Quantizer = Annotated[str | None, typer.Option(help="rtn, hqq, gptq, quantease or bnb.")]
Correction = Annotated[str | None, typer.Option(help="qep, gptaq or none.")]
TokenImportance = Annotated[
    str | None, typer.Option(help="How calibration tokens count, e.g. attention_concentration.")
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="self (the default), builtin, a text file, or datasets:NAME[,CONFIG]; given again, "
        "they share the windows."
    ),
]
Effort = Annotated[str | None, typer.Option(help="fast, default or best; a recipe by its name.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Recipe name or .toml file.")]
Device = Annotated[str, typer.Option(help="Where to compute, e.g. cpu or cuda.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the calibration windows.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs that share a scale.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier result of lwquant.")]
DecodeTimes = Annotated[
    Path | None, typer.Option(help="Times of single linears, from the kernel benchmark's --write.")
]
MaxDecodeUs = Annotated[
    float | None, typer.Option(help="Microseconds per decoded token for all linears, at most.")
]
Bpw = Annotated[float | None, typer.Option(help="Bits per weight of the linears, all counted.")]


@app.command()
def quantize(
    model: Model,
    output: Output,
    bpw: Bpw = None,
    size: Annotated[str | None, typer.Option(help="Size of all weight files, e.g. 80MB.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest KL, in nats per token.")] = None,
    max_decode_us: MaxDecodeUs = None,
    decode_times: DecodeTimes = None,
    plan: Annotated[Path | None, typer.Option(help="Plan JSON; skips planning.")] = None,
    report: Annotated[Path | None, typer.Option(help="Sensitivity JSON; skips measuring.")] = None,
    transform: Transform = None,
    metric: Metric = None,
    allocator: Allocator = None,
    quantizer: Quantizer = None,
    correction: Correction = None,
    token_importance: TokenImportance = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    effort: Effort = None,
    group_size: GroupSize = None,
    tie_fused: Annotated[
        bool, typer.Option(help="Same width for q/k/v and for gate/up, as vLLM needs.")
    ] = False,
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            help="4 to 8, or 16, as they are: of embedding and head; default: 16 with --bpw, else "
            "what makes the best of the budget."
        ),
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(help="8 or 16: kernels hold inputs in so many; default: by the error."),
    ] = None,
    unclipped_qk: Annotated[
        float | None,
        typer.Option(help="Share of q and k rows whose range is not clipped, e.g. 0.02."),
    ] = None,
    polish: Annotated[
        int | None, typer.Option(help="Steps of learned rounding per block, e.g. 100.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(help="Further windows to tune all scales together on.")
    ] = None,
    remeasure: Annotated[
        int | None, typer.Option(help="Rounds of measuring costs again around the plan.")
    ] = None,
    pair_terms: Annotated[
        int | None, typer.Option(help="Measured plans to fit terms of pairs on, e.g. 100.")
    ] = None,
    local_search: Annotated[
        int | None, typer.Option(help="Measured moves to improve the plan by.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL to a budget and save a folder that transformers loads."""
    result = lwquant.quantize(
        model,
        bpw=bpw,
        size=size,
        max_kl=max_kl,
        output=output,
        plan=plan,
        report=report,
        recipe=recipe,
        sources=_sources(calibration),
        device=device,
        overwrite=overwrite,
        command=shlex.join(["lwquant", *sys.argv[1:]]),
        transform=transform,
        metric=metric,
        allocator=allocator,
        quantizer=quantizer,
        correction=correction,
        token_importance=token_importance,
        group_size=group_size,
        seed=seed,
        tie_fused=tie_fused or None,
        effort=effort,
        embedding_bits=embedding_bits,
        activation_bits=activation_bits,
        unclipped_qk=unclipped_qk,
        polish=polish,
        tune=tune,
        remeasure=remeasure,
        pair_terms=pair_terms,
        local_search=local_search,
        max_decode_us=max_decode_us,
        decode_times=decode_times,
    )
    if as_json:
        _print_json(
            {
                "output": str(result.folder),
                "bpw": result.bpw,
                "size_bytes": result.size_bytes,
                "held_out": asdict(result.held_out),
                "notes": list(result.notes),
            }
        )
    else:
        tables.print_result(result)


@app.command()
def sensitivity(
    model: Model,
    output: Output,
    transform: Transform = None,
    metric: Metric = None,
    quantizer: Quantizer = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    effort: Effort = None,
    group_size: GroupSize = None,
    device: Device = "cpu",
    seed: Seed = None,
) -> None:
    """Measure what each width costs in each linear, and write it as JSON."""
    _check_new_file(output)
    measured = lwquant.measure_model(
        model,
        recipe=recipe,
        sources=_sources(calibration),
        device=device,
        transform=transform,
        metric=metric,
        quantizer=quantizer,
        effort=effort,
        group_size=group_size,
        seed=seed,
    )
    write_report(measured, output)
    tables.print_report(measured)


@app.command()
def plan(
    report: Annotated[Path, typer.Argument(help="JSON of `lwquant sensitivity`.")],
    bpw: Annotated[float, typer.Option(help="Bits per weight of the linears, all counted.")],
    output: Output,
    max_decode_us: MaxDecodeUs = None,
    decode_times: DecodeTimes = None,
    allocator: Allocator = None,
    recipe: RecipeName = "default",
    tie_fused: Annotated[bool, typer.Option(help="Same width for q/k/v and for gate/up.")] = False,
) -> None:
    """Choose a width for every linear within a budget, and write it as JSON."""
    _check_new_file(output)
    made = lwquant.plan(
        report,
        bpw=bpw,
        recipe=recipe,
        allocator=allocator,
        tie_fused=tie_fused or None,
        max_decode_us=max_decode_us,
        decode_times=decode_times,
    )
    write_plan(made, output)
    tables.print_plan(made)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file to measure on.")],
    reference: Annotated[str | None, typer.Option(help="The original model.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(help="Evenly spread windows.")] = 16,
    stride: Annotated[
        int | None, typer.Option(help="Predict the whole text, by windows this far apart.")
    ] = None,
    device: Device = "cpu",
    save: Annotated[bool, typer.Option(help="Keep the numbers in MODEL, for its card.")] = False,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL, and its KL and top-1 agreement with the original."""
    if save:
        verify(Path(model))  # before the work: a changed folder must not be sealed anew
    measured = lwquant.evaluate(
        model,
        text=text,
        reference=reference,
        seq_len=seq_len,
        windows=windows,
        stride=stride,
        device=device,
        progress=StderrProgress(),
    )
    if save:
        save_evaluation(Path(model), measured)
    if as_json:
        print(measured.to_json())
    else:
        tables.print_evaluation(measured)


@app.command()
def tasks(
    model: Model,
    lambada: Annotated[
        Path | None, typer.Option(help="JSON lines with context and continuation.")
    ] = None,
    arc: Annotated[
        Path | None, typer.Option(help="JSON lines with query, choices and gold.")
    ] = None,
    passkey: Annotated[bool, typer.Option(help="Find digits hidden in filler text.")] = True,
    passkey_lengths: Annotated[str, typer.Option(help="Tokens of its texts.")] = ",".join(
        map(str, LENGTHS)
    ),
    limit: Annotated[int | None, typer.Option(help="Only the first examples of each file.")] = None,
    reference: Annotated[str | None, typer.Option(help="The original model.")] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the hidden digits.")] = 0,
    as_json: Json = False,
) -> None:
    """Accuracy of MODEL on tasks, beside the original's."""
    measured = lwquant.evaluate_tasks(
        model,
        lambada=lambada,
        arc=arc,
        passkey=passkey,
        limit=limit,
        passkey_lengths=_whole_numbers("--passkey-lengths", passkey_lengths),
        reference=reference,
        seed=seed,
        device=device,
        progress=StderrProgress(),
    )
    if as_json:
        print(measured.to_json())
    else:
        tables.print_tasks(measured)


@app.command()
def sweep(
    model: Model,
    bpw: Annotated[str, typer.Option(help="Budgets, e.g. 2.5,3,3.5,4.")],
    output: Output,
    text: Annotated[Path | None, typer.Option(help="Text file to measure on.")] = None,
    transform: Transform = None,
    metric: Metric = None,
    allocator: Allocator = None,
    quantizer: Quantizer = None,
    correction: Correction = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    effort: Effort = None,
    device: Device = "cpu",
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Perplexity and KL against bits: a table, sweep.csv and sweep.png."""
    rows = lwquant.sweep(
        model,
        bpw=_numbers("--bpw", bpw),
        output=output,
        text=text,
        recipe=recipe,
        sources=_sources(calibration),
        device=device,
        overwrite=overwrite,
        transform=transform,
        metric=metric,
        allocator=allocator,
        quantizer=quantizer,
        correction=correction,
        effort=effort,
        seed=seed,
    )
    if as_json:
        _print_json({"rows": [asdict(row) for row in rows]})
    else:
        tables.print_sweep(rows)


@app.command()
def ratio(
    model: Model,
    output: Output,
    low: Annotated[int, typer.Option(help="Bits of the lowered weights.")] = 2,
    high: Annotated[int, typer.Option(help="Bits of the others.")] = 4,
    shares: Annotated[str, typer.Option(help="Shares to lower.")] = "0,0.25,0.5,0.75,1",
    text: Annotated[Path | None, typer.Option(help="Text file to measure on.")] = None,
    transform: Transform = None,
    metric: Metric = None,
    quantizer: Quantizer = None,
    correction: Correction = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    effort: Effort = None,
    device: Device = "cpu",
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Loss against the share of weights at few bits: whole blocks lowered, or single linears."""
    rows = lwquant.ratio_curves(
        model,
        low=low,
        high=high,
        shares=_numbers("--shares", shares),
        output=output,
        text=text,
        recipe=recipe,
        sources=_sources(calibration),
        device=device,
        overwrite=overwrite,
        transform=transform,
        metric=metric,
        quantizer=quantizer,
        correction=correction,
        effort=effort,
        seed=seed,
    )
    if as_json:
        _print_json({"rows": [asdict(row) for row in rows]})
    else:
        tables.print_ratio(rows)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lwquant quantize`.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw bits per linear as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Which linear got how many bits, and what the metric said about it."""
    found = inspect_folder(folder)
    if plot is not None:
        from lwquant.evaluation.plot import plot_bits  # matplotlib takes a second to import

        plot_bits(found.record, plot)
    if as_json:
        _print_json(found.to_json())
    else:
        tables.print_inspection(found)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lwquant quantize`.")],
    output: Output,
    to: Annotated[str, typer.Option(help="mlx, gptq or compressed-tensors.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a result in the format of another engine."""
    done = lwquant.convert(folder, output, to=to, overwrite=overwrite, progress=StderrProgress())
    if as_json:
        _print_json({**asdict(done), "path": str(done.path)})
    else:
        tables.print_conversion(done)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lwquant quantize`.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    public: Annotated[bool, typer.Option(help="Make the repository public.")] = False,
) -> None:
    """Upload a complete result with a model card; private unless --public."""
    print(lwquant.push_to_hub(folder, repo_id, private=not public, progress=StderrProgress()))


def main() -> None:
    """Entry point: errors of the input are one line on stderr and exit status 1."""
    with _errors_in_words():
        app()


@contextmanager
def _errors_in_words() -> Iterator[None]:
    try:
        yield
    except LwquantError as error:
        print(f"lwquant: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # `lwquant inspect OUT | head`
        sys.stderr.close()
        raise SystemExit(1) from None


def _sources(named: list[str] | None) -> tuple[str, ...] | None:
    return tuple(named) if named else None


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise LwquantError(f"{option} {text!r} is not a list of numbers like 2.5,3,3.5") from error


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise LwquantError(f"{option} {text!r} is not a list of whole numbers like 2,3") from error


def _check_new_file(path: Path) -> None:
    """OutputError before the work for a file that could not be written after it."""
    if path.exists():
        raise OutputError(f"{path}: exists already")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))
