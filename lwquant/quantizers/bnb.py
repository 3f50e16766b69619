"""What bitsandbytes stores: NF4 and FP4 blocks, and the int8 rows of LLM.int8.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, and "LLM.int8():
8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339. Of the latter only the
weights: its other half keeps outlying inputs apart because it rounds inputs to 8 bits, which
lwquant does not. Needs the package: pip install lwquant[bnb].
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from lwquant.errors import LwquantError
from lwquant.groups import by_groups, group_of_inputs
from lwquant.quantizers.grid import Grid, in_window, storable_scale
from lwquant.scheme import QuantScheme
from lwquant.types import LayerStats, QuantizedWeight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that its 4-bit kernels have
INT8_MIDDLE, INT8_STEPS = 128, 127  # our zero; steps from zero to a row's largest weight
FLOAT16_ROUNDING = 2.0**-11  # most that storing a scale as float16 changes it by, relative
SLICE_WEIGHTS = 1 << 22  # rows are handed over in slices, for it takes about 30 bytes a weight


def bnb(weight: Tensor, stats: LayerStats | None, scheme: QuantScheme) -> QuantizedWeight:
    """Quantize one linear as bitsandbytes does on the CPU, without double quantization.

    Codes are bitsandbytes' own wherever its float32 absmax is stored up to the rounding of
    float16. Where our scale is further off (in 8 bits, or because float16 ends) they are the
    nearest to the scale that is stored. Rows are padded to whole blocks, so that no block runs on
    into the next row, as bitsandbytes' do where the block size does not divide in_features.

    Args:
        weight: (out_features, in_features).
        stats: not looked at.
        scheme: "nf4" or "fp4" in blocks of BLOCK_SIZES, or 8 symmetric bits; LLM.int8 has one
            group per row.

    Raises ValueError for another scheme and when a scale leaves float16's range, LwquantError
    without bitsandbytes.
    """
    bnb_schemes_only(scheme)
    require_bitsandbytes()
    rows = max(1, SLICE_WEIGHTS // weight.shape[1])
    quantize = _int8 if scheme.bits == 8 else _four_bits
    plain = weight.detach().float().cpu().contiguous()
    parts = [quantize(part, scheme) for part in plain.split(rows)]
    codes, absmax = (torch.cat(part).to(weight.device) for part in zip(*parts, strict=True))
    exact = absmax / INT8_STEPS if scheme.bits == 8 else absmax
    scales = in_window(storable_scale(exact, scheme), scheme)
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"a group of weights up to {weight.abs().max():.3g} overflows float16 scales"
        )
    grid = Grid(scheme, scales, torch.full_like(scales, 2.0 ** (scheme.bits - 1)))
    moved = (scales - exact).abs() > FLOAT16_ROUNDING * exact
    expand = group_of_inputs(weight.shape[1], scheme.group_size, weight.device)
    codes = torch.where(moved[:, expand], grid.round(weight.float()).byte(), codes)
    return QuantizedWeight(scheme, codes, scales.half(), grid.zeros.byte())


def bnb_schemes_only(scheme: QuantScheme) -> None:
    """ValueError for a scheme that bitsandbytes has not."""
    if scheme.codebook:
        if scheme.group_size not in BLOCK_SIZES:
            raise ValueError(
                f"scheme {scheme.label}: bitsandbytes' block sizes are "
                f"{', '.join(map(str, BLOCK_SIZES))}"
            )
    elif not (scheme.is_float or (scheme.bits == 8 and scheme.symmetric)):
        raise ValueError(
            f"bitsandbytes has no scheme {scheme.label}: quantizer 'bnb' takes 4 bits with a "
            "codebook and 8 symmetric bits (recipe 'bnb' has both)"
        )


def require_bitsandbytes() -> None:
    """LwquantError with what to install where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LwquantError("quantizer 'bnb' needs bitsandbytes: pip install lwquant[bnb]")


def _four_bits(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Codes like the weight, and the absmax of each block (rows, n_groups)."""
    rows, in_features = weight.shape
    # Zeros at the end of each row change no absmax, and no block runs on into the next row.
    padded = torch.nn.functional.pad(weight, (0, -in_features % scheme.group_size))
    packed, state = _functional().quantize_4bit(
        padded, blocksize=scheme.group_size, quant_type=scheme.codebook
    )
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1)  # the first of two is the high one
    return codes.view(padded.shape)[:, :in_features], state.absmax.view(rows, -1)


def _int8(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """As _four_bits(); each group is a row to bitsandbytes."""
    rows, in_features = weight.shape
    groups = by_groups(weight, scheme.group_size).flatten(0, 1)
    codes, absmax, _ = _functional().int8_vectorwise_quant(groups)
    codes = (codes.int() + INT8_MIDDLE).to(torch.uint8)
    return codes.view(rows, -1)[:, :in_features], absmax.view(rows, -1)


def _functional() -> ModuleType:
    with _nothing_fetched():
        import bitsandbytes.functional
    return bitsandbytes.functional


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Imports of the package `kernels` fail, and what bitsandbytes logs of that is not shown.

    With that package, bitsandbytes would load compiled code from the Hub as it is imported, for
    matrix products that are not needed here.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, known = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known
