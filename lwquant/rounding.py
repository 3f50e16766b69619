"""How the linears of a run are rounded: quantizer and correction made to fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lwquant.corrections import CORRECTIONS
from lwquant.errors import LwquantError
from lwquant.importance import IMPORTANCES, TokenWeighting
from lwquant.methods import Method, base_of, look_up
from lwquant.quantizers import QUANTIZERS, bnb, refuse_scheme
from lwquant.quantizers.bnb import require_bitsandbytes
from lwquant.scheme import QuantScheme
from lwquant.types import Records


@dataclass(frozen=True)
class Rounding:
    """The quantizer and the correction of a run, made to fit each other, and what follows them."""

    quantizer: Callable[..., Any]
    correction: Callable[..., Any] | None
    records: Records
    weighting: TokenWeighting | None = None  # of the calibration tokens
    guided: int = 0  # groups of rows with statistics of their own; 0: all tokens count the same
    polish: int = 0  # steps of learned rounding per block
    unclipped_qk: float = 0.0  # share of the rows of queries and keys that keep their full range
    activation_bits: int = 0  # of kernels, 8 or 16; 0: whichever activation_choice.py finds


def refuse_schemes(
    quantizer: Callable[..., Any], polish: int, schemes: Iterable[QuantScheme]
) -> None:
    """LwquantError for the first scheme that the quantizer or learned rounding cannot handle."""
    for scheme in schemes:
        if polish and scheme.codebook:
            raise LwquantError(
                f"polish={polish} learns codes of even steps, which scheme {scheme.label} has not"
            )
        try:
            refuse_scheme(quantizer, scheme)
        except ValueError as error:
            raise LwquantError(str(error)) from error


def rounding_of(quantizer: Method, correction: Method) -> Rounding:
    """Resolve both. "gptaq" is GPTQ's own asymmetric term, so it needs GPTQ and excludes QEP.

    LwquantError for unknown names, and for bnb where bitsandbytes is missing.
    """
    resolved = look_up("quantizer", QUANTIZERS, quantizer)
    if resolved is bnb:
        require_bitsandbytes()
    named = {"name": correction} if isinstance(correction, str) else correction
    if isinstance(named, Mapping) and named.get("name") == "none":
        return Rounding(resolved, None, "inputs")
    if isinstance(named, Mapping) and named.get("name") == "gptaq":
        if base_of(resolved) is not QUANTIZERS["gptq"]:
            raise LwquantError("correction 'gptaq' is a term inside GPTQ: use quantizer 'gptq'")
        strength = float(named.get("strength", 0.25))
        return Rounding(partial(resolved, asymmetry=strength), None, "all")
    choices = {**CORRECTIONS, "none": None, "gptaq": None}
    found = look_up("correction", choices, correction)
    return Rounding(resolved, found, _records_of(found))


def _records_of(correction: Callable[..., Any]) -> Records:
    settings = correction.keywords if isinstance(correction, partial) else {}
    as_it_is = base_of(correction) is CORRECTIONS["qep"] and settings.get("repair_residual", True)
    return "owed" if as_it_is else "all"


def weighting_of(token_importance: Method) -> TokenWeighting | None:
    """How tokens are weighted, None where all count the same.

    Besides the settings of its score a method can have a `floor`, see TokenWeighting. LwquantError
    for unknown names and settings.
    """
    named = {"name": token_importance} if isinstance(token_importance, str) else token_importance
    floor: Any = TokenWeighting.floor
    if isinstance(named, Mapping):
        if named.get("name") == "none":
            return None
        named = dict(named)
        floor = named.pop("floor", floor)
    score = look_up("token_importance", {**IMPORTANCES, "none": None}, named)
    try:
        return TokenWeighting(score, floor)
    except (TypeError, ValueError) as error:
        raise LwquantError(f"token_importance: floor={floor!r}: {error}") from error
