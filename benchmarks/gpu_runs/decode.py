"""Decoding of a whole random Llama of 7B, one token after another, as one CUDA graph each.

The static cache has a fixed length, all of which attention reads for every token, with both models.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gpu_runs.products import GROUP, activation_bits
from gpu_runs.report import Report
from gpu_runs.timing import event_time, side_stream
from lwquant.nn.linear import QuantizedLinear
from lwquant.nn.replace import replace_linears
from lwquant.scheme import QuantScheme

BITS = 4
SHAPE_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
CACHE_TOKENS = 256  # a token beyond would be written outside of it
PROMPT_TOKENS, EAGER_TOKENS, WARM_TOKENS, TIMED_TOKENS = 16, 3, 32, 64
DEVIATION = 0.02  # of weights
# Of uniform codes and zeros the difference has this many steps for a deviation.
STEPS = ((2 ** (2 * BITS) - 1) / 6) ** 0.5


@dataclass(frozen=True)
class DecodeRow:
    model: str
    in_a_graph: bool
    tokens_per_second: float
    milliseconds: float  # a token
    weights_gb: float
    peak_gb: float  # with cache, graph and workspaces


def measure_decode(report: Report, quantized: bool) -> None:
    """The model in bf16 and, if that is asked for, in 4 bits."""
    schemes = [None, QuantScheme(BITS, GROUP)] if quantized else [None]
    for scheme in schemes:
        name = "bf16" if scheme is None else f"{scheme.label}, a{activation_bits(BITS)}"
        with report.attempt(f"decode, {name}"):
            config = LlamaConfig(**SHAPE_7B)
            row = _measured(report, name, random_llama(config, scheme, torch.device("cuda")))
            report.add("decode", row, _text(row))
        gc.collect()
        torch.cuda.empty_cache()


def random_llama(
    config: LlamaConfig, scheme: QuantScheme | None, device: torch.device
) -> LlamaForCausalLM:
    """Made on the device itself: no file, no float weights beside the quantized ones."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.bfloat16().eval()
    if scheme is not None:
        names = [
            name
            for name, module in model.model.named_modules(prefix="model")
            if isinstance(module, nn.Linear)
        ]
        narrow = names if activation_bits(scheme.bits) == 8 else ()
        replace_linears(model, dict.fromkeys(names, scheme), narrow)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # of a norm
            parameter.fill_(1)
        else:
            parameter.normal_(0, DEVIATION, generator=generator)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config).to(device)  # computed, not learned
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            _fill(module, generator)
    return model


def _fill(layer: QuantizedLinear, generator: torch.Generator) -> None:
    """Any bits are codes and zeros; laid out for the kernels layer by layer, to hold one twice."""
    assert layer.zeros is not None
    for words in (layer.qweight, layer.zeros):
        words.view(torch.uint8).random_(0, 256, generator=generator)
    layer.scales.uniform_(0.9, 1.1, generator=generator).mul_(DEVIATION / STEPS)
    if layer.prepare() is None:
        raise RuntimeError(f"no kernel takes {layer}")


class Decoder:
    """A greedy step over and over, all of it on the GPU: the next one's token is where it was."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        # transformers calls it `cache` from 5.24 on, and `past_key_values` before.
        known = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in known else "past_key_values"
        cache = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
        self._model, self._given = model, {name: cache, "use_cache": True}
        prompt = torch.arange(1, PROMPT_TOKENS + 1, device=model.device)[None]
        self.token = self._next(prompt)

    def step(self) -> None:
        self.token.copy_(self._next(self.token))

    def _next(self, tokens: Tensor) -> Tensor:
        self.logits = self._model(input_ids=tokens, **self._given).logits[:, -1]
        return self.logits.argmax(-1, keepdim=True)


def _measured(report: Report, name: str, model: LlamaForCausalLM) -> DecodeRow:
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model)
    run: Callable[[], object] = decoder.step
    graph = None
    with report.attempt(f"decode, {name}, in a CUDA graph; without one instead"):
        graph = _captured(decoder)
        run = graph.replay
    for _ in range(WARM_TOKENS):
        run()
    seconds = event_time(run, TIMED_TOKENS)
    if not bool(decoder.logits.isfinite().all()):
        raise RuntimeError("logits are not finite")
    return DecodeRow(
        model=name,
        in_a_graph=graph is not None,
        tokens_per_second=1 / seconds,
        milliseconds=1e3 * seconds,
        weights_gb=weights / 1e9,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
    )


def _captured(decoder: Decoder) -> torch.cuda.CUDAGraph:
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(EAGER_TOKENS):
            decoder.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        decoder.step()
    return graph


def _text(row: DecodeRow) -> str:
    how = "in a CUDA graph" if row.in_a_graph else "without a CUDA graph"
    return (
        f"7B Llama, {row.model}, {how}: {row.tokens_per_second:.1f} tokens/s,"
        f" {row.milliseconds:.2f} ms a token, weights {row.weights_gb:.2f} GB,"
        f" peak {row.peak_gb:.2f} GB"
    )
