"""The compiled CPU kernels behind tensors: allocate the result, pass addresses, keep no state.

Shapes and dtypes have been checked by lwquant.ops.schema; the C++ side checks sizes once more.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lwquant.errors import LwquantError
from lwquant.scheme import row_words

# The extension is the one import that may be missing: without it everything works, slowly.
try:
    from lwquant.ops import _kernels as _found
except ImportError:
    _kernels: ModuleType | None = None
else:
    _kernels = _found

PANEL_BYTES = 2**24  # of float32 weights that exist at one time
# From how many tokens on a dense float32 product over unpacked panels is faster than the portable
# kernel; it is never by more than 5 % than the others (one core, up to 512 tokens).
PANEL_TOKENS = 16
TILE_OUTPUTS = 16  # rows of a tile


# Values, columns and rows of the sparse part; all None where there is none.
OutlierTensors = tuple[Tensor | None, Tensor | None, Tensor | None]


class UncompiledWarning(UserWarning):
    """The kernels are not compiled: correct results, much slower."""


def compiled() -> bool:
    """Whether the C++ kernels are there."""
    return _kernels is not None


def extension() -> ModuleType:
    """The compiled module itself; LwquantError where there is none."""
    if _kernels is None:
        raise LwquantError("lwquant's C++ kernels are not compiled")
    return _kernels


def isa() -> str:
    """The instruction set the kernels run on; "python" when nothing is compiled."""
    return "python" if _kernels is None else _kernels.isa()


def available_isas() -> tuple[str, ...]:
    """What `set_isa` accepts on this machine, the fastest last."""
    return ("python",) if _kernels is None else tuple(_kernels.available_isas())


def set_isa(name: str) -> None:
    """Run on another instruction set from now on, in the whole process (tests, benchmarks)."""
    if name not in available_isas():
        raise LwquantError(f"isa {name!r} is not one of {available_isas()}")
    if _kernels is not None:
        _kernels.set_isa(name)


def weights_rounded_to(
    bits: int, int8_weights: bool, n_tokens: int, activation_bits: int, bf16_inputs: bool
) -> str:
    """What the kernels round weights and inputs of such a call to: "bf16", "int8", or "".

    "" where codes are multiplied as they are, by inputs that are integers. `int8_weights` is what
    tiles were made with.
    """
    if _kernels is None:
        return ""
    dtype: str = _kernels.weights_rounded_to(
        bits, int8_weights, n_tokens, activation_bits, bf16_inputs
    )
    return dtype


@functools.cache
def warn_uncompiled() -> None:
    """Say once that the slow path runs."""
    message = "lwquant's C++ kernels are not compiled: quantized layers run in plain torch, slowly"
    warnings.warn(message, UncompiledWarning, stacklevel=2)


def pack_native(codes: Tensor, bits: int) -> Tensor:
    rows, n_codes = codes.shape
    codes = codes.contiguous()
    words = torch.empty(rows, row_words(n_codes, bits), dtype=torch.int32)
    _kernels.pack(codes.data_ptr(), rows, n_codes, bits, words.data_ptr())  # type: ignore[union-attr]
    return words


def unpack_native(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    rows, n_words = packed.shape
    packed = packed.contiguous()
    codes = torch.empty(rows, n_codes, dtype=torch.uint8)
    _kernels.unpack(packed.data_ptr(), rows, n_words, bits, n_codes, codes.data_ptr())  # type: ignore[union-attr]
    return codes


def dequantize_native(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    outliers: OutlierTensors,
) -> Tensor:
    out_features = qweight.shape[0]
    out = torch.empty(out_features, in_features)
    _dequantize_rows(
        qweight.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        bits,
        group_size,
        _contiguous(outliers),
        0,
        out,
    )
    return out


def tiles_size(
    out_features: int, in_features: int, byte_scales: bool, zeros: bool, bits: int, group_size: int
) -> int:
    """Bytes of the tiles of such a layer, 0 where its groups do not fit them."""
    size: int = _kernels.tiles_size(  # type: ignore[union-attr]
        out_features, in_features, byte_scales, zeros, bits, group_size
    )
    return size


def make_tiles_native(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    int8_weights: bool,
    tiles: Tensor,
) -> None:
    """Fill `tiles`, contiguous bytes."""
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    _kernels.make_tiles(  # type: ignore[union-attr]
        qweight.data_ptr(),
        qweight.shape[0],
        qweight.shape[1],
        in_features,
        scales.data_ptr(),
        *_scale_layout(scales),
        *_zero_layout(zeros),
        bits,
        group_size,
        int8_weights,
        torch.get_num_threads(),
        tiles.data_ptr(),
        tiles.numel(),
    )


def unmake_tiles_native(
    tiles: Tensor,
    out_features: int,
    in_features: int,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
) -> None:
    """Fill qweight, scales and zeros, these in bytes; all contiguous."""
    _kernels.unmake_tiles(  # type: ignore[union-attr]
        tiles.data_ptr(),
        tiles.numel(),
        out_features,
        in_features,
        torch.get_num_threads(),
        qweight.data_ptr(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
    )


class TiledLinear:
    """Tiles and outliers whose sizes have been checked once; keeps them alive."""

    def __init__(
        self, tiles: Tensor, out_features: int, in_features: int, outliers: OutlierTensors
    ) -> None:
        """ValueError where the tiles are those of another layer or outliers lie outside it."""
        self.tiles, self._outliers = tiles, _contiguous(outliers)
        self.in_features, self.out_features = in_features, out_features
        self._checked = _kernels.TiledLinear(  # type: ignore[union-attr]
            tiles.data_ptr(),
            tiles.numel(),
            out_features,
            in_features,
            *_outlier_layout(self._outliers),
        )
        # As fill(), of addresses, for who has no time for a call more.
        self.run: Callable[..., bool] = self._checked.run

    def __call__(self, x: Tensor, bias: Tensor | None, activation_bits: int) -> Tensor | None:
        """(..., in_features) → (..., out_features), contiguous float32 or bf16 as x is.

        The bias is float32. None where x holds NaN or infinity. Else as linear_reference, and
        apart from float32 summation no further from it than Σ over groups of |scale| · max|x| ·
        0.51 / L · Σ|code − zero|: the kernels hold x as integers up to L, 32639 at 16 bits and 127
        at 8. tests/unit/test_ops_linear.py derives the bound and holds every kernel to it. Where
        weights_rounded_to() says "bf16", weights and x are rounded to that, by 2⁻⁸ of themselves at
        most, and NaN and infinity stay in their tokens: csrc/linear_amx_bf16.cpp, test_ops_bf16.py.
        Where it says "int8" they become steps of 1/127 of the largest among 256 inputs:
        int8_weights.py, csrc/linear_amx_int8.cpp, test_ops_int8.py.
        """
        y = x.new_empty((*x.shape[:-1], self.out_features))
        return y if self.fill(y, x, x.numel() // self.in_features, bias, activation_bits) else None

    def fill(
        self, y: Tensor, x: Tensor, n_tokens: int, bias: Tensor | None, activation_bits: int
    ) -> bool:
        """Write into y what a call returns; False where that is None.

        Both contiguous, and both float32 or bf16.
        """
        done: bool = self.run(
            x.data_ptr(),
            n_tokens,
            0 if bias is None else bias.data_ptr(),
            activation_bits,
            torch.get_num_threads(),
            y.data_ptr(),
            y.dtype is torch.bfloat16,
        )
        return done

    def takes(self, dtype: torch.dtype, n_tokens: int, activation_bits: int) -> bool:
        """Whether it reads such inputs at least as fast as torch converts them to float32."""
        if dtype is torch.bfloat16:
            taken: bool = self._checked.takes_bf16(n_tokens, activation_bits)
            return taken
        return dtype is torch.float32

    def dequantize_rows(self, row: int, out: Tensor) -> None:
        """Rows [row, row + len(out)) of the weight into `out`; `row` is the first of a tile."""
        self._checked.dequantize(row, out.shape[0], torch.get_num_threads(), out.data_ptr())


def panels_are_faster(n_tokens: int) -> bool:
    """Whether tiled_panels() takes less time than the kernel on this instruction set."""
    return n_tokens >= PANEL_TOKENS and isa() == "reference"


def tiled_panels(kernel: TiledLinear, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """As kernel(), for any inputs: in float32, a panel of unpacked rows at a time."""
    return _by_panels(tokens, bias, kernel.out_features, kernel.dequantize_rows)


def linear_panels(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    outliers: OutlierTensors,
) -> Tensor:
    """As linear_reference, a panel of unpacked rows at a time."""
    out_features = qweight.shape[0]
    tokens = x.reshape(-1, x.shape[-1]).to(torch.float32)
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.to(torch.float32)
    outliers = _contiguous(outliers)

    def fill(start: int, panel: Tensor) -> None:
        _dequantize_rows(qweight, scales, zeros, bits, group_size, outliers, start, panel)

    y = _by_panels(tokens, bias, out_features, fill)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _by_panels(
    tokens: Tensor, bias: Tensor | None, out_features: int, fill: Callable[[int, Tensor], None]
) -> Tensor:
    """tokens (n, in_features) by the weight whose rows from `start` on fill(start, rows) sets."""
    in_features = tokens.shape[1]
    most = PANEL_BYTES // (4 * in_features) // TILE_OUTPUTS * TILE_OUTPUTS
    n_rows = min(out_features, max(TILE_OUTPUTS, most))
    y, panel = torch.empty(tokens.shape[0], out_features), torch.empty(n_rows, in_features)
    for start in range(0, out_features, n_rows):
        stop = min(start + n_rows, out_features)
        weight = panel[: stop - start]
        fill(start, weight)
        y[:, start:stop] = F.linear(tokens, weight, None if bias is None else bias[start:stop])
    return y


def _dequantize_rows(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    outliers: OutlierTensors,
    row: int,
    out: Tensor,
) -> None:
    """Rows [row, row + len(out)) of the weight into `out`, contiguous float32."""
    _kernels.dequantize(  # type: ignore[union-attr]
        qweight.data_ptr(),
        qweight.shape[0],
        qweight.shape[1],
        out.shape[1],
        scales.data_ptr(),
        *_scale_layout(scales),
        *_zero_layout(zeros),
        bits,
        group_size,
        *_outlier_layout(outliers),
        row,
        out.shape[0],
        torch.get_num_threads(),
        out.data_ptr(),
    )


def _scale_layout(scales: Tensor) -> tuple[bool, int]:
    """Whether each scale is a byte, after the byte of its row's window, and groups per row."""
    as_bytes = scales.dtype == torch.uint8
    return as_bytes, scales.shape[1] - as_bytes


