"""Token weights from the model's own gradients: how much an error of each output row would matter.

Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance",
arXiv:2505.07004. To second order the loss of an error in a linear's outputs is a sum over tokens
and rows o of (∂L/∂y_o)² times the squared error. So the Hessian of a row's inputs weighs each token
by that squared gradient; rows are cut into groups that share the mean of theirs, because a Hessian
for each would be too much to hold.

The paper takes the loss of the text; ours is that of tokens drawn from the float model, whose
squared gradients are the Fisher information.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lwquant.capture.row_groups import row_groups
from lwquant.errors import LwquantError
from lwquant.model.decoder import Decoder
from lwquant.progress import Progress, silent
from lwquant.sensitivity.backward import gradients_back, sampled_gradient
from lwquant.sensitivity.walk import block_inputs
from lwquant.types import LinearSpec


def guidance(
    decoder: Decoder, tokens: Tensor, n_groups: int, *, seed: int = 0, progress: Progress = silent
) -> Mapping[str, Tensor]:
    """Weights (n_samples, seq_len, n_groups) of the tokens for each linear by name.

    In each group of neighbouring rows they are the mean over its rows of (∂L/∂y)², scaled to mean
    one over all tokens; L is Σ log p of a token drawn at every position of a window.

    Holds the weights of all linears, n_linears · n_samples · seq_len · n_groups floats, and while
    it runs the inputs of all blocks, n_blocks · n_samples · seq_len · hidden floats. The walk that
    is given them then holds n_groups Hessians for each of the linears that share an input, or, for
    propagation, four times as many sums.

    Args:
        tokens: all calibration windows, (n_samples, seq_len).
        n_groups: of each linear's rows.
        seed: of the draws.

    Raises LwquantError as check_row_groups() does.
    """
    check_row_groups(decoder, n_groups)
    weights = {
        spec.name: torch.empty(*tokens.shape, n_groups, device=decoder.device)
        for spec in decoder.linears
    }

    def note(window: int, spec: LinearSpec, inputs: Tensor, gradients: Tensor) -> None:
        squares = gradients.square()
        for group, rows in enumerate(row_groups(spec.out_features, n_groups)):
            weights[spec.name][window, :, group] = squares[:, rows].mean(1)

    inputs, last = block_inputs(decoder, tokens)
    final = decoder.n_blocks - 1
    with torch.enable_grad():
        gradient = sampled_gradient(decoder, last, tokens, seed)
        for index in reversed(range(decoder.n_blocks)):
            progress("guidance", f"block {index}", final - index, decoder.n_blocks)
            with decoder.loaded(index) as block:
                gradients_back(decoder, index, block, inputs.pop(), gradient, note)
    progress("guidance", "done", decoder.n_blocks, decoder.n_blocks)
    return {name: normalized(own) for name, own in weights.items()}


def check_row_groups(decoder: Decoder, n_groups: int) -> None:
    """LwquantError for a linear of fewer rows than groups."""
    for spec in decoder.linears:
        if spec.out_features < n_groups:
            raise LwquantError(
                f"{spec.name}: guided={n_groups} is above its {spec.out_features} rows"
            )


def normalized(weights: Tensor) -> Tensor:
    """Scaled to mean one in each group; ones where all are zero."""
    mean = weights.mean((0, 1))
    return torch.where(mean > 0, weights / mean, 1.0)
