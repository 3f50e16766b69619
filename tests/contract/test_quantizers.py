"""The laws of every quantizer, and GPTQ's and the grid's own oracles."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from oracles import obs_codes, proxy_loss

from lwquant.codebooks import CODEBOOKS
from lwquant.ops.scale_bytes import decode_scales, encode_scales
from lwquant.quantizers import QUANTIZERS, gptq, quantease, refuse_scheme, rtn
from lwquant.quantizers.gptq import inverse_cholesky
from lwquant.quantizers.grid import fit_grid, fit_line
from lwquant.scheme import WHOLE_ROW, QuantScheme
from lwquant.types import LayerStats

EVEN = [QuantScheme(bits, 16) for bits in (2, 3, 4, 5, 6, 8)]
FINE = [replace(scheme, fine_zeros=True) for scheme in EVEN]
TABLES = [QuantScheme(4, 32, codebook=codebook) for codebook in CODEBOOKS]
INT8_ROWS = QuantScheme(8, WHOLE_ROW, symmetric=True)


def takes(name, scheme):
    """Whether the quantizer says that it has codes for the scheme."""
    try:
        refuse_scheme(QUANTIZERS[name], scheme)
    except ValueError:
        return False
    return True


def cases(schemes):
    """Every listed quantizer with each of these schemes that it takes."""
    found = [(name, scheme) for name, scheme in product(QUANTIZERS, schemes) if takes(name, scheme)]
    ids = [f"{name}-{scheme.label}" for name, scheme in found]
    return pytest.mark.parametrize(("name", "scheme"), found, ids=ids)


OTHERS = [FINE[0], FINE[1], *TABLES, INT8_ROWS]
every_case = cases([*EVEN, *OTHERS])


def sparse_error(weight, rounded, hessian):
    """Σ |ΔW|^0.7, which HQQ fits; the data do not count."""
    return (rounded - weight).double().abs().pow(0.7).sum().item()


# What each quantizer must do no worse than plain rounding: the error on the data, unless it looks
# at none and fits another one.
OBJECTIVES = {name: proxy_loss for name in QUANTIZERS} | {"hqq": sparse_error}
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])


def make_layer(out_features=24, in_features=40, seed=0):
    """A weight and correlated inputs: what rounding one column wrong does, others can repair."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(4 * in_features, in_features, generator=generator) @ mixing
    return weight, LayerStats(inputs.T @ inputs, None, len(inputs))


def test_what_a_quantizer_takes_is_what_it_has_codes_for():
    weight, stats = make_layer()
    for name, scheme in product(QUANTIZERS, [*EVEN, *TABLES, INT8_ROWS]):
        if not takes(name, scheme):
            with pytest.raises(ValueError, match=rf"{scheme.label}.*bnb"):
                QUANTIZERS[name](weight, stats, scheme)
    assert [s for s in [*EVEN, *TABLES, INT8_ROWS] if takes("bnb", s)] == [*TABLES, INT8_ROWS]
    assert all(takes(name, scheme) for name in QUANTIZERS if name != "bnb" for scheme in EVEN)
    assert all(takes(name, scheme) for name in ("rtn", "gptq") for scheme in TABLES)


@every_case
def test_codes_are_in_range_and_shaped_like_the_weight(name, scheme):
    weight, stats = make_layer()
    got = QUANTIZERS[name](weight, stats, scheme)
    assert got.codes.shape == weight.shape and got.codes.dtype == torch.uint8
    assert got.codes.max() <= scheme.max_code
    n_groups = {16: 3, 32: 2, WHOLE_ROW: 1}[scheme.group_size]  # 40 = 16 + 16 + 8 = 32 + 8
    assert got.scales.shape == got.zeros.shape == (24, n_groups)


@cases(
    [
        *(QuantScheme(s.bits, 16, *how) for s in EVEN for how in product((False, True), (8, 16))),
        *(replace(scheme, scale_bits=bits) for scheme in [*TABLES, *FINE] for bits in (8, 16)),
    ]
)
def test_its_error_is_not_above_that_of_plain_rounding(name, scheme):
    weight, stats = make_layer()
    got = QUANTIZERS[name](weight, stats, scheme).dequantize()
    plain = rtn(weight, stats, scheme).dequantize()
    error = OBJECTIVES[name]
    allowed = error(weight, plain, stats.hessian) * (1 + 1e-6)
    assert error(weight, got, stats.hessian) <= allowed


