"""The frozen records that flow through the pipeline.

Orientation everywhere: weights are (out_features, in_features), activations (..., in_features).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lwquant.codebooks import CODE_BITS, CODEBOOKS, values_of

WORD_BITS = 32
SCALE_BITS = (8, 16)
FLOAT_BITS = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
WHOLE_ROW = 2**20  # a group size above any in_features: one group per row
BYTE_BITS = 8
MAX_OUTLIERS = 100  # per thousand weights; long before that a wider code is the better use of bits
NARROW_COLUMNS = 2**16  # inputs up to which the column of an outlier takes 16 bits

# What a walk records of a linear besides its inputs: nothing; what the residual stream lacks after
# it, or else how its inputs differ from the float model's; or both.
Records = Literal["inputs", "owed", "all"]


def row_words(n_codes: int, bits: int) -> int:
    """32-bit words that one row of `n_codes` codes of `bits` bits fills.

    >>> row_words(576, 3), row_words(33, 3)
    (54, 4)
    """
    return -(-n_codes * bits // WORD_BITS)


@dataclass(frozen=True)
class QuantScheme:
    """How one linear is stored: `bits` per code, a scale (and a zero) per `group_size` inputs.

    `bits` 16 means "left as a 16-bit float"; its group size is 0. A group size that does not
    divide in_features leaves a shorter last group; one at least in_features means one per row.
    `scale_bits` 8 stores scales as lwquant/ops/scale_bytes.py says, 16 as float16.
    `codebook` names what 4-bit codes stand for in units of the scale, see lwquant/codebooks.py, and
    has no zeros: it counts as symmetric. "" means even steps. A zero is a whole code; with
    `fine_zeros` it is a byte that counts in steps of `zero_step`. Of every thousand weights,
    `outliers` have a 16-bit float added to what their code stands for.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False
    scale_bits: int = 16
    codebook: str = ""
    fine_zeros: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.bits == FLOAT_BITS:
            object.__setattr__(self, "group_size", 0)
            object.__setattr__(self, "symmetric", False)
            object.__setattr__(self, "scale_bits", 16)
            object.__setattr__(self, "fine_zeros", False)
            object.__setattr__(self, "outliers", 0)
        elif self.bits not in WIDTHS:
            raise ValueError(f"bits={self.bits} is not one of {(*WIDTHS, FLOAT_BITS)}")
        elif self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        elif self.scale_bits not in SCALE_BITS:
            raise ValueError(f"scale_bits={self.scale_bits} is not one of {SCALE_BITS}")
        if self.codebook:
            if self.codebook not in CODEBOOKS:
                raise ValueError(f"codebook={self.codebook!r} is not one of {tuple(CODEBOOKS)}")
            if self.bits != CODE_BITS:
                raise ValueError(f"codebook={self.codebook!r} needs bits=4, not {self.bits}")
            object.__setattr__(self, "symmetric", True)
        if self.symmetric and self.fine_zeros:
            raise ValueError("a symmetric scheme stores no zeros, so fine_zeros has no meaning")
        if not 0 <= self.outliers <= MAX_OUTLIERS:
            raise ValueError(
                f"outliers={self.outliers} per thousand must be between 0 and {MAX_OUTLIERS}"
            )

    @property
    def is_float(self) -> bool:
        return self.bits == FLOAT_BITS

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def zero_step(self) -> float:
        """What one stored zero more adds to the zero-point, in codes.

        The 256 values of a byte divide the codes' range, whatever their width.

        >>> [QuantScheme(bits, fine_zeros=True).zero_step for bits in (2, 3, 8)]
        [0.015625, 0.03125, 1.0]
        """
        return 2.0 ** (self.bits - BYTE_BITS) if self.fine_zeros else 1.0

    @property
    def max_zero(self) -> int:
        """The largest zero that can be stored."""
        return 2**BYTE_BITS - 1 if self.fine_zeros else self.max_code

    @property
    def label(self) -> str:
        """A short name, and the key of this scheme in JSON files.

        >>> QuantScheme(3).label, QuantScheme(4, 128, symmetric=True).label, QuantScheme(16).label
        ('3b-g64', '4b-g128-sym', '16b')
        >>> QuantScheme(3, scale_bits=8).label, QuantScheme(3, fine_zeros=True).label
        ('3b-g64-s8', '3b-g64-z8')
        >>> QuantScheme(2, scale_bits=8, outliers=5).label
        '2b-g64-s8-o5'
        >>> QuantScheme(4, codebook="nf4").label, QuantScheme(8, WHOLE_ROW, symmetric=True).label
        ('nf4-g64', '8b-row-sym')
        """
        if self.is_float:
            return f"{FLOAT_BITS}b"
        codes = self.codebook or f"{self.bits}b"
        group = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        symmetric = "-sym" if self.symmetric and not self.codebook else ""
        scales = f"-s{self.scale_bits}" if self.scale_bits != 16 else ""
        zeros = f"-z{BYTE_BITS}" if self.fine_zeros else ""
        outliers = f"-o{self.outliers}" if self.outliers else ""
        return f"{codes}-{group}{symmetric}{scales}{zeros}{outliers}"

    @classmethod
    def parse(cls, label: str) -> QuantScheme:
        """The scheme that `label` names; ValueError where it names none.

        >>> QuantScheme.parse("3b-g64") == QuantScheme(3, 64)
        True
        """
        if label == f"{FLOAT_BITS}b":
            return cls(FLOAT_BITS)
        pattern = (
            rf"(?:(?P<bits>\d+)b|(?P<codebook>{'|'.join(CODEBOOKS)}))-(?:g(?P<size>\d+)|row)"
            r"(?P<sym>-sym)?(-s(?P<scale>\d+))?(?P<fine>-z8)?(-o(?P<outliers>\d+))?"
        )
        match = re.fullmatch(pattern, label)
        if match is None or (match["codebook"] and match["sym"]):
            raise ValueError(
                f"scheme {label!r} is not of the form '3b-g64', '4b-g128-sym', '3b-g64-s8-z8-o5',"
                " 'nf4-g64', '8b-row-sym' or '16b'"
            )
        return cls(
            bits=int(match["bits"] or CODE_BITS),
            group_size=int(match["size"] or WHOLE_ROW),
            symmetric=match["sym"] is not None,
            scale_bits=int(match["scale"] or 16),
            codebook=match["codebook"] or "",
            fine_zeros=match["fine"] is not None,
            outliers=int(match["outliers"] or 0),
        )

    @property
    def without_outliers(self) -> QuantScheme:
        return replace(self, outliers=0)

    def n_groups(self, in_features: int) -> int:
        return 0 if self.is_float else -(-in_features // self.group_size)

    def row_scales(self, in_features: int) -> int:
        """Values of `scale_bits` stored per row: one a group, and the window of 8-bit scales."""
        return self.n_groups(in_features) + (self.scale_bits == 8)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Every bit this scheme writes for one weight: padded code rows, scales, zeros, outliers.

        >>> QuantScheme(3, 64).stored_bits(576, 576) / (576 * 576)
        3.296875
        >>> QuantScheme(3, 64, scale_bits=8).stored_bits(576, 576) / (576 * 576)
        3.185763888888889
        >>> QuantScheme(3, 64, scale_bits=8, fine_zeros=True).stored_bits(576, 576) / (576 * 576)
        3.263888888888889
        >>> QuantScheme(3, 64, scale_bits=8, outliers=5).stored_bits(576, 576) / (576 * 576)
        3.4013310185185186
        """
        if self.is_float:
            return FLOAT_BITS * out_features * in_features
        codes = out_features * row_words(in_features, self.bits) * WORD_BITS
        scales = out_features * self.row_scales(in_features) * self.scale_bits
        zeros = self.n_groups(in_features) * self._bits_of_zeros(out_features)
        return codes + scales + zeros + self._bits_of_outliers(out_features, in_features)

    def n_outliers(self, out_features: int, in_features: int) -> int:
        """How many entries one weight has, whatever its values."""
        return self.outliers * out_features * in_features // 1000

    def _bits_of_outliers(self, out_features: int, in_features: int) -> int:
        """A value and a column each, and the 32-bit row pointers."""
        if not self.outliers:
            return 0
        column = 16 if in_features <= NARROW_COLUMNS else 32
        entries = self.n_outliers(out_features, in_features) * (16 + column)
        return entries + 32 * (out_features + 1)

    def _bits_of_zeros(self, out_features: int) -> int:
        """Stored bits of the zeros of one group of inputs."""
        if self.symmetric:
            return 0
        if self.fine_zeros:
            return out_features * BYTE_BITS
        return row_words(out_features, self.bits) * WORD_BITS


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
        if self.scheme.codebook:
            return values_of(self.codes, self.scheme.codebook)
        return self.codes.float() - self.zero_points[:, self.group_of_inputs()]

    def group_of_inputs(self) -> Tensor:
        """The number of each input's group, (in_features,)."""
        inputs = torch.arange(self.codes.shape[1], device=self.codes.device)
        return inputs // self.scheme.group_size


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