def _zero_layout(zeros: Tensor | None) -> tuple[int, bool, int]:
    """Address (0: no zeros), whether each zero is a byte, and bytes or words per group."""
    if zeros is None:
        return 0, False, 0
    return zeros.data_ptr(), zeros.dtype == torch.uint8, zeros.shape[1]


def _contiguous(outliers: OutlierTensors) -> OutlierTensors:
    values, columns, rows = (None if t is None else t.contiguous() for t in outliers)
    return values, columns, rows


def _outlier_layout(outliers: OutlierTensors) -> tuple[int, int, bool, int, int]:
    """Addresses of values and columns, whether a column is 32 bits, address of rows, and n."""
    values, columns, rows = outliers
    if values is None or columns is None or rows is None:
        return 0, 0, False, 0, 0
    wide = columns.dtype == torch.int32
    return values.data_ptr(), columns.data_ptr(), wide, rows.data_ptr(), values.numel()


def rounding_compiled(*tensors: Tensor | None) -> bool:
    """Whether the compiled rounding loops can serve these tensors."""
    return compiled() and all(
        t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors
    )


def round_block_native(
    targets: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    base: Tensor | None,
) -> Tensor:
    """As ops.rounding.round_block_torch; `targets` must be contiguous, it is written to."""

    def run(*block: float, errors: int) -> None:
        _kernels.round_block(*block, torch.get_num_threads(), errors)  # type: ignore[union-attr]

    return run_on_addresses(run, targets, feedback, scales, zeros, max_code, base)


