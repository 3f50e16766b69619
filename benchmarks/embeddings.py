"""What rounding embedding and head costs by itself: KL to the original, linears as they are.

    python benchmarks/embeddings.py            # SmolLM2-135M
    python benchmarks/embeddings.py --model gemma3 | stories260k

On windows of 512 tokens of the WikiText-2 raw test (stories260k: 256 of the second half of its
stories), by GPTQ on what the head reads in the calibration texts, and each weight to its nearest
step, beside the megabytes that everything but the linears takes in the output.
"""

from __future__ import annotations

import argparse

import torch
from peers import model_of
from rows import commit, machine

from lwquant.embedding_choice import NARROWER, STATISTICS
from lwquant.evaluation.windows import windows_of
from lwquant.held_out import compare_streams
from lwquant.prepare import open_model, prepare_tokens
from lwquant.recipe import load_recipe
from lwquant.rounded_embeddings import head_stats, round_embeddings
from lwquant.types import LayerStats

WINDOWS = {"smollm2": (6, 512), "gemma3": (4, 512), "stories260k": (40, 256)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=WINDOWS, default="smollm2")
    name = parser.parse_args().model
    model = model_of(name)
    n_windows, seq_len = WINDOWS[name]
    opened = open_model(model.folder)
    decoder = opened.decoder
    sources = tuple(map(str, model.calibration))
    recipe = load_recipe("default").changed(sources=sources, seq_len=seq_len)
    tokens = prepare_tokens(opened, recipe).calibration.tokens[:STATISTICS]
    read = head_stats(decoder, decoder.last_hidden(tokens))
    nothing = LayerStats(torch.eye(len(read.hessian)), None, 1)  # GPTQ then has nothing to weigh
    text = next(iter(model.tests.values())).read_text(encoding="utf-8")
    windows = windows_of(text, opened.tokenizer, seq_len, n_windows)
    floating = decoder.last_hidden(windows)
    print(f"{name}, {machine()}, {commit()}")
    print("| bits | KL | KL, nearest steps | MB beside the linears |")
    print("|---|---|---|---|")
    print(f"| as it is | 0 | 0 | {opened.other_bytes / 1e6:.3f} |")
    for bits in NARROWER:
        found = []
        for stats in (read, nothing):
            round_embeddings(decoder, bits, stats)
            quantized = decoder.last_hidden(windows, packed=True)
            found.append(compare_streams(decoder, quantized, floating, windows).kl_divergence)
        size = opened.other_bytes_with(bits) / 1e6
        print(f"| {bits} | {found[0]:.4f} | {found[1]:.4f} | {size:.3f} |", flush=True)


if __name__ == "__main__":
    main()
