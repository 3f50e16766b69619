"""What integer activations and weights cost a model with many tokens at once, beside torch's.

    python benchmarks/int8_loss.py

SmolLM2-135M with all linears rounded to 4, 6 and 8 bits in groups of 64, plainly, run by the
kernels on windows of 512 tokens: with activations of 16 bits, of 8, and in int8 throughout, as
lwquant.set_activation_bits() may be told, whatever quantizing would choose for each layer. Beside
them torch's dynamic int8 linears made from the original. KL to the original on the windows of
WikiText-2 and of code that quality.py and peers.py use. Only a processor with AMX runs int8
throughout.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from pypi_models import SMOLLM2
from quality import DATA, GROUP, SEQ_LEN, WINDOWS, WORK
from rows import commit, machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwquant
from lwquant import ops
from lwquant.evaluation.windows import windows_of
from lwquant.nn.linear import QuantizedLinear
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme

TEXTS = {"WikiText-2": DATA / "wikitext-2-raw-test.txt", "code": DATA / "code.utf8"}
WIDTHS = (4, 6, 8)
WAYS = {"16 bits": (16, False), "8 bits": (8, False), "int8 throughout": (8, True)}


def in_blocks(model: nn.Module) -> list[str]:
    """The linears that are quantized: all but the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if ".layers." in name]


def quantized(model: nn.Module, bits: int) -> nn.Module:
    made = copy.deepcopy(model)
    for name in in_blocks(made):
        linear = made.get_submodule(name)
        layer = QuantizedLinear.from_weight(
            rtn(linear.weight.detach(), None, QuantScheme(bits, GROUP, scale_bits=8)), linear.bias
        )
        made.set_submodule(name, layer)
    return made


class TorchDynamicInt8(nn.Module):
    """torch's dynamic int8 linear at its most exact: a scale a row, all eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(1) / 127).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(codes, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed)
        return y


def of_torch(model: nn.Module) -> nn.Module:
    torch.backends.quantized.engine = "onednn"
    made = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that these tensors are deprecated
        for name in in_blocks(made):
            made.set_submodule(name, TorchDynamicInt8(made.get_submodule(name)))
    return made


def predictions(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    for window in windows:
        yield model(window[None]).logits[0, :-1].log_softmax(-1)


def divergence(model: nn.Module, original: nn.Module, windows: Tensor) -> float:
    """Nats a token."""
    total = 0.0
    pairs = zip(predictions(original, windows), predictions(model, windows), strict=True)
    for p, q in pairs:
        total += float((p.exp() * (p - q)).sum(-1).mean(dtype=torch.float64))
    return total / len(windows)


@torch.no_grad()
def main(folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = {
        name: windows_of(path.read_text(encoding="utf-8"), tokenizer, SEQ_LEN, WINDOWS)
        for name, path in TEXTS.items()
    }
    print(f"{machine()}, isa={ops.isa()}, {commit()}")
    print(f"| weights | activations | {' | '.join(f'KL, {name}' for name in TEXTS)} |")
    print("|---|---|" + "---|" * len(TEXTS), flush=True)

    def show(weights: str, activations: str, model: nn.Module) -> None:
        cells = [f"{divergence(model, original, w):.4f}" for w in windows.values()]
        print(f"| {weights} | {activations} |", " | ".join(cells), "|", flush=True)

    for bits in WIDTHS:
        model = quantized(original, bits)
        for way, (activation_bits, int8_weights) in WAYS.items():
            lwquant.set_activation_bits(model, activation_bits, int8_weights)
            show(f"{bits} bits", way, model)
    show("torch, 8 bits", "dynamic int8", of_torch(original))


if __name__ == "__main__":
    if ops.isa() != "amx":
        print(f"int8 throughout needs AMX; this machine runs {ops.isa()}", file=sys.stderr)
    main(SMOLLM2.as_folder(WORK))
