"""Recipes: the arguments of a run in TOML, by name from calibration/ or from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lwquant.allocators import ALLOCATORS
from lwquant.codebooks import CODE_BITS
from lwquant.decode_times import ARGUMENTS, BENCHMARK, DecodeTimes, read_decode_times
from lwquant.errors import LwquantError
from lwquant.methods import Method, base_of, look_up
from lwquant.ops.activations import ACTIVATION_BITS
from lwquant.quantizers import QUANTIZERS, Quantizer, without_descent
from lwquant.rounding import Rounding, refuse_schemes, rounding_of, weighting_of
from lwquant.scheme import FLOAT_BITS, WHOLE_ROW, WIDTHS, QuantScheme
from lwquant.sensitivity import METRICS
from lwquant.transforms import TRANSFORMS

EMBEDDING_BITS = (4, 5, 6, 7, 8, FLOAT_BITS)
UNCLIPPING = (QUANTIZERS["gptq"], QUANTIZERS["quantease"])  # can spare rows the range search


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the model, the budget and the output.

    Methods are a listed name, {"name": ..., settings}, or a function with the family's signature.
    """

    sources: tuple[str, ...] = ("self",)  # texts in equal shares; see capture/text.py
    n_samples: int = 64
    seq_len: int = 512
    seed: int = 0
    held_out: int = 8  # further windows of the same texts, for the KL shown at the end of a run
    sensitivity_samples: int = 32  # how many of the calibration windows the metric looks at
    transform: Method = "none"
    metric: Method = "fisher"
    allocator: Method = "exact"
    quantizer: Method = "quantease"
    correction: Method = "qep"
    token_importance: Method = "none"  # how much each calibration token counts; see importance/
    guided: int = 0  # groups of each linear's rows with weights of their own; see guidance.py
    expand: int = 1  # times each calibration window is used, shifted around further each time
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 16)
    group_size: int = 64
    more_group_sizes: tuple[int, ...] = ()  # each width is also in the menu with each of these
    symmetric: bool = False
    scale_bits: int = 8  # 16: scales as plain float16
    embedding_bits: int = 0  # of embedding and head, 4 to 8, or 16; 0: see embedding_choice.py
    activation_bits: int = 0  # 8 or 16 in kernels; 0: by the error it makes, activation_choice.py
    unclipped_qk: float = 0.0  # share of q and k rows with full range; see massive_channels.py
    codebook: str = ""  # nf4 or fp4: the values of 4-bit codes, in place of even steps
    row_bits: tuple[int, ...] = ()  # widths with one scale per row and no zeros; 8 is LLM.int8
    fine_zeros: tuple[int, ...] = (2,)  # widths whose zeros, if any, take a byte, finer than codes
    outliers: int = 0  # per thousand weights with a 16-bit float apart; quantizer "quantease" only
    tie_fused: bool = False  # q/k/v and gate/up share a scheme, as vLLM and SGLang need
    polish: int = 0  # steps of learned rounding per block; see block_tuning.py
    tune: int = 0  # further windows to tune all scales together on; see finetune.py
    remeasure: int = 0  # rounds of measuring costs again around the plan; see remeasure.py
    pair_terms: int = 0  # measured plans to fit terms of pairs on; see pair_terms.py
    local_search: int = 0  # measured moves from the plan; see local_search.py
    pins: Mapping[str, int] = field(default_factory=dict)  # linear name -> bits
    allow_worse: bool = False  # keep a mixed plan that is predicted to lose against uniform
    decode_times: str | Path | DecodeTimes | None = None  # measured times; see decode_times.py
    max_decode_us: float | None = None  # microseconds per decoded token that the linears may take

    def __post_init__(self) -> None:
        least_of = {"n_samples": 1, "seq_len": 8, "held_out": 1, "expand": 1, "polish": 0}
        least_of |= {"guided": 0, "tune": 0, "remeasure": 0, "pair_terms": 0, "local_search": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise LwquantError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.polish and self.n_samples < 2:
            raise LwquantError(f"polish needs n_samples of at least 2, not {self.n_samples}")
        if not 1 <= self.sensitivity_samples:
            raise LwquantError(f"sensitivity_samples={self.sensitivity_samples} must be positive")
        if not 0 <= self.unclipped_qk <= 1:
            raise LwquantError(f"unclipped_qk={self.unclipped_qk} must be in [0, 1]")
        if self.embedding_bits not in (0, *EMBEDDING_BITS):
            raise LwquantError(
                f"embedding_bits={self.embedding_bits} is not one of {EMBEDDING_BITS}, or 0 for "
                "what the budget says"
            )
        if self.activation_bits not in (0, *ACTIVATION_BITS):
            raise LwquantError(
                f"activation_bits={self.activation_bits} is not 8, 16, or 0 for what the error says"
            )
        if self.expand > 1 and self.n_samples < 2:
            raise LwquantError(f"expand needs n_samples of at least 2, not {self.n_samples}")
        if self.expand >= self.seq_len:
            raise LwquantError(f"expand={self.expand} must be below seq_len={self.seq_len}")
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise LwquantError(f"bits={self.bits} must be different widths, at least one")
        if self.codebook and CODE_BITS not in self.bits:
            raise LwquantError(f"codebook={self.codebook!r} is for 4 bits, bits={self.bits}")
        if not set(self.row_bits) <= set(self.bits) - {FLOAT_BITS}:
            raise LwquantError(
                f"row_bits={self.row_bits} are not all quantized widths of {self.bits}"
            )
        if not set(self.fine_zeros) <= set(WIDTHS):
            raise LwquantError(f"fine_zeros={self.fine_zeros} are not all widths of {WIDTHS}")
        if self.max_decode_us is not None:
            if not self.max_decode_us > 0:
                raise LwquantError(f"max_decode_us={self.max_decode_us} must be above 0")
            if self.decode_times is None:
                raise LwquantError(
                    f"max_decode_us={self.max_decode_us} needs decode_times, a file that "
                    f"`python {BENCHMARK} {ARGUMENTS} --shapes OUTxIN,... --write FILE` "
                    "measures on the machine that is to decode"
                )
        refuse_schemes(
            look_up("quantizer", QUANTIZERS, self.quantizer), self.polish, self.schemes()
        )

    def schemes(self) -> tuple[QuantScheme, ...]:
        """The menu: narrow to wide, and from large groups to small ones within a width."""
        sizes = sorted({self.group_size, *self.more_group_sizes}, reverse=True)
        try:
            every = [self._scheme(width, size) for width in sorted(self.bits) for size in sizes]
            return tuple(dict.fromkeys(every))  # 16 bits and whole rows have no groups
        except ValueError as error:
            raise LwquantError(str(error)) from error

    def scheme(self, bits: int) -> QuantScheme:
        return self._scheme(bits, self.group_size)

    def _scheme(self, bits: int, group_size: int) -> QuantScheme:
        codebook = self.codebook if bits == CODE_BITS else ""
        if bits in self.row_bits:
            # A row with a single scale spends two bytes on it either way.
            return QuantScheme(bits, WHOLE_ROW, symmetric=True, codebook=codebook)
        return QuantScheme(
            bits,
            group_size,
            self.symmetric,
            self.scale_bits,
            codebook=codebook,
            fine_zeros=bits in self.fine_zeros and not (self.symmetric or codebook),
            outliers=self.outliers,
        )

    def rounding(self) -> Rounding:
        """Everything about how linears are rounded; LwquantError for unknown names."""
        plain = rounding_of(self.quantizer, self.correction)
        if self.unclipped_qk and base_of(plain.quantizer) not in UNCLIPPING:
            raise LwquantError(
                f"unclipped_qk={self.unclipped_qk} needs quantizer 'gptq' or 'quantease'"
            )
        weighting = weighting_of(self.token_importance)
        if weighting is not None and self.guided:
            raise LwquantError(
                f"guided={self.guided} and a token_importance both say how much each token counts: "
                "leave one of them out"
            )
        if self.guided and self.outliers:
            raise LwquantError(
                f"guided={self.guided} rounds groups of a linear's rows by themselves, "
                f"outliers={self.outliers} are sought in all rows together: leave one of them out"
            )
        if self.unclipped_qk and self.guided:
            raise LwquantError(
                f"unclipped_qk={self.unclipped_qk} looks at all rows of a linear together, "
                f"guided={self.guided} at groups of them: leave one of them out"
            )
        return replace(
            plain,
            weighting=weighting,
            guided=self.guided,
            polish=self.polish,
            unclipped_qk=self.unclipped_qk,
            activation_bits=self.activation_bits,
        )

    def times(self) -> DecodeTimes | None:
        """The table of measured times, read where the recipe names a file."""
        known = self.decode_times
        return read_decode_times(Path(known)) if isinstance(known, str | Path) else known

    def cost_quantizer(self) -> Quantizer:
        """What costs are measured with; LwquantError for an unknown name."""
        quantizer = rounding_of(self.quantizer, "none").quantizer
        # Only the descent looks for outliers; a start without it would cost them as if they were
        # not there.
        return quantizer if self.outliers else without_descent(quantizer)

    def changed(self, **settings: Any) -> Recipe:
        """A copy with those settings that are not None."""
        return replace(self, **{k: v for k, v in settings.items() if v is not None})

    def refuse_replanning(self, why: str, *also: str) -> None:
        """LwquantError where the recipe asks for what only quantize() to a size can do.

        Args:
            also: further settings that are refused where they are set.
        """
        for name in ("remeasure", "pair_terms", "local_search", *also):
            if getattr(self, name):
                raise LwquantError(f"{name}={getattr(self, name)} {why}")


def load_recipe(name: str | Path) -> Recipe:
    """A recipe of calibration/ by its name, or a TOML file by its path.

    Raises LwquantError for a missing file, bad TOML, and unknown or ill-typed settings.
    """
    shipped = files("lwquant") / "calibration"
    path = Path(name)
    if path.suffix != ".toml":
        names = sorted(
            entry.name.removesuffix(".toml")
            for entry in shipped.iterdir()
            if entry.name.endswith(".toml")
        )
        if str(name) not in names:
            raise LwquantError(
                f"no recipe {str(name)!r}; there are {', '.join(names)}, or a .toml file"
            )
        text = (shipped / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LwquantError(f"recipe {path}: {error}") from error
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LwquantError(f"recipe {name}: {error}") from error
    return _recipe_of(settings, str(name))


def _recipe_of(settings: dict[str, Any], where: str) -> Recipe:
    known = {entry.name: entry for entry in fields(Recipe)}
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise LwquantError(f"recipe {where}: unknown setting {unknown[0]!r}")
    try:
        for name in ("sources", "bits", "more_group_sizes", "row_bits", "fine_zeros"):
            if name in settings:
                settings[name] = tuple(settings[name])
        recipe = Recipe(**settings)
    except (TypeError, LwquantError) as error:
        raise LwquantError(f"recipe {where}: {error}") from error
    counts = ["n_samples", "seq_len", "seed", "held_out", "sensitivity_samples", "group_size"]
    counts += ["activation_bits", "scale_bits", "outliers", "expand", "guided", "polish", "tune"]
    counts += ["remeasure", "pair_terms", "local_search"]
    for name in counts:
        if not isinstance(getattr(recipe, name), int):
            raise LwquantError(f"recipe {where}: {name} must be a whole number")
    return recipe


def metric_of(method: Method) -> Callable[..., Any]:
    return look_up("metric", METRICS, method)


def transform_of(method: Method) -> Callable[..., Any] | None:
    """The transform, or None where the recipe says "none"."""
    return look_up("transform", {**TRANSFORMS, "none": None}, method)


def allocator_of(method: Method) -> Callable[..., Any]:
    return look_up("allocator", ALLOCATORS, method)