@pytest.mark.parametrize("name", [n for n, error in OBJECTIVES.items() if error is not proxy_loss])
def test_only_a_quantizer_that_looks_at_no_data_has_an_error_of_its_own(name):
    weight, stats = make_layer()
    scheme = QuantScheme(3, 16)
    seeing, blind = (QUANTIZERS[name](weight, given, scheme) for given in (stats, None))
    assert torch.equal(seeing.dequantize(), blind.dequantize())


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_more_bits_mean_less_output_error(name, fine):
    weight, stats = make_layer()
    even = FINE if fine else EVEN
    menu = even if takes(name, even[0]) else [TABLES[0], INT8_ROWS]
    errors = [
        proxy_loss(weight, QUANTIZERS[name](weight, stats, s).dequantize(), stats.hessian)
        for s in menu
    ]
    assert errors == sorted(errors, reverse=True)


@cases(FINE[:3])
def test_fine_zeros_are_used_and_pay(name, scheme):
    weight, stats = make_layer(80)
    settings = {"search": True} if name == "rtn" else {}
    error, found = OBJECTIVES[name], {}
    for fine in (False, True):
        tried = replace(scheme, fine_zeros=fine)
        got = QUANTIZERS[name](weight, stats, tried, **settings)
        found[fine] = error(weight, got.dequantize(), stats.hessian)
    assert found[True] < 0.95 * found[False]
    between = got.zeros % round(1 / scheme.zero_step) != 0
    assert between.double().mean() > 0.8


@cases([QuantScheme(4, 16), *TABLES])
def test_weights_on_the_grid_are_unchanged(name, scheme):
    _, stats = make_layer(4, 64)
    values = torch.arange(16.0)
    if scheme.codebook:
        values = torch.tensor(CODEBOOKS[scheme.codebook])
    # A different step in each group, so that a grid shared between groups would show.
    halves = [[1, 1, 2, 2], [1, 2, 3, 4]][scheme.group_size == 16]
    on_grid = torch.cat([values * step for step in halves]).repeat(4, 1)
    got = QUANTIZERS[name](on_grid, stats, scheme).dequantize()
    torch.testing.assert_close(got, on_grid)


@cases([replace(s, scale_bits=b) for s in [EVEN[1], *OTHERS] for b in (8, 16)])
def test_rows_do_not_influence_each_other(name, scheme):
    weight, stats = make_layer()
    quantize = QUANTIZERS[name]
    whole = quantize(weight, stats, scheme).dequantize()
    changed = weight.clone()
    changed[5] *= -3
    other = quantize(changed, stats, scheme).dequantize()
    rest = [row for row in range(24) if row != 5]
    torch.testing.assert_close(other[rest], whole[rest])
    assert not torch.equal(other[5], whole[5])


@every_case
def test_arguments_are_left_alone(name, scheme):
    weight, stats = make_layer()
    before = weight.clone(), stats.hessian.clone()
    QUANTIZERS[name](weight, stats, scheme)
    assert torch.equal(weight, before[0]) and torch.equal(stats.hessian, before[1])


@every_case
def test_zero_weights_and_silent_inputs_give_zero_and_finite_results(name, scheme):
    weight, stats = make_layer()
    quantize = QUANTIZERS[name]
    assert not quantize(torch.zeros_like(weight), stats, scheme).dequantize().any()
    silent = stats.hessian.clone()
    silent[3], silent[:, 3] = 0, 0
    assert quantize(weight, LayerStats(silent, None, 1), scheme).dequantize().isfinite().all()
    nothing = LayerStats(torch.zeros_like(silent), None, 1)
    got = quantize(weight, nothing, scheme).dequantize()
    assert (got - weight).abs().max() < weight.abs().max()


@every_case
def test_scales_of_eight_bits_can_be_written(name, scheme):
    weight, stats = make_layer()
    weight[3, :16] *= 1e4  # far beyond what the other groups of its row need
    got = QUANTIZERS[name](weight, stats, replace(scheme, scale_bits=8))
    assert torch.equal(decode_scales(encode_scales(got.scales)), got.scales)


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n not in ("quantease", "bnb")])
def test_a_scheme_with_outliers_is_refused_with_the_quantizer_that_takes_it(name):
    weight, stats = make_layer()
    with pytest.raises(ValueError, match=r"3b-g16-o5 has outliers.*quantease"):
        QUANTIZERS[name](weight, stats, QuantScheme(3, 16, outliers=5))


