"""How one linear is stored: widths, groups, scales, zeros, outliers, and the bits they take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lwquant.codebooks import CODE_BITS, CODEBOOKS, nearest_codes, values_of

WORD_BITS = 32
SCALE_BITS = (8, 16)
FLOAT_BITS = 16
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
WHOLE_ROW = 2**20  # a group size above any in_features: one group per row
BYTE_BITS = 8
MAX_OUTLIERS = 100  # per thousand weights; long before that a wider code is the better use of bits
NARROW_COLUMNS = 2**16  # inputs up to which the column of an outlier takes 16 bits


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

    @classmethod
    def from_fields(cls, values: Mapping[str, object]) -> QuantScheme:
        """The scheme of fields by name, as JSON has them; other keys are not looked at.

        Fields that are absent have their defaults. Raises ValueError where `bits` is missing, a
        value has another type than its field, or there is no such scheme.

        >>> QuantScheme.from_fields({"bits": 3, "cost": 0.5}).label
        '3b-g64'
        """
        if "bits" not in values:
            raise ValueError("bits is missing")
        settings: dict[str, Any] = {}
        for name, default in asdict(cls(FLOAT_BITS)).items():
            value = values.get(name, cls.__dataclass_fields__[name].default)
            if type(value) is not type(default):
                raise ValueError(f"{name} is {value!r}, not of type {type(default).__name__}")
            settings[name] = value
        return cls(**settings)

    def nearest_codes(self, steps: Tensor, zeros: Tensor) -> Tensor:
        """Codes, whole float32 numbers, of weights in units of their scale.

        `zeros` holds the zero-points, and broadcasts to `steps`.
        """
        if self.codebook:
            return nearest_codes(steps, self.codebook).float()
        return (steps + zeros).round_().clamp_(0, self.max_code)

    def steps_of(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """What codes stand for in units of their scale, float32; zeros as for nearest_codes()."""
        if self.codebook:
            return values_of(codes, self.codebook)
        return codes.float() - zeros

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
