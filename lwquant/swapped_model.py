"""The model with weights swapped in that were quantized before, and its KL to the original.

Each linear is quantized once per width, by itself, on the original's inputs and without
propagation, as AMQ does for its search (arXiv:2509.12019). A change of one linear then costs a run
of the blocks from its own on, whose inputs are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lwquant.model.decoder import Decoder
from lwquant.model.structure import get_weight, set_weight
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress, silent
from lwquant.quantizers import Quantizer
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.measured_kl import mean_kl
from lwquant.sensitivity.walk import block_stats, walk_blocks
from lwquant.stages import few_windows
from lwquant.streams import advance
from lwquant.types import BitPlan, QuantizedWeight

SEARCH_WINDOWS = 16  # to measure on: the last calibration windows; the metric looks at the first

Weights = Mapping[str, Mapping[QuantScheme, QuantizedWeight]]


def quantize_apart(
    decoder: Decoder,
    tokens: Tensor,
    menus: Mapping[str, Collection[QuantScheme]],
    quantizer: Quantizer,
    *,
    progress: Progress = silent,
) -> Weights:
    """Every linear, by name, in each scheme of its menu but 16 bits, for tokens (n, seq_len)."""
    weights: dict[str, dict[QuantScheme, QuantizedWeight]] = {}
    for visit in walk_blocks(decoder, tokens):
        progress("pre-quantize", f"block {visit.index}", visit.index, decoder.n_blocks)
        stats = block_stats(decoder, visit.index, visit.block, visit.inputs)
        for spec in visit.linears:
            weight = get_weight(visit.block.get_submodule(decoder.local_name(spec)))
            weights[spec.name] = {
                scheme: quantizer(weight, stats[spec.input_group], scheme)
                for scheme in menus[spec.name]
                if not scheme.is_float
            }
    progress("pre-quantize", "done", decoder.n_blocks, decoder.n_blocks)
    return weights


class SwappedModel:
    """A plan and the KL of its model on some windows.

    Holds the codes of every linear in every scheme of `weights`, a byte a weight, and the inputs of
    all blocks for the windows, twice during a trial.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        tokens: Tensor,
        schemes: Mapping[str, QuantScheme],
    ) -> None:
        """
        Args:
            tokens: windows to measure on, (n_samples, seq_len).
            schemes: of every linear, 16 bits or one that `weights` has.
        """
        self._decoder = decoder
        self._weights = weights
        self._reference = decoder.last_hidden(tokens)
        self.schemes = dict(schemes)
        first = torch.cat([decoder.embed(row[None]) for row in tokens])
        self._inputs, last = self._run(0, first, self.schemes)
        self.kl = mean_kl(decoder, self._reference, last)

    @property
    def n_windows(self) -> int:
        """How many windows it is measured on."""
        return len(self._reference)

    def change(self, changes: Mapping[str, QuantScheme]) -> float:
        """Give the named linears other schemes where that lowers the KL; returns the KL it has or
        would have had then, in nats per token."""
        schemes = {**self.schemes, **changes}
        kl, start, inputs = self._try(schemes)
        if kl < self.kl:
            self.kl, self.schemes, self._inputs[start:] = kl, schemes, inputs
        return kl

    def measure(self, schemes: Mapping[str, QuantScheme]) -> float:
        """The KL of another plan, in nats per token; the model stays as it is."""
        return self._try(schemes)[0]

    def _try(self, schemes: Mapping[str, QuantScheme]) -> tuple[float, int, list[Tensor]]:
        """The KL of a plan, the first block that it changes, and the inputs from there on."""
        linears = self._decoder.linears
        changed = [s.block for s in linears if schemes[s.name] != self.schemes[s.name]]
        if not changed:
            return self.kl, self._decoder.n_blocks, []
        start = min(changed)
        inputs, last = self._run(start, self._inputs[start], schemes)
        return mean_kl(self._decoder, self._reference, last), start, inputs

    @torch.no_grad()
    def _run(
        self, start: int, hidden: Tensor, schemes: Mapping[str, QuantScheme]
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs of the blocks from `start` on, and the output of the last."""
        decoder, inputs = self._decoder, []
        for index in range(start, decoder.n_blocks):
            inputs.append(hidden)
            hidden = hidden.clone()
            with decoder.loaded(index) as block:
                for spec in decoder.block_linears(index):
                    scheme = schemes[spec.name]
                    if not scheme.is_float:
                        weight = self._weights[spec.name][scheme].dequantize()
                        set_weight(block.get_submodule(decoder.local_name(spec)), weight)
                advance(decoder, index, block, hidden)
        return inputs, hidden


def swapped_model(
    opened: OpenModel,
    menus: Mapping[str, Collection[QuantScheme]],
    start: BitPlan,
    recipe: Recipe,
    windows: Windows,
    progress: Progress,
) -> SwappedModel:
    """The model with plan `start`, every linear quantized in each scheme of its menu beforehand.

    It is measured on the last SEARCH_WINDOWS calibration windows.
    """
    calibration = few_windows(windows.calibration, recipe).tokens
    quantizer = recipe.cost_quantizer()
    weights = quantize_apart(opened.decoder, calibration, menus, quantizer, progress=progress)
    tokens = windows.calibration.tokens[-SEARCH_WINDOWS:]
    return SwappedModel(opened.decoder, weights, tokens, start.schemes)