def run_on_addresses(
    run: Callable[..., None],
    targets: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    base: Tensor | None,
) -> Tensor:
    """The errors of a block of columns, by a kernel that gets csrc/column_block.h in numbers."""
    n_columns, n_rows = targets.shape
    if not targets.is_contiguous() or feedback.stride(1) != 1:
        raise ValueError("columns of the targets and rows of the feedback must be contiguous")
    scales, zeros = scales.contiguous(), zeros.contiguous()
    base = None if base is None else base.contiguous()
    errors = torch.empty_like(targets)
    run(
        targets.data_ptr(),
        n_columns,
        n_rows,
        feedback.data_ptr(),
        feedback.stride(0),
        0 if base is None else base.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        float(max_code),
        errors=errors.data_ptr(),
    )
    return errors


def fit_groups_native(
    rows: Tensor,
    importance: Tensor,
    shrinks: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_mantissa: int,
    halvings: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As quantizers.grid's search for the range of each group, (n,) scales and zeros."""
    n, size = rows.shape
    if importance.shape[1] != size:
        raise ValueError(f"importance of {importance.shape[1]} for groups of {size}")
    rows, importance = rows.contiguous(), importance.contiguous()
    fractions = torch.tensor(shrinks, dtype=torch.float32)
    scales, zeros = torch.empty(n), torch.empty(n)
    _kernels.fit_groups(  # type: ignore[union-attr]
        rows.data_ptr(),
        n,
        size,
        importance.data_ptr(),
        len(importance),
        fractions.data_ptr(),
        len(fractions),
        bits,
        symmetric,
        scale_mantissa,
        halvings is not None,
        halvings or 0,
        torch.get_num_threads(),
        scales.data_ptr(),
        zeros.data_ptr(),
    )
    return scales, zeros