@every_case
def test_scales_beyond_float16_are_refused(name, scheme):
    weight, stats = make_layer()
    with pytest.raises(ValueError, match="overflows float16"):
        QUANTIZERS[name](weight * 1e8, stats, scheme)


@every_width
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.35])
def test_gptq_matches_column_by_column_least_squares(bits, act_order, shrinkage):
    weight, stats = make_layer(6, 20)
    scheme = QuantScheme(bits, 8)
    got = gptq(weight, stats, scheme, damping=0.02, shrinkage=shrinkage, act_order=act_order)
    damped = stats.hessian + 0.02 * stats.hessian.diagonal().mean() * torch.eye(20)
    for row, column in product(range(20), repeat=2):
        if row != column:
            damped[row, column] *= 1 - shrinkage
    expand = torch.arange(20) // 8
    order = list(range(20))
    if act_order:
        order = torch.argsort(stats.hessian.diagonal(), descending=True).tolist()
    wanted = obs_codes(
        weight,
        damped,
        got.scales.float()[:, expand],
        got.zeros.float()[:, expand],
        scheme.max_code,
        order,
    )
    # float32 against float64: a value within rounding error of a tie may fall on the other side
    assert (got.codes.double() != wanted).float().mean() <= 0.01


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_gptq_matches_column_by_column_least_squares_on_the_values_of_a_table(codebook):
    weight, stats = make_layer(6, 140)  # more than a lazy block
    scheme = QuantScheme(4, 32, codebook=codebook)
    got = gptq(weight, stats, scheme)
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(140)
    expand = torch.arange(140) // 32
    scales, zeros = got.scales.float()[:, expand], got.zeros.float()[:, expand]
    order = torch.argsort(stats.hessian.diagonal(), descending=True).tolist()
    wanted = obs_codes(weight, damped, scales, zeros, 15, order, CODEBOOKS[codebook])
    # As above; and 0 has two codes in fp4, of which either will do.
    values = torch.tensor(CODEBOOKS[codebook])
    assert (got.steps() != values[wanted.long()]).float().mean() <= 0.02
    with_terms = gptq(weight, stats, scheme, first_order=1e-9)
    assert torch.equal(with_terms.codes, got.codes)


def test_gptq_crosses_its_lazy_blocks_without_a_seam():
    weight, stats = make_layer(3, 300, seed=1)
    scheme = QuantScheme(3, 64)
    got = gptq(weight, stats, scheme, act_order=False)
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(300)
    expand = torch.arange(300) // 64
    scales, zeros = got.scales.float()[:, expand], got.zeros.float()[:, expand]
    wanted = obs_codes(weight, damped, scales, zeros, scheme.max_code, list(range(300)))
    assert (got.codes.double() != wanted).float().mean() <= 0.02


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
@pytest.mark.parametrize("quantizer", [gptq, quantease])
def test_a_shrinkage_that_is_no_share_is_refused(quantizer, shrinkage):
    weight, stats = make_layer()
    with pytest.raises(ValueError, match=f"shrinkage={shrinkage} must be between 0 and 1"):
        quantizer(weight, stats, QuantScheme(3, 16), shrinkage=shrinkage)


def test_gptq_with_a_diagonal_hessian_is_plain_rounding_on_the_same_grid():
    weight, _ = make_layer()
    diagonal = LayerStats(torch.diag(torch.rand(40) + 0.5), None, 1)
    scheme = QuantScheme(3, 16)
    got = gptq(weight, diagonal, scheme)
    grid = fit_grid(weight, scheme, diagonal.hessian.diagonal())
    assert torch.equal(got.codes, grid.round(weight).byte())


def test_a_singular_hessian_raises_the_damping_and_says_so():
    weight, _ = make_layer(4, 16)
    negative = torch.eye(16)
    negative[0, 0] = -0.5  # indefinite, as sums in low precision can become
    got = gptq(weight, LayerStats(negative, None, 1), QuantScheme(4, 16))
    assert len(got.notes) == 1 and "damping raised from 0.01 to 1" in got.notes[0]
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_cholesky(torch.diag(torch.tensor([-1e6, 1.0, 1e6, 1.0])), 0.01)
    with pytest.raises(ValueError, match="NaN or Inf"):
        inverse_cholesky(torch.full((4, 4), float("nan")), 0.01)


