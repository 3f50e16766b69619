"""Trains the tiny Llama that the tests judge by its perplexity, and writes tests/data/tiny/.

    python tests/make_tiny_model.py [FOLDER]     # about 3 minutes on one core

The text is the interpreter's own English (`pydoc_data.topics`, PSF licence). The first 90 % of it
trains a byte-level BPE tokenizer and the model; the start of the last 10 % is shipped as
heldout.txt. The topics differ between Python versions, so the shipped files are what the tests
use; running this again gives a model as good, not the same bytes.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
VOCAB = 512
SEQ_LEN = 256
BATCH = 24
STEPS = 300  # 9 passes over the text; more only learn it by heart
WARMUP = 50
PEAK_RATE = 4e-3
HELDOUT_SHARE = 0.10
HELDOUT_CHARS = 32_000  # what is shipped of it

README = """\
# A tiny trained Llama for the tests

Made by `tests/make_tiny_model.py` (Python {python}, torch {torch}): 4 blocks, hidden 96, 4 heads
on 2 key/value heads, tied embeddings, byte-level BPE of {vocab} tokens, float32, {params:,}
parameters.

`heldout.txt` is English the model has not seen: perplexity {perplexity:.2f} per token in windows of
{seq_len} (unigram counts of the training text: {unigram:.2f}; no knowledge at all: {vocab}).

The text, of training and of `heldout.txt`, is the Python language reference as shipped in
`pydoc_data.topics`, (c) Python Software Foundation, under the PSF licence version 2.
"""


def split_text() -> tuple[str, str]:
    """(training text, held-out text): the cut lies at the end of a line."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = text.index("\n", int(len(text) * (1 - HELDOUT_SHARE))) + 1
    return text[:cut], text[cut : cut + HELDOUT_CHARS]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=SEQ_LEN
    )


def untrained_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).float()


def rate_at(step: int) -> float:
    """Learning rate: a short ramp, then a cosine to zero."""
    ramp = min(1.0, (step + 1) / WARMUP)
    return PEAK_RATE * ramp * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def train(model: LlamaForCausalLM, tokens: Tensor, heldout: Tensor) -> None:
    """`STEPS` steps of AdamW on windows cut at random from `tokens` (n,)."""
    generator = torch.Generator().manual_seed(SEED)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    model.train()
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH,), generator=generator)
        batch = torch.stack([tokens[s : s + SEQ_LEN] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            heldout_loss = math.log(perplexity(model, heldout))
            print(
                f"step {step:4} of {STEPS}  loss {loss.item():.3f}  held out {heldout_loss:.3f}",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """exp of the mean next-token loss over the whole windows of `tokens` (n,)."""
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(training: Tensor, heldout: Tensor) -> float:
    """Perplexity of `heldout` under the token counts of `training`, one added to each."""
    counts = Counter(training.tolist())
    total = len(training) + VOCAB
    loss = -sum(math.log((counts[t] + 1) / total) for t in heldout.tolist()) / len(heldout)
    return math.exp(loss)


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    training_text, heldout_text = split_text()
    tokenizer = train_tokenizer(training_text)
    training, heldout = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
        for text in (training_text, heldout_text)
    )
    model = untrained_model()
    print(f"{model.num_parameters():,} parameters, {len(training):,} tokens", flush=True)
    train(model, training, heldout)

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    heldout_perplexity, unigram = perplexity(model, heldout), unigram_perplexity(training, heldout)
    (folder / "README.md").write_text(
        README.format(
            python=".".join(map(str, sys.version_info[:2])),
            torch=torch.__version__,
            vocab=VOCAB,
            params=model.num_parameters(),
            seq_len=SEQ_LEN,
            perplexity=heldout_perplexity,
            unigram=unigram,
        ),
        encoding="utf-8",
    )
    print(f"held-out perplexity {heldout_perplexity:.2f}, unigram {unigram:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data" / "tiny")
