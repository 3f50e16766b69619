"""The packed matmul: plain torch and every compiled path against a float64 oracle.

The bound. One output is Σ_groups scale · Σ (code − zero) · x.
- The integer kernels hold x as 16-bit integers, in steps of max|x| / 32639 of its group (or of a
  part of it), or as 8-bit ones in steps of max|x| / 127: half a step each, and 1 % of a step for
  the float32 arithmetic that finds it.
- Everything else is float32: relative 2⁻²⁴ per addition on sums of (code + zero) · |x| · scale,
  because the kernels subtract the zeros' part; at most in_features / 8 + 2 n_groups + 16 additions
  follow one another.
- The result is rounded to the dtype of x.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from lwquant import ops
from lwquant.errors import LwquantError
from lwquant.ops.activations import rounded_activations
from lwquant.ops.outliers import encode_columns
from lwquant.ops.reference import dequantize_reference, linear_reference
from lwquant.ops.scale_bytes import decode_scales
from lwquant.scheme import WIDTHS, QuantScheme
from lwquant.types import Outliers

STEP = {8: 1 / 127, 16: 1 / 32639}
MANY_TOKENS = 32
TINIEST = 2.0**-100  # groups of smaller activations are resolved as if this were their largest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # many tiny products: waking a second thread is most of the time
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@dataclass(frozen=True)
class Layer:
    """A random layer, unpacked and packed."""

    bits: int
    group_size: int
    codes: Tensor  # (out, in)
    zero_bytes: Tensor  # (out, n_groups), as stored
    scales: Tensor
    symmetric: bool
    bias: Tensor | None
    fine: bool

    @property
    def zero_points(self) -> Tensor:
        return self.zero_bytes.float() * (2.0 ** (self.bits - 8) if self.fine else 1)

    @property
    def group(self) -> Tensor:
        return torch.arange(self.codes.shape[1]) // self.group_size

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = None if self.symmetric else self.zero_bytes.T.contiguous()
        if zeros is not None and not self.fine:
            zeros = ops.pack(zeros, self.bits)
        return ops.pack(self.codes, self.bits), self.scales, zeros

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(
            self.bits, self.group_size, symmetric=self.symmetric, fine_zeros=self.fine
        )

    @property
    def tiles(self) -> Tensor | None:
        """As the kernels read it; None where they do not."""
        out_features, in_features = self.codes.shape
        if not ops.tiles_bytes(self.scheme, out_features, in_features):
            assert not ops.compiled() or self.group_size % 32
            return None
        return ops.make_tiles(self.scheme, in_features, *self.stored)

    def linear(self, x: Tensor, *outliers: Tensor, activation_bits: int = 16) -> Tensor:
        """By the fastest way there is."""
        tiles = self.tiles
        if tiles is None:
            return self.plain_linear(x, *outliers)
        n = len(self.codes)
        return ops.linear_tiled(x, tiles, self.bias, n, *outliers, activation_bits=activation_bits)

    def plain_linear(self, x: Tensor, *outliers: Tensor) -> Tensor:
        return ops.linear(x, *self.stored, self.bias, self.bits, self.group_size, *outliers)

    def oracle(self, x: Tensor, activation_bits: int = 16) -> tuple[Tensor, Tensor]:
        """Results and how far from them a kernel may be, both (tokens, out) float64."""
        x, group = x.double(), self.group
        n_groups = int(group[-1]) + 1
        codes = self.codes.double()
        zeros = self.zero_points.double()[:, group]
        scales = self.scales.double()[:, group]
        exact = x @ ((codes - zeros) * scales).T
        if self.bias is not None:
            exact += self.bias.double()
        largest = [x[:, group == g].abs().amax(1).clamp(min=TINIEST) for g in range(n_groups)]
        half_step = 0.51 * STEP[activation_bits] * torch.stack(largest, 1)[:, group]
        error = half_step @ ((codes - zeros) * scales).abs().T
        additions = x.shape[1] / 8 + 2 * n_groups + 16
        error += additions * 2**-24 * (x.abs() @ ((codes + zeros) * scales.abs()).T + exact.abs())
        return exact, error


def random_layer(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    fine: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    n_groups = -(-in_features // group_size)
    shape = (out_features, n_groups)
    zeros = torch.randint(0, 256 if fine else 2**bits, shape, generator=generator).byte()
    return Layer(
        bits=bits,
        group_size=group_size,
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator).byte(),
        zero_bytes=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=(torch.rand(shape, generator=generator) * 0.1 + 0.001).half(),
        symmetric=symmetric,
        bias=torch.randn(out_features, generator=generator) if bias else None,
        fine=fine,
    )


def random_inputs(n_tokens: int, in_features: int, seed: int = 1) -> Tensor:
    return torch.randn(n_tokens, in_features, generator=torch.Generator().manual_seed(seed))


def assert_within_bound(layer: Layer, x: Tensor, token_counts: tuple[int, ...] = ()) -> None:
    """For all of x, and for its first few tokens alone, at both widths of activations."""
    for bits in (8, 16):
        exact, error = layer.oracle(x, bits)
        rounding = torch.finfo(x.dtype)
        error = error + exact.abs() * rounding.eps / 2 + rounding.smallest_normal * rounding.eps
        rounding_inputs = partial(layer.linear, activation_bits=bits)
        runs = [(rounding_inputs, n) for n in (*token_counts, x.shape[0])]
        for run, n in [*runs, (layer.plain_linear, x.shape[0])]:
            got = run(x[:n])
            assert got.dtype == x.dtype
            worst = ((got.double() - exact[:n]).abs() / error[:n]).max().item()
            assert worst <= 1, f"{worst:.3g} times the bound with {n} tokens of {bits} bits"


TOKENS_OF_EVERY_PATH = (1, 2, 3, 4, 5, 8, 11)
SHAPES = [(33, 1000), (7, 65), (64, 576), (1, 1), (40, 256)]


@pytest.mark.parametrize("zeros", [{}, {"fine": True}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 48, 7, 10_000])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_matmul_is_within_its_bound(isa, bits, group_size, zeros):
    for out_features, in_features in SHAPES:
        layer = random_layer(out_features, in_features, bits, group_size, bias=True, **zeros)
        assert_within_bound(layer, random_inputs(7, in_features), token_counts=(1, 3))


@pytest.mark.skipif(not ops.compiled(), reason="plain torch does not round activations")
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("group_size", [32, 64, 96, 256, 10_000])
def test_activations_are_rounded_span_by_span_and_nothing_else_is_lost(
    isa, group_size, activation_bits
):
    for bits in WIDTHS:
        layer = random_layer(70, 1000, bits, group_size, bias=True)
        x = random_inputs(max(TOKENS_OF_EVERY_PATH), 1000)
        x[:, 40], x[0, :64] = 50.0, 0.0
        rounded = rounded_activations(x, activation_bits, group_size)
        error = (rounded - x).abs().max()
        assert 0.3 < error * 2 / (50 * STEP[activation_bits]) <= 1.01
        exact, _ = layer.oracle(rounded)
        for n in TOKENS_OF_EVERY_PATH:
            got = layer.linear(x[:n], activation_bits=activation_bits)
            assert (got - exact[:n]).abs().max() < 2e-5 * exact.abs().max()


def test_the_spans_of_rounded_activations_have_scales_of_their_own():
    x = torch.tensor([100.0, 0.1] + [0.0] * 31 + [0.1, 0.03] + [0.0] * 7)
    eight = rounded_activations(x, 8, 32)
    assert eight[0] == 100.0 and eight[1] == 0.0  # lost beside the massive one
    assert eight[33] == pytest.approx(0.1, rel=1e-6)
    assert eight[34] == pytest.approx(38 * 0.1 / 127, rel=1e-6)  # 38.1 steps
    assert rounded_activations(x, 16, 32)[1] == pytest.approx(0.1, rel=0.02)
    assert torch.equal(rounded_activations(torch.zeros(3, 40), 8, 32), torch.zeros(3, 40))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(isa, bits, dtype):
    layer = random_layer(33, 320, bits, 64, bias=True)
    x = random_inputs(MANY_TOKENS + 1, 320).to(dtype)
    assert_within_bound(layer, x, token_counts=(1, 4, MANY_TOKENS))


@pytest.mark.parametrize("factor", [1e30, 1e4, 1e-20, 1e-30, 1e-38, 1e-43, 0.0])
def test_huge_tiny_and_zero_inputs_keep_the_bound(isa, factor):
    for bits in (2, 4, 8):
        assert_within_bound(random_layer(9, 200, bits, 64), random_inputs(3, 200) * factor)


def test_one_massive_activation_does_not_blur_the_other_groups(isa):
    layer = random_layer(16, 256, 8, 32)
    x = random_inputs(2, 256)
    x[:, 5] = 3e5  # the bound is per group, so it stays small wherever this weight is not read
    layer.codes[:, 5] = layer.zero_bytes[:, 0]
    assert_within_bound(layer, x)
    x[:, :32] = 0
    calm, _ = layer.oracle(x)
    assert (layer.linear(x).double() - calm).abs().max() < 0.01


def test_subnormal_and_largest_scales_are_used_as_they_are(isa):
    layer = random_layer(4, 96, 4, 32)
    layer.scales[0] = 2.0**-24
    layer.scales[1] = 2.0**-15
    layer.scales[2] = 65504.0
    layer.scales[3] = 0.0
    assert_within_bound(layer, random_inputs(2, 96))


def test_infinite_and_nan_inputs_give_what_plain_torch_gives(isa, monkeypatch):
    monkeypatch.setattr("lwquant.ops.native.PANEL_BYTES", 4 * 128 * 17)  # 16 rows, the last has 8
    layer = random_layer(40, 128, 4, 64)
    x = random_inputs(3, 128)
    x[0, 7], x[1, 70] = float("inf"), float("nan")
    expected = linear_reference(x, *layer.stored, None, 4, 64)
    assert not expected[:2].isfinite().any() and expected[2].isfinite().all()
    for got in (layer.linear(x), layer.plain_linear(x)):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("fine", [False, True])
def test_dequantizing_equals_plain_torch_bit_for_bit(isa, bits, fine):
    for (out_features, in_features), group_size in zip(SHAPES, (64, 32, 48, 1, 7), strict=True):
        layer = random_layer(out_features, in_features, bits, group_size, fine=fine)
        got = ops.dequantize(*layer.stored, bits, group_size, in_features)
        assert torch.equal(got, dequantize_reference(*layer.stored, bits, group_size, in_features))
        if (tiles := layer.tiles) is not None:
            assert torch.equal(ops.dequantize_tiled(tiles, out_features, in_features), got)
        steps = layer.codes.float() - layer.zero_points[:, layer.group]
        assert torch.equal(got, steps * layer.scales.float()[:, layer.group])


@pytest.mark.parametrize("group_size", [32, 64, 48, 7, 10_000])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_in_bytes_compute_as_the_same_scales_in_float16(isa, bits, group_size):
    for out_features, in_features in SHAPES:
        layer = random_layer(out_features, in_features, bits, group_size)
        shape = out_features, 1 + layer.scales.shape[1]
        written = torch.randint(256, shape, generator=torch.Generator().manual_seed(bits)).byte()
        written[:, 0] = written[:, 0] % 15 + 1
        qweight, _, zeros = layer.stored
        x = random_inputs(3, in_features)
        as_bytes, as_halves = (
            (qweight, scales, zeros) for scales in (written, decode_scales(written))
        )
        results = []
        for scale_bits, stored in ((8, as_bytes), (16, as_halves)):
            plain = ops.linear(x, *stored, None, bits, group_size)
            results.append([plain, ops.dequantize(*stored, bits, group_size, in_features)])
            scheme = QuantScheme(bits, group_size, scale_bits=scale_bits)
            if ops.tiles_bytes(scheme, out_features, in_features):
                tiles = ops.make_tiles(scheme, in_features, *stored)
                results[-1].append(ops.linear_tiled(x, tiles, None, out_features))
                results[-1].append(ops.dequantize_tiled(tiles, out_features, in_features))
        for one, other in zip(*results, strict=True):
            assert one.isfinite().all() and torch.equal(one, other)
        got = linear_reference(x, *as_bytes, None, bits, group_size)
        assert torch.equal(got, linear_reference(x, *as_halves, None, bits, group_size))


def test_scales_in_bytes_of_another_shape_are_refused():
    qweight, scales, zeros = random_layer(8, 128, 4, 64).stored
    with pytest.raises(LwquantError, match=r"scales has shape \(8, 2\), expected \(8, 3\)"):
        ops.dequantize(qweight, scales.view(torch.uint8)[:, :2], zeros, 4, 64, 128)


@pytest.mark.parametrize("fine", [False, True])
def test_plain_torch_is_within_the_bound_too(fine):
    for bits in WIDTHS:
        layer = random_layer(33, 1000, bits, 48, bias=True, fine=fine)
        x = random_inputs(5, 1000)
        exact, error = layer.oracle(x)
        got = linear_reference(x, *layer.stored, layer.bias, bits, 48)
        assert ((got - exact).abs() <= error).all()


def random_outliers(out_features: int, in_features: int, n: int) -> Outliers:
    generator = torch.Generator().manual_seed(2)
    return Outliers.largest(torch.randn(out_features, in_features, generator=generator), n)


def stored(outliers: Outliers, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return outliers.values, encode_columns(outliers.columns, in_features), outliers.rows


@pytest.mark.parametrize("shape", [(33, 1000), (7, 65), (1, 1), (2, 2**16), (2, 2**16 + 4)])
@pytest.mark.parametrize("group_size", [64, 48])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_outliers_are_added_to_the_weight(isa, shape, group_size, bits):
    out_features, in_features = shape
    layer = random_layer(*shape, bits, group_size, bias=True)
    outliers = random_outliers(*shape, max(1, out_features * in_features // 50))
    sparse = stored(outliers, in_features)
    args = (*layer.stored, bits, group_size, in_features)
    weight = ops.dequantize(*args, *sparse)
    assert torch.equal(weight, dequantize_reference(*args, *sparse))
    dense = outliers.added_to(torch.zeros(shape))
    assert torch.equal(weight, ops.dequantize(*args) + dense)
    if (tiles := layer.tiles) is not None:
        assert torch.equal(ops.dequantize_tiled(tiles, *shape, *sparse), weight)
    x = random_inputs(MANY_TOKENS + 2, in_features)
    exact, error = layer.oracle(x)
    exact = exact + x.double() @ dense.double().T
    error += (in_features / 8 + 64) * 2**-24 * (x.double().abs() @ dense.double().abs().T)
    for n in (1, 3, len(x)):
        for run in (layer.linear, layer.plain_linear):
            got = run(x[:n], *sparse)
            assert ((got.double() - exact[:n]).abs() <= error[:n]).all()


def test_outliers_that_do_not_fit_are_refused(isa):
    layer = random_layer(4, 96, 4, 32)
    values, columns, rows = stored(random_outliers(4, 96, 9), 96)
    x = random_inputs(2, 96)

    def run(*sparse):
        ways = [
            lambda: ops.dequantize(*layer.stored, 4, 32, 96, *sparse),
            lambda: layer.plain_linear(x, *sparse),
        ]
        if (tiles := layer.tiles) is not None:
            ways.append(lambda: layer.linear(x, *sparse))
            ways.append(lambda: ops.dequantize_tiled(tiles, 4, 96, *sparse))
        failures = []
        for way in ways:
            try:
                way()
            except (LwquantError, ValueError) as error:
                failures.append(error)
        assert len(failures) in (0, len(ways))
        if failures:
            raise failures[-1]

    run(values, columns, rows)
    for sparse, message in (
        ((values, columns), "all three or none"),
        ((values.float(), columns, rows), "outlier_values is torch.float32"),
        ((values, columns.int(), rows), "outlier_columns is torch.int32, expected torch.int16"),
        ((values, columns[1:], rows), r"outlier_columns has shape \(8,\), expected \(9,\)"),
        ((values, columns, rows[1:]), r"outlier_rows has shape \(4,\), expected \(5,\)"),
    ):
        with pytest.raises(LwquantError, match=message):
            run(*sparse)
    # What a lying file can say: never read beyond the layer.
    for sparse in (
        (values, columns + 96, rows),
        (values, -columns - 1, rows),
        (values, columns, rows + 1),
        (values, columns, rows.flip(0)),
        (values, columns, torch.tensor([0, 12, 3, 4, 9], dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match="outliers"):
            run(*sparse)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_a_batch_cut_differently_gives_the_same_rows(isa, activation_bits):
    layer = random_layer(40, 192, 3, 64)
    x = random_inputs(12, 192)
    run = partial(layer.linear, activation_bits=activation_bits)
    for n in (1, 2, 3, 4, 5, 8):
        assert torch.equal(torch.cat([run(x[:n]), run(x[n:])]), run(x))
    whole = layer.linear(x)
    assert torch.equal(layer.linear(x.reshape(2, 3, 2, 192)), whole.reshape(2, 3, 2, 40))
    assert torch.equal(layer.linear(x[0]), whole[0])


def test_empty_batches_give_empty_results(isa):
    layer = random_layer(8, 64, 4, 32)
    for shape in ((0, 64), (3, 0, 64)):
        got = layer.linear(torch.empty(shape, dtype=torch.bfloat16))
        assert got.shape == (*shape[:-1], 8) and got.dtype == torch.bfloat16


def test_inputs_with_strides_are_read_as_they_are(isa):
    layer = random_layer(24, 128, 5, 64, bias=True)
    wide = random_inputs(6, 256)
    for view in (wide[:, ::2], wide[::2, :128], random_inputs(128, 4).T):
        assert not view.is_contiguous()
        assert torch.equal(layer.linear(view), layer.linear(view.contiguous()))


def test_without_tiles_it_goes_through_panels_of_any_size(isa, monkeypatch):
    monkeypatch.setattr("lwquant.ops.native.PANEL_BYTES", 4 * 200 * 17)  # 16 rows, the last has 8
    for group_size in (64, 48):
        layer = random_layer(40, 200, 3, group_size, bias=True)
        assert_within_bound(layer, random_inputs(MANY_TOKENS + 5, 200))


@pytest.mark.skipif(not ops.compiled(), reason="tiles are for the compiled kernels")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zeros", [{}, {"fine": True}, {"symmetric": True}], ids=str)
def test_tiles_hold_the_stored_layout_and_give_it_back(isa, bits, zeros):
    for out_features, in_features in SHAPES:
        for group_size in (32, 96, 10_000):
            layer = random_layer(out_features, in_features, bits, group_size, **zeros)
            back = ops.unmake_tiles(layer.tiles, layer.scheme, out_features, in_features)
            for got, wanted in zip(back, layer.stored, strict=True):
                assert got is wanted is None or torch.equal(got, wanted)


def test_tokens_in_several_blocks_keep_the_bound(isa):
    layer = random_layer(20, 8192, 2, 128)  # 32 tokens fill the half of a megabyte of a block
    assert_within_bound(layer, random_inputs(40, 8192), token_counts=(33,))


@pytest.mark.skipif(not ops.compiled(), reason="tiles are for the compiled kernels")
def test_tiles_that_do_not_fit_are_refused():
    layer = random_layer(8, 96, 4, 32)
    x, tiles, size = torch.zeros(2, 96), layer.tiles, len(layer.tiles)
    assert ops.linear_tiled(x, tiles, None, 8).shape == (2, 8)
    with pytest.raises(ValueError, match="outputs has 8, expected 9"):
        ops.linear_tiled(x, tiles, None, 9)
    with pytest.raises(ValueError, match="inputs has 96, expected 95"):
        ops.dequantize_tiled(tiles, 8, 95)
    for wrong in (tiles[:-1], tiles[:40], tiles.roll(1), torch.zeros(size, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="these are no tiles"):
            ops.linear_tiled(x, wrong, None, 8)
    with pytest.raises(LwquantError, match=r"expected \(bytes,\) uint8"):
        ops.linear_tiled(x, tiles.int(), None, 8)
    with pytest.raises(LwquantError, match=r"bias must be \(8,\)"):
        ops.linear_tiled(x, tiles, torch.zeros(7), 8)
    odd = random_layer(8, 96, 4, 48)
    assert odd.tiles is None
    with pytest.raises(LwquantError, match="no kernel for scheme 4b-g48"):
        ops.make_tiles(odd.scheme, 96, *odd.stored)


GOOD = {
    "x": torch.zeros(2, 100),
    "qweight": torch.zeros(8, 13, dtype=torch.int32),
    "scales": torch.zeros(8, 4, dtype=torch.float16),
    "zeros": torch.zeros(4, 1, dtype=torch.int32),
    "bias": torch.zeros(8),
    "bits": 4,
    "group_size": 32,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 100, dtype=torch.int64), "x must be .*int64"),
        ("x", torch.tensor(1.0), r"x must be .* got \(\)"),
        ("x", torch.zeros(2, 200), r"qweight has shape \(8, 13\), expected \(8, 25\)"),
        ("qweight", torch.zeros(8, 13), "qweight must be .* torch.int32, got .*float32"),
        ("qweight", torch.zeros(8, 12, dtype=torch.int32), r"qweight has .*expected \(8, 13\)"),
        ("scales", torch.zeros(8, 4), "scales is torch.float32, expected torch.float16"),
        ("scales", torch.zeros(8, 3).half(), r"scales has shape \(8, 3\), expected \(8, 4\)"),
        ("zeros", torch.zeros(1, 4, dtype=torch.int32), r"zeros has shape \(1, 4\), expected"),
        ("zeros", torch.zeros(4, 1), "zeros is torch.float32, expected torch.int32"),
        ("zeros", torch.zeros(4, 7).byte(), r"zeros has shape \(4, 7\), expected \(4, 8\)"),
        ("bias", torch.zeros(7), r"bias must be \(8,\)"),
        ("bits", 1, "bits=1 is not one of"),
        ("group_size", 0, "group_size=0 must be at least 1"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_with_what_was_expected(name, value, message):
    assert ops.linear(*GOOD.values()).shape == (2, 8)
    with pytest.raises(LwquantError, match=message):
        ops.linear(*(GOOD | {name: value}).values())
