"""The Fisher information that a model's predictions hold on a change of one linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lwquant.capture.stats import StatsAccumulator
from lwquant.model.decoder import Decoder
from lwquant.sensitivity.backward import gradients_back
from lwquant.types import LinearSpec


class Information:
    """Of one linear, in two factors: by token, together with its inputs, and by output.

    E[g_to²] is taken as a_t · b_o. A token's factor stays with its input. Where a norm follows that
    divides by the size of the output (Gemma, OLMo 2), gradients are large just where inputs are
    small: the product of both means was four times the measured KL for Gemma 3 270M at 3 bits, and
    88% of it in the down projections.
    """

    def __init__(self) -> None:
        self._inputs = StatsAccumulator()
        self._outputs: Tensor | None = None

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Inputs (n_tokens, in_features), and gradients (n_tokens, out_features) of the outputs."""
        squares = gradients.square()
        self._inputs.add(inputs, weights=squares.sum(1))
        outputs = squares.sum(0)
        self._outputs = outputs if self._outputs is None else self._outputs + outputs

    def second_order(self, changes: Tensor) -> Tensor:
        """½ E[Σ_o g_o² (ΔW_o x)²] of each change (n, out_features, in_features), float64."""
        assert self._outputs is not None
        outputs = self._outputs.double()
        if not outputs.any():
            return torch.zeros(len(changes), dtype=torch.float64)
        stats = self._inputs.result()
        moved = ((changes @ stats.hessian) * changes).sum(2).double()
        return (moved.clamp(min=0) @ (outputs / outputs.sum()) / stats.n_tokens / 2).cpu()


def block_information(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    gradient: Tensor,
    *,
    seen: Callable[[LinearSpec, Tensor], None] | None = None,
) -> dict[LinearSpec, Information]:
    """Of every linear of a loaded block; arguments as for gradients_back()."""
    found = {spec: Information() for spec in decoder.block_linears(index)}

    def add(row: int, spec: LinearSpec, inputs: Tensor, gradients: Tensor) -> None:
        found[spec].add(inputs, gradients)

    gradients_back(decoder, index, block, hidden, gradient, add, seen=seen)
    return found
