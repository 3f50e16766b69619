"""Calibration windows sampled from the model itself, for when there is no text.

The idea is that of Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language
Models", arXiv:2305.17888. Unlike the other sources it needs the whole float model in memory.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lwquant.progress import Progress, silent

BATCH = 32


def sample_windows(
    path: Path,
    n_windows: int,
    seq_len: int,
    seed: int,
    before: Tensor,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Windows (n_windows, seq_len) of tokens that the model draws one after another.

    Args:
        before: (m,) what every text begins with; it is not part of the windows. Where it is empty,
            the first token of a window is drawn uniformly.
        device: where the model computes; what is drawn is drawn on the CPU.
    """
    folder, gguf = (path, None) if path.is_dir() else (path.parent, path.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    model.to(device)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    windows = []
    for start in range(0, n_windows, BATCH):
        rows = min(BATCH, n_windows - start)
        if len(before):
            tokens = before.expand(rows, -1)
        else:
            tokens = torch.randint(vocabulary, (rows, 1), generator=generator)
        length = seq_len + len(before)
        written = _continue(model, tokens, length, generator, progress, start, n_windows)
        windows.append(written[:, len(before) :])
    return torch.cat(windows)


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    tokens: Tensor,
    seq_len: int,
    generator: torch.Generator,
    progress: Progress,
    start: int,
    n_windows: int,
) -> Tensor:
    # transformers calls it `cache` from 5.24 on, and `past_key_values` before.
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    keeps, cache, last = True, None, tokens
    while tokens.shape[1] < seq_len:
        progress(
            "sample",
            f"windows from {start}",
            start * seq_len + tokens.shape[1],
            n_windows * seq_len,
        )
        given = {name: cache, "use_cache": True} if keeps else {"use_cache": False}
        read = last if keeps else tokens
        output = model(input_ids=read.to(model.device), **given)
        cache = output.get(name)
        keeps = cache is not None  # RecurrentGemma hands none on: it reads everything again
        likely = output.logits[:, -1].softmax(-1).cpu()
        last = torch.multinomial(likely, 1, generator=generator)
        tokens = torch.cat([tokens, last], dim=1)
    return tokens
