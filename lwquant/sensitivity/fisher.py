"""KL of each linear under each scheme, from squared gradients of one backward pass.

To second order, the KL that a change ΔW of one linear causes is the Fisher information in the
direction of the change of its output (Martens, "New Insights and Perspectives on the Natural
Gradient Method", arXiv:1412.1193). Taking outputs and tokens as uncorrelated it is
½ Σ_o E[g_o² (ΔW_o x)²]; information.py says in which factors it is kept. Unlike in the
Kronecker-factored form of Martens and Grosse, arXiv:1503.05671, gradients and inputs need not be
independent of each other. ΔW is the change that the chosen quantizer really makes, so errors that
cancel in the output count little.

The exact square ⟨G, ΔW⟩² of whole-window gradients needs no independence but one window is one
sample of it; with the 32 windows that the time allows, its plans measured worse on both models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.backward import sampled_gradient
from lwquant.sensitivity.information import block_information
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.walk import InputSums, block_inputs, weight_changes


def fisher(
    decoder: Decoder,
    tokens: Tensor,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Costs (n_linears, n_schemes) in nats of KL per token, for tokens (n_samples, seq_len).

    Holds the inputs of all blocks for all tokens: n_blocks · n_samples · seq_len · hidden floats.
    """
    inputs, last = block_inputs(decoder, tokens)
    gradient = sampled_gradient(decoder, last, tokens, seed)
    final = decoder.n_blocks - 1
    costs: list[Tensor] = []
    for index in reversed(range(decoder.n_blocks)):
        progress("sensitivity", f"block {index}", final - index, decoder.n_blocks)
        with decoder.loaded(index) as block:
            sums = InputSums(decoder.block_linears(index))
            information = block_information(
                decoder, index, block, inputs[index], gradient, seen=sums.add
            )
            stats = sums.results()
            rows = []
            for spec in decoder.block_linears(index):
                module = block.get_submodule(decoder.local_name(spec))
                own = stats[spec.input_group]
                changes = weight_changes(module, own, schemes, quantizer)
                rows.append(information[spec].second_order(changes))
        costs.append(torch.stack(rows))
        inputs.pop()
    progress("sensitivity", "done", decoder.n_blocks, decoder.n_blocks)
    return Measurement(torch.cat(costs[::-1]))
