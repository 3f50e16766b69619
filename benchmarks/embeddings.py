"""What rounding embedding and head costs by itself: KL to the original, linears as they are.

    python benchmarks/embeddings.py            # SmolLM2-135M
    python benchmarks/embeddings.py --model gemma3 | stories260k

On windows of 512 tokens of the WikiText-2 raw test (stories260k: 256 of the second half of its
stories), beside the megabytes that everything but the linears takes in the output.
"""

from __future__ import annotations

import argparse

import torch
from peers import model_of
from rows import commit, machine

from lwquant.evaluation.windows import windows_of
from lwquant.held_out import compare_streams
from lwquant.prepare import open_model
from lwquant.recipe import EMBEDDING_BITS

WINDOWS = {"smollm2": (6, 512), "gemma3": (4, 512), "stories260k": (40, 256)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=WINDOWS, default="smollm2")
    name = parser.parse_args().model
    model = model_of(name)
    text = next(iter(model.tests.values())).read_text(encoding="utf-8")
    n_windows, seq_len = WINDOWS[name]
    print(f"{name}, {machine()}, {commit()}")
    print("| bits | KL | MB beside the linears |")
    print("|---|---|---|")
    for bits in reversed(EMBEDDING_BITS):
        opened = open_model(model.folder, embedding_bits=bits)
        windows = windows_of(text, opened.tokenizer, seq_len, n_windows)
        decoder = opened.decoder
        found = (decoder.last_hidden(windows, packed=packed) for packed in (True, False))
        quality = compare_streams(decoder, *found, windows)
        size = opened.other_bytes / 1e6
        print(f"| {bits} | {quality.kl_divergence:.4f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