def test_gptaq_without_drift_is_gptq_and_with_drift_comes_closer_to_the_float_output():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 32, generator=generator)
    mixing = torch.randn(32, 32, generator=generator)
    floats = torch.randn(400, 32, generator=generator) @ mixing
    inputs = floats + 0.3 * torch.randn(400, 32, generator=generator) @ mixing
    hessian, drift = inputs.T @ inputs, (floats - inputs).T @ inputs
    scheme = QuantScheme(4, 32)
    plain = gptq(weight, LayerStats(hessian, None, 400), scheme)
    still = gptq(weight, LayerStats(hessian, torch.zeros_like(drift), 400), scheme, asymmetry=1.0)
    assert torch.equal(plain.codes, still.codes)
    moved = gptq(weight, LayerStats(hessian, drift, 400), scheme, asymmetry=1.0)

    def output_error(quantized):
        return (floats @ weight.T - inputs @ quantized.dequantize().T).square().sum()

    assert output_error(moved) < 0.97 * output_error(plain)
    with pytest.raises(ValueError, match="drift"):
        gptq(weight, LayerStats(hessian, None, 400), scheme, asymmetry=0.25)


def first_order_oracle(weight, hessian, scales, zeros, max_code, strength):
    """FOEM from its Taylor expansion: given that column c moves by q − w, the others minimize
    β (w − w₀) H δᵀ + ½ δ H δᵀ; of their drift −β (w − w₀) each takes its own when its turn comes.
    """
    original = weight.double()
    latent = original.clone()
    codes = torch.empty_like(latent)
    for column in range(weight.shape[1]):
        target = latent[:, column] - strength * (latent[:, column] - original[:, column])
        steps = target / scales[:, column].double() + zeros[:, column].double()
        codes[:, column] = steps.round().clamp(0, max_code)
        got = (codes[:, column] - zeros[:, column]) * scales[:, column]
        inverse = torch.linalg.inv(hessian.double()[column:, column:])
        moved = got - target + strength * (target - original[:, column])
        latent[:, column + 1 :] += moved[:, None] * inverse[0, 1:] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("strength", [0.1, 0.5])
@pytest.mark.parametrize("in_features", [20, 150])  # one lazy block, and two
def test_the_first_order_term_matches_its_definition(bits, strength, in_features):
    weight, stats = make_layer(6, in_features)
    scheme = QuantScheme(bits, 8)
    got = gptq(weight, stats, scheme, act_order=False, first_order=strength)
    ridge = 0.01 * stats.hessian.diagonal().mean() * torch.eye(in_features)
    expand = torch.arange(in_features) // 8
    scales, zeros = got.scales.float()[:, expand], got.zeros.float()[:, expand]
    damped = stats.hessian + ridge
    wanted = first_order_oracle(weight, damped, scales, zeros, scheme.max_code, strength)
    assert (got.codes.double() != wanted).float().mean() <= 0.02
    assert not torch.equal(got.codes, gptq(weight, stats, scheme, act_order=False).codes)


def test_the_first_order_term_leads_from_gptq_to_plain_rounding():
    weight, stats = make_layer()
    scheme = QuantScheme(3, 16)
    # Nearly nothing: the other loop, the same codes.
    least = gptq(weight, stats, scheme, first_order=1e-9)
    assert torch.equal(least.codes, gptq(weight, stats, scheme).codes)
    full = gptq(weight, stats, scheme, first_order=1.0)
    grid = fit_grid(weight, scheme, stats.hessian.diagonal())
    assert torch.equal(full.codes, grid.round(weight).byte())
    half = gptq(weight, stats, scheme, first_order=0.5).dequantize()
    moves = [(w.dequantize() - weight).norm() for w in (full, least)]
    assert moves[0] < (half - weight).norm() < moves[1]
    with pytest.raises(ValueError, match=r"first_order=1\.5"):
        gptq(weight, stats, scheme, first_order=1.5)


def test_both_extra_terms_of_gptq_work_together():
    weight, stats = make_layer()
    scheme = QuantScheme(3, 16)
    drifted = LayerStats(stats.hessian, 0.1 * stats.hessian, stats.n_tokens)
    pulled = gptq(weight, drifted, scheme, asymmetry=0.5)
    same = gptq(weight, drifted, scheme, asymmetry=0.5, first_order=1e-9)
    assert torch.equal(pulled.codes, same.codes)
    both = gptq(weight, drifted, scheme, asymmetry=0.5, first_order=0.3)
    alone = gptq(weight, drifted, scheme, first_order=0.3)
    assert not torch.equal(both.codes, alone.codes) and not torch.equal(both.codes, pulled.codes)


