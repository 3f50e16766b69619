"""The frozen records that flow through the pipeline.

Orientation everywhere: weights are (out_features, in_features), activations (..., in_features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lwquant.groups import group_of_inputs
from lwquant.scheme import QuantScheme

# What a walk records of a linear besides its inputs: nothing; what the residual stream lacks after
# it, or else how its inputs differ from the float model's; or both.
Records = Literal["inputs", "owed", "all"]


@dataclass(frozen=True)
class LinearSpec:
    """One quantizable projection: where it is and how large."""

    name: str  # module path in the transformers model, e.g. "model.layers.3.mlp.up_proj"
    block: int
    out_features: int
    in_features: int
    input_group: int  # linears of a block with the same number read the same input tensor

    @property
    def role(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def n_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Outliers:
    """What is added to single weights, row by row: those of row r start at rows[r]."""

    values: Tensor  # (n,) float16
    columns: Tensor  # (n,) int32, in [0, in_features)
    rows: Tensor  # (out_features + 1,) int32: 0, never falling, n

    @classmethod
    def largest(cls, dense: Tensor, n: int) -> Outliers:
        """The `n` largest entries by magnitude of dense (out_features, in_features)."""
        chosen = torch.zeros(dense.numel(), dtype=torch.bool, device=dense.device)
        chosen[dense.abs().flatten().topk(n).indices] = True
        chosen = chosen.view(dense.shape)
        rows = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0)).int()
        return cls(dense[chosen].half(), chosen.nonzero()[:, 1].int(), rows)

    def added_to(self, weight: Tensor) -> Tensor:
        """A new weight (out_features, in_features), float32 like the given one."""
        out_features = len(self.rows) - 1
        numbers = torch.arange(out_features, device=weight.device)
        row = numbers.repeat_interleave(self.rows.diff().long())
        places = (row, self.columns.long())
        return weight.index_put(places, self.values.float(), accumulate=True)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and their grid, device- and kernel-agnostic: w ≈ (codes − zero_points) · scales.

    With a codebook w ≈ value of the code · scales; every zero is then 8, and says nothing.
    Outliers, where there are some, are added to that.
    """

    scheme: QuantScheme
    codes: Tensor  # (out_features, in_features) uint8
    scales: Tensor  # (out_features, n_groups) float16, values that scheme.scale_bits can hold
    zeros: Tensor  # (out_features, n_groups) uint8 as stored, in steps of scheme.zero_step
    notes: tuple[str, ...] = ()  # what the quantizer had to do out of the ordinary
    outliers: Outliers | None = None  # None where the scheme has none
    activation_bits: int = 16  # that kernels hold its inputs in; see activation_choice.py
    int8_weights: bool = False  # whether they may round the weight to int8 for many tokens

    @property
    def zero_points(self) -> Tensor:
        """What is taken off the codes, (out_features, n_groups) float32."""
        return self.zeros.float() * self.scheme.zero_step

    def dequantize(self) -> Tensor:
        """The weight the kernels compute with, (out_features, in_features) float32."""
        return self.plus_outliers(self.steps() * self.scales.float()[:, self.group_of_inputs()])

    def plus_outliers(self, weight: Tensor) -> Tensor:
        """The weight (out_features, in_features) float32 with the outliers, if any, added."""
        return weight if self.outliers is None else self.outliers.added_to(weight)

    def steps(self) -> Tensor:
        """What codes stand for in units of their groups' scales, (out_features, in_features)."""
        return self.scheme.steps_of(self.codes, self.zero_points[:, self.group_of_inputs()])

    def group_of_inputs(self) -> Tensor:
        """The number of each input's group, (in_features,)."""
        return group_of_inputs(self.codes.shape[1], self.scheme.group_size, self.codes.device)


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of the rows of all parts, which have one scheme; each note is kept once.

    Not for schemes with outliers: shares of parts do not add up to that of the whole.
    """
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
    )
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return QuantizedWeight(parts[0].scheme, codes, scales, zeros, tuple(notes))


@dataclass(frozen=True)
class CalibrationSet:
    """Fixed windows of tokens and how to make them again."""

    tokens: Tensor  # (n_samples, seq_len) int64
    source: str
    sha256: str
    seed: int
    copies: int = 1  # of each window, shifted around; see capture/tokens.py


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What the data says about one linear's input; sums over tokens, never divided."""

    hessian: Tensor  # (in_features, in_features) float32: Σ x̂ x̂ᵀ on the quantized stream
    drift: Tensor | None  # (in_features, in_features) float32: Σ (x − x̂) x̂ᵀ, None if not asked for
    n_tokens: int
    # (out_features, in_features) float32: Σ (y − ŷ) x̂ᵀ, where y is the residual stream once the
    # linear's output was added to it, and ŷ the same with the linear still in float. None where
    # model/residual.py does not list the linear, or it was not asked for.
    owed: Tensor | None = None
    half: LayerStats | None = None  # the same sums over half of the tokens, for cross-validation

    def rest(self) -> LayerStats:
        """The same sums over the tokens that are not in `half`."""
        assert self.half is not None
        pairs = ((self.drift, self.half.drift), (self.owed, self.half.owed))
        drift, owed = (None if a is None or b is None else a - b for a, b in pairs)
        hessian = self.hessian - self.half.hessian
        return LayerStats(hessian, drift, self.n_tokens - self.half.n_tokens, owed)


@dataclass(frozen=True)
class SensitivityReport:
    """Cost of storing each linear in each scheme; additive estimates of the model's loss."""

    linears: tuple[LinearSpec, ...]
    schemes: tuple[QuantScheme, ...]
    costs: Tensor  # (n_linears, n_schemes) float64, lower is better
    metric: Mapping[str, object]  # {"name": ..., settings}
    model: str = ""
    calibration: Mapping[str, object] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None  # per block, larger is more important (ranked metrics)
    transform: Mapping[str, object] | None = None  # that the measured model went through


@dataclass(frozen=True)
class BitPlan:
    """The scheme chosen for every linear."""

    schemes: Mapping[str, QuantScheme]
    bpw: float  # true stored bits per weight of the linears
    costs: Mapping[str, float] = field(default_factory=dict)  # predicted cost of each choice
    allocator: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    decode_bytes: int = 0  # of the linears, that a decoded token reads
    decode_us: float | None = None  # predicted for the linears, where their times are known


def plan_bpw(schemes: Mapping[str, QuantScheme], linears: tuple[LinearSpec, ...]) -> float:
    """Stored bits of all linears under `schemes`, per weight."""
    return 8 * plan_bytes(schemes, linears) / sum(s.n_weights for s in linears)


def plan_bytes(schemes: Mapping[str, QuantScheme], linears: tuple[LinearSpec, ...]) -> int:
    """Stored bytes of all linears under `schemes`."""
    bits = sum(schemes[s.name].stored_bits(s.out_features, s.in_features) for s in linears)
    return bits // 8  # codes and zeros fill words, scales bytes
