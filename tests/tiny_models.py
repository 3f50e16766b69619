"""Tiny random-weight models of the supported architectures, saved as safetensors folders."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

TINY_FOLDER = Path(__file__).parent / "data" / "tiny"
VOCAB = 512  # of the tokenizer in TINY_FOLDER, which every folder gets a copy of
SLIDING_WINDOW = 8

_ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_ROTARY: dict[str, Any] = {
    **_ENDS,
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_ROTARY),
    "qwen2": Qwen2Config(**_ROTARY, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_ROTARY, head_dim=24, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **{**_ROTARY, "num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=16,
        final_logit_softcapping=4.0,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": OPTConfig(
        **_ENDS,
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "gpt2": GPT2Config(**_ENDS, vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": GPTNeoXConfig(
        **_ENDS,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "phi3": Phi3Config(**_ROTARY),
    "mistral": MistralConfig(**{**_ROTARY, "num_hidden_layers": 3}, sliding_window=SLIDING_WINDOW),
}
KINDS = tuple(CONFIGS)


def random_model(kind: str, folder: Path) -> Path:
    """Saves the tiny model of `kind` (one of KINDS) with the tiny tokenizer in `folder`.

    The weights depend on `kind` alone. Everything that usually starts as zero or one (biases,
    norms) is random too, so that code which forgets it gives other logits.
    """
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1:
                param.copy_(0.15 * noise)
            else:
                param.add_(0.1 * noise)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, Path(folder) / name)
    return Path(folder)


def adding_bos(tokenizer: Any) -> Any:
    """The tokenizer, putting its beginning-of-text token before every text, as Llama's does."""
    changed = copy.deepcopy(tokenizer)
    bos = changed.bos_token
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, changed.bos_token_id)]
    )
    return changed
