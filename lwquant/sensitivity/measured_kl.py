"""KL of the whole model when one linear alone is changed, measured one linear at a time.

With perturbation "noise" this is the linearity model of Malinovskii et al., "Pushing the Limits of
Large Language Model Quantization via the Linearity Theorem", arXiv:2411.17525: the loss rises in
proportion to the relative squared error of a weight, with a factor measured per linear. With
"rounding" every scheme's own change is put in, so nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import block_inputs, block_stats, weight_changes
from lwquant.streams import advance

HEAD_TOKENS = 256  # positions whose logits are held at once


def measured_kl(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    perturbation: Literal["rounding", "noise"] = "rounding",
    noise: float = 0.05,
    positions: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Costs (n_linears, n_schemes) in nats of KL per token, for tokens (n_samples, seq_len).

    The activations up to the changed block are computed once; from there on the changed hidden
    states run through the later blocks, which are loaded once per changed block.

    Args:
        noise: relative squared error ‖ΔW‖²/‖W‖² of the Gaussian noise put in by "noise"; each
            scheme's cost is then the measured KL times its own relative squared error over this.
        positions: the KL is taken at every `positions`-th token.
    """
    inputs, last = block_inputs(decoder, tokens)
    reference = last[:, ::positions].clone()
    del last
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for index in range(decoder.n_blocks):
        progress("sensitivity", f"block {index}", index, decoder.n_blocks)
        changed, scales = _changed_outputs(
            decoder, index, inputs[index], schemes, quantizer, perturbation, noise, generator
        )
        finals = _advance(decoder, range(index + 1, decoder.n_blocks), changed)
        kls = torch.tensor([mean_kl(decoder, reference, h[:, ::positions]) for h in finals])
        rows.append(_spread(kls.double(), scales, len(schemes)))
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    return Measurement(torch.cat(rows))


@torch.no_grad()
def _changed_outputs(
    decoder: Decoder,
    index: int,
    hidden: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    perturbation: str,
    noise: float,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[tuple[int, int, float]]]:
    """Block outputs with one linear changed, and for each entry of the cost table the output it
    comes from and the factor to multiply its KL with: (row, output, factor), schemes in order."""
    outputs: list[Tensor] = []
    entries: list[tuple[int, int, float]] = []
    with decoder.loaded(index) as block:
        stats = block_stats(decoder, index, block, hidden)
        for row, spec in enumerate(decoder.block_linears(index)):
            module = block.get_submodule(decoder.local_name(spec))
            weight = get_weight(module).clone()
            changes = weight_changes(module, stats[spec.input_group], schemes, quantizer)
            energy = weight.square().sum()
            if perturbation == "noise":
                draw = torch.randn(weight.shape, generator=generator).to(weight.device)
                draw *= (noise * energy / draw.square().sum()).sqrt()
                outputs.append(_output_with(decoder, index, block, module, weight + draw, hidden))
            for change in changes:
                if perturbation == "noise":
                    factor = (change.square().sum() / (noise * energy)).item() if energy else 0.0
                    entries.append((row, len(outputs) - 1, factor))
                elif not change.any():
                    entries.append((row, -1, 0.0))
                else:
                    changed = weight + change
                    outputs.append(_output_with(decoder, index, block, module, changed, hidden))
                    entries.append((row, len(outputs) - 1, 1.0))
            set_weight(module, weight)
    return outputs, entries


def _spread(kls: Tensor, entries: list[tuple[int, int, float]], n_schemes: int) -> Tensor:
    values = [kls[output].item() * factor if factor else 0.0 for _, output, factor in entries]
    return torch.tensor(values, dtype=torch.float64).view(-1, n_schemes)


def _output_with(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    module: nn.Module,
    weight: Tensor,
    hidden: Tensor,
) -> Tensor:
    set_weight(module, weight)
    output = hidden.clone()
    advance(decoder, index, block, output)
    return output


@torch.no_grad()
def _advance(decoder: Decoder, blocks: range, hidden: list[Tensor]) -> list[Tensor]:
    """Run several versions of the hidden states through the given blocks of the float model."""
    current = [h.clone() for h in hidden]
    for index in blocks:
        with decoder.loaded(index) as block:
            for version in current:
                advance(decoder, index, block, version)
    return current


@torch.no_grad()
def mean_kl(decoder: Decoder, reference: Tensor, changed: Tensor) -> float:
    """Mean KL(reference ‖ changed) over all positions of (n_samples, n_positions, hidden)."""
    size = reference.shape[-1]
    total = 0.0
    pairs = zip(
        reference.reshape(1, -1, size).split(HEAD_TOKENS, dim=1),
        changed.reshape(1, -1, size).split(HEAD_TOKENS, dim=1),
        strict=True,
    )
    for left, right in pairs:
        p = decoder.head(left).log_softmax(-1)
        q = decoder.head(right).log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / (reference.shape[0] * reference.shape[1]))