@every_width
def test_plain_rounding_errs_by_at_most_half_a_step_inside_the_range(bits):
    weight, stats = make_layer()
    scheme = QuantScheme(bits, 40)
    got = rtn(weight, stats, scheme)
    # min and max are on the grid up to the rounding of the zero point, half a step, and of the
    # scale to float16, 2⁻¹¹ of the range.
    allowed = got.scales.float() * (1.0 + 2**bits * 2**-11)
    assert ((got.dequantize() - weight).abs() <= allowed).all()
    inside = (got.codes > 0) & (got.codes < scheme.max_code)
    error = (got.dequantize() - weight).abs() / got.scales.float()
    assert error[inside].max() <= 0.5 + 1e-3


@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_for_fine_zeros_is_almost_as_good_as_trying_every_grid(bits):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(30, 24, generator=generator)
    rows[:10] += 0.8  # ends that differ
    rows[10:15, 3] *= 5
    importance = torch.rand(24, generator=generator)
    scheme = QuantScheme(bits, 24, fine_zeros=True)

    def errors(scales, zeros):
        steps = (rows / scales + zeros).round().clamp(0, scheme.max_code)
        return (((steps - zeros) * scales - rows).square() * importance).sum(1)

    widest = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / scheme.max_code
    tries = [
        errors(widest * share, byte * scheme.zero_step)
        for share in torch.linspace(0.25, 1.1, 80).tolist()
        for byte in range(0, 256, 2)
    ]
    best = torch.stack(tries).amin(0)
    grid = fit_grid(rows, scheme, importance)
    ratios = errors(grid.scales, grid.zeros) / best
    assert ratios.mean() < 1.02 and ratios.max() < 1.2
    whole = fit_grid(rows, QuantScheme(bits, 24), importance)
    assert (errors(whole.scales, whole.zeros) / best).mean() > 1.15


@pytest.mark.parametrize("bits", [2, 5])
def test_a_fitted_line_is_the_least_squares_one(bits):
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme(bits, 16, fine_zeros=True)
    codes = torch.randint(scheme.max_code + 1, (6, 16), generator=generator).float()
    values = 0.3 * (codes - 1.3) + 0.05 * torch.randn(6, 16, generator=generator)
    importance = torch.rand(6, 16, generator=generator)
    importance[:, 14:] = 0
    values[:, 14:] = 100.0  # not looked at
    scale, zero = fit_line(values, codes, importance, torch.ones(6, 1), scheme)
    for row in range(6):
        root = importance[row].double().sqrt()[:, None]
        unknowns = torch.stack([codes[row], torch.ones(16)], 1).double()
        slope, offset = torch.linalg.lstsq(root * unknowns, root * values[row].double()[:, None])[0]
        assert scale[row].item() == pytest.approx(slope.item(), rel=2**-11)
        wanted = -offset / scale[row].item()
        assert zero[row].item() == pytest.approx(wanted.item(), abs=0.51 * scheme.zero_step)
    falling, _ = fit_line(-values, codes, importance, torch.full((6, 1), 0.5), scheme)
    assert torch.equal(falling, torch.full((6, 1), 0.5))


def test_the_grid_search_finds_what_trying_every_range_finds():
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(1, 32, generator=generator)
    row[0, 7] = 6.0  # an outlier that is worth clipping at 2 bits
    importance = torch.rand(32, generator=generator)
    scheme = QuantScheme(2, 32)

    def error(grid):
        codes = grid.round(row)
        rounded = (codes - grid.zeros) * grid.scales
        return ((rounded - row).square() * importance).sum().item()

    searched, plain = fit_grid(row, scheme, importance), fit_grid(row, scheme, search=False)
    best = min(
        error(fit_grid(row.clamp(row.min() * s, row.max() * s), scheme, search=False))
        for s in torch.linspace(0.3, 1, 200).tolist()
    )
    assert error(searched) < 0.95 * error(plain)
    assert error(searched) <= best * 1.05


def test_settings_reach_the_grid():
    weight, stats = make_layer()
    scheme = QuantScheme(2, 16)
    searched = partial(rtn, search=True)(weight, stats, scheme).dequantize()
    assert (searched - weight).square().sum() < (
        rtn(weight, stats, scheme).dequantize() - weight
    ).square().sum()
