"""What a rotation at run time before every down projection would gain: is it worth its time?

    python benchmarks/online_hadamard.py                        # both models
    python benchmarks/online_hadamard.py --model stories260k    # seconds a row

QuaRot (arXiv:2404.00456) and RSQ (arXiv:2503.01820) multiply the inputs of down_proj by a Hadamard
matrix at run time, as nothing can be folded around the activation function. Here the model does
so in place of a plain MLP, its down projections hold W Q, and the default preset quantizes that,
by itself and on top of the folded rotations. Where no Hadamard matrix of the size is known, Q is a
random orthogonal one. Nothing is added to bpw. Rows go into results/online_hadamard.csv.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace

from ablation import BUDGETS, SETTINGS, WINDOWS, costs_of, quantize_and_compare, texts_of
from rows import HERE, commit, machine, measure_missing, stored

CSV = HERE / "results" / "online_hadamard.csv"
SEEDS = {"stories260k": (0, 1, 2), "smollm2": (0,)}
TRANSFORMS = {"none": "none", "folded": "rotate", "online": "none", "both": "rotate"}
TOLERANCE = 1e-4  # of the logits, relative


@dataclass(frozen=True)
class Row:
    """One quantized model on one text."""

    model: str
    rotations: str
    seed: int
    text: str
    bpw: float
    kl_divergence: float
    commit: str
    machine: str


def run(model: str, rotations: str, seed: int) -> list[Row]:
    """All budgets and texts, in this process: its MLPs may be changed for good."""
    from lwquant.evaluation.windows import windows_of
    from lwquant.matmul import fast_float32
    from lwquant.prepare import open_model, prepare_tokens
    from lwquant.recipe import load_recipe, transform_of
    from lwquant.stages import plan_report

    folder, sources, tests = texts_of(model)
    recipe = load_recipe("default").changed(
        **SETTINGS[model], sources=sources, seed=seed, transform=TRANSFORMS[rotations]
    )
    rows = []
    with fast_float32():
        opened = open_model(folder, transform=transform_of(recipe.transform))
        if rotations in ("online", "both"):
            opened = with_online_rotation(opened)
        calibration = prepare_tokens(opened, recipe).calibration
        windows = {
            name: windows_of(text, opened.tokenizer, recipe.seq_len, WINDOWS[model])
            for name, text in tests.items()
        }
        report, _ = costs_of(opened, calibration, recipe)
        for budget in BUDGETS[model]:
            plan = plan_report(report, budget, recipe=recipe)
            found = quantize_and_compare(opened, calibration, plan, recipe.rounding(), windows)
            for text, quality in found.items():
                kl = quality.kl_divergence
                rows.append(Row(model, rotations, seed, text, plan.bpw, kl, commit(), machine()))
    return rows


def with_online_rotation(opened):
    """The same model with rotated inputs of every down projection; its logits are checked."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP

    from lwquant.model.decoder import Decoder
    from lwquant.model.rewritten import Edit, Rewrite, RewrittenSource
    from lwquant.transforms.apply import relative_change
    from lwquant.transforms.hadamard import random_rotation

    decoder = opened.decoder
    tokens = torch.randint(decoder.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = decoder.head(decoder.last_hidden(tokens))
    names = [spec.name for spec in decoder.linears if spec.name.endswith("mlp.down_proj")]
    (size,) = {spec.in_features for spec in decoder.linears if spec.name in names}
    rotation = random_rotation(size, seed=1)
    edits = {decoder.key_of(f"{n}.weight"): Edit().then(columns=[rotation.apply]) for n in names}
    factors = [factor.float() for factor in rotation.factors]

    def turn(values):
        result, after = values * rotation.signs.float(), size
        for factor in factors:
            after //= len(factor)
            result = factor.T @ result.reshape(-1, len(factor), after)
        return result.reshape(values.shape)

    def forward(self, x):
        return self.down_proj(turn(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    LlamaMLP.forward = forward
    source = RewrittenSource(decoder.source, Rewrite("online down_proj", edits, {}, {}, ()))
    rotated = Decoder.open(source, decoder.device)
    with torch.no_grad():
        change = relative_change(before, rotated.head(rotated.last_hidden(tokens)))
    if not change <= TOLERANCE:
        raise SystemExit(f"the rotation changes the logits by {change:.2g}")
    transform = {**(opened.transform or {}), "online": "down_proj"}  # costs are of this model
    return replace(opened, decoder=rotated, source=source, transform=transform)


def print_table(rows: list[Row]) -> None:
    """Markdown: KL, and its ratio to the model as it is, mean over seeds."""
    kl = {(r.model, r.seed, r.text, round(r.bpw, 1), r.rotations): r.kl_divergence for r in rows}
    print("| model | text | bpw | rotations | KL, by seed | / none |")
    print("|---|---|---|---|---|---|")
    for model, text, bpw, rotations in sorted({(m, t, b, r) for m, _, t, b, r in kl}):
        seeds = [s for s in SEEDS[model] if (model, s, text, bpw, rotations) in kl]
        values = [kl[model, s, text, bpw, rotations] for s in seeds]
        ratios = [v / kl[model, s, text, bpw, "none"] for s, v in zip(seeds, values, strict=True)]
        shown = ", ".join(f"{value:.4f}" for value in values)
        mean = sum(ratios) / len(ratios)
        print(f"| {model} | {text} | {bpw} | {rotations} | {shown} | {mean:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="", choices=["", *SEEDS])
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        model, rotations, seed = arguments.row
        print(json.dumps([asdict(row) for row in run(model, rotations, int(seed))]))
        return
    wanted = [
        (model, rotations, seed)
        for model, seeds in SEEDS.items()
        for rotations in TRANSFORMS
        for seed in seeds
        if arguments.model in ("", model)
    ]
    if not arguments.table:
        measure_missing(
            Row, CSV, __file__, wanted, lambda row: (row.model, row.rotations, row.seed)
        )
    print_table(stored(Row, CSV))


if __name__ == "__main__":
    main()
