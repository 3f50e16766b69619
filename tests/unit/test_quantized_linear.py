"""QuantizedLinear: the module around the packed operators."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lwquant import ops
from lwquant.codebooks import CODEBOOKS
from lwquant.errors import LwquantError
from lwquant.nn.linear import QuantizedLinear, stored_scales
from lwquant.nn.packed import compile_kernels
from lwquant.quantizers.grid import in_window, storable_scale
from lwquant.scheme import QuantScheme
from lwquant.types import Outliers, QuantizedWeight

SCHEMES = [
    QuantScheme(2, 32),
    QuantScheme(3, 64),
    QuantScheme(5, 48),
    QuantScheme(8, 1000),
    QuantScheme(4, 64, symmetric=True),
    QuantScheme(3, 64, scale_bits=8),
    QuantScheme(4, 64, codebook="nf4"),
    QuantScheme(4, 32, scale_bits=8, codebook="fp4"),
    QuantScheme(3, 64, scale_bits=8, fine_zeros=True),
    QuantScheme(4, 32, outliers=20),
]
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)


def random_weight(scheme: QuantScheme, out_features: int = 24, in_features: int = 100):
    shape = (out_features, scheme.n_groups(in_features))
    zeros = torch.randint(0, scheme.max_zero + 1, shape, dtype=torch.uint8)
    return QuantizedWeight(
        scheme=scheme,
        codes=torch.randint(0, 2**scheme.bits, (out_features, in_features), dtype=torch.uint8),
        scales=in_window(storable_scale(torch.rand(shape) * 0.1 + 1e-6, scheme), scheme).half(),
        zeros=torch.full_like(zeros, 2 ** (scheme.bits - 1)) if scheme.symmetric else zeros,
        outliers=random_outliers(scheme, out_features, in_features) if scheme.outliers else None,
    )


def random_outliers(scheme: QuantScheme, out_features: int, in_features: int) -> Outliers:
    n = scheme.n_outliers(out_features, in_features)
    return Outliers.largest(torch.randn(out_features, in_features), n)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@by_label
def test_it_computes_with_the_dequantized_weight(scheme):
    quantized = random_weight(scheme)
    bias = torch.randn(24)
    layer = QuantizedLinear.from_weight(quantized, bias)
    assert torch.equal(layer.dequantize(), quantized.dequantize())
    x = torch.randn(2, 3, 100)
    wanted = F.linear(x, quantized.dequantize(), bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert torch.equal(layer.dequantize(), quantized.dequantize())


@by_label
def test_an_empty_layer_has_the_tensors_that_a_state_dict_fills(scheme):
    full = QuantizedLinear.from_weight(random_weight(scheme), torch.randn(24))
    empty = QuantizedLinear(100, 24, scheme, bias=True)
    names = {"qweight", "scales", "bias"} | (set() if scheme.symmetric else {"zeros"})
    if scheme.outliers:
        names |= {"outlier_values", "outlier_columns", "outlier_rows"}
    assert set(empty.state_dict()) == names
    empty.load_state_dict(full.state_dict())
    assert_same_state(empty, full)
    on_meta = QuantizedLinear(100, 24, scheme, bias=True, device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in on_meta.state_dict().values())
    assert on_meta.bias.dtype == torch.bfloat16
    on_meta.load_state_dict(full.state_dict(), assign=True)
    assert_same_state(on_meta, full)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.codebook], ids=lambda s: s.label)
def test_codes_of_a_codebook_stand_for_its_values_times_the_scale_of_their_group(scheme):
    quantized = random_weight(scheme)
    layer = QuantizedLinear.from_weight(quantized, None)
    values, weight = CODEBOOKS[scheme.codebook], layer.dequantize()
    for row, column in ((0, 0), (5, 64), (23, 99)):
        scale = quantized.scales[row, column // scheme.group_size].item()
        value = values[quantized.codes[row, column]] * scale
        assert weight[row, column].item() == pytest.approx(value, rel=1e-6)
    x = torch.randn(3, 100, dtype=torch.bfloat16)
    wanted = (x.float() @ weight.T).bfloat16()
    assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), wanted)


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        nn.Module.float,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.bfloat16().float(),
    ],
)
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_changing_the_dtype_of_a_model_leaves_scales_and_outliers_as_stored(move, scale_bits):
    quantized = random_weight(QuantScheme(3, 64, scale_bits=scale_bits, outliers=20))
    model = nn.Sequential(QuantizedLinear.from_weight(quantized, torch.randn(24)))
    expected = move(nn.Linear(1, 1)).weight.dtype
    move(model)
    layer = model[0]
    stored = stored_scales(quantized)
    assert layer.scales.dtype == stored.dtype and torch.equal(layer.scales, stored)
    assert torch.equal(layer.outlier_values, quantized.outliers.values)
    assert layer.outlier_values.dtype == torch.float16
    assert torch.equal(layer.dequantize(), quantized.dequantize())
    assert layer.bias.dtype == expected


def test_moving_to_meta_and_back_by_to_empty_keeps_names_and_dtypes():
    layer = QuantizedLinear.from_weight(random_weight(SCHEMES[0]), None)
    dtypes = {name: t.dtype for name, t in layer.state_dict().items()}
    moved = layer.to("meta").to_empty(device="cpu")
    assert {name: t.dtype for name, t in moved.state_dict().items()} == dtypes


@by_label
def test_copies_and_saved_files_hold_the_same_tensors(scheme):
    layer = QuantizedLinear.from_weight(random_weight(scheme), torch.randn(24))
    twin = copy.deepcopy(layer)
    assert_same_state(twin, layer)
    twin.qweight.zero_()
    assert layer.qweight.any()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = QuantizedLinear(100, 24, scheme, bias=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 100)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[6], SCHEMES[-1]], ids=lambda s: s.label)
def test_compiled_in_one_graph_it_gives_the_same_result(scheme):
    layer = QuantizedLinear.from_weight(random_weight(scheme), torch.randn(24))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 100)
    with torch.no_grad():
        before = compiled(x)  # tracing leaves the layout as it is
        assert layer.qweight is not None
        wanted = layer(x)
        torch.testing.assert_close(before, wanted, rtol=1e-3, atol=1e-2)
        assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("scheme", [SCHEMES[2], SCHEMES[6], SCHEMES[-1]], ids=lambda s: s.label)
def test_gradients_pass_through_to_earlier_layers(scheme):
    quantized = random_weight(scheme)
    layer = QuantizedLinear.from_weight(quantized, torch.randn(24))
    x = torch.randn(2, 100, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, quantized.dequantize().sum(0).expand(2, -1))


tiled = pytest.mark.skipif(not ops.compiled(), reason="tiles are for the compiled kernels")


@tiled
@by_label
def test_the_first_call_lays_it_out_for_the_kernels_and_what_is_saved_stays_the_same(scheme):
    bias = torch.randn(24).bfloat16().float()
    layer = QuantizedLinear.from_weight(random_weight(scheme), bias)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 100)
    wanted = layer(x)
    laid_out = layer.qweight is None
    assert laid_out == (not scheme.codebook and scheme.group_size != 48)
    if laid_out:
        assert layer.scales is None and layer.zeros is None
        assert not layer.dequantize().equal(torch.zeros(24, 100))
    tiles = layer.tiles
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert layer.tiles is tiles and (layer.qweight is None) == laid_out
    for change in (
        lambda: copy.deepcopy(layer),
        lambda: pickle.dumps(layer),
        lambda: layer.to(torch.float32),
        lambda: layer.to("cpu"),
        layer.bfloat16,
        layer.float,
    ):
        change()
        assert layer.tiles is tiles and (layer.qweight is None) == laid_out
    twin = copy.deepcopy(layer)
    assert twin.qweight is not None and twin.tiles is None
    assert torch.equal(twin.to(torch.float32)(x), wanted)
    assert pickle.loads(pickle.dumps(layer)).qweight.equal(before["qweight"])
    layer.load_state_dict(before)
    assert layer.qweight is not None and layer.tiles is None
    assert torch.equal(layer(x), wanted)


@tiled
def test_a_layer_that_moves_is_laid_out_again_there_before_it_is_called():
    layer = QuantizedLinear.from_weight(random_weight(SCHEMES[0]), torch.randn(24))
    x = torch.randn(2, 100)
    wanted = layer(x)
    before = layer.tiles
    # No second device is here: what it asks about is told to move, and its tensors stay.
    layer._apply(lambda tensor: tensor if tensor.numel() else tensor.to("meta"))
    assert layer.tiles is not before and layer.qweight is None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), wanted)
    layer.to("meta")
    assert layer.tiles is None and layer.qweight.is_meta


@tiled
def test_kernels_of_all_layers_that_have_some_are_compiled_with_their_activations(monkeypatch):
    wanted = []
    monkeypatch.setattr(ops, "compile_ahead", wanted.extend)
    schemes = QuantScheme(3, 64), QuantScheme(4, 64), QuantScheme(4, 48)  # none for the last
    layers = [QuantizedLinear.from_weight(random_weight(scheme), None) for scheme in schemes]
    layers[1].activation_bits = 8
    compile_kernels(nn.Sequential(nn.ReLU(), *layers))
    assert [bits for _, bits in wanted] == [16, 8]
    assert [
        kernel.tiles is layer.tiles for (kernel, _), layer in zip(wanted, layers[:2], strict=True)
    ] == [True] * 2


@tiled
def test_its_buffers_are_all_that_it_keeps_in_memory():
    scheme = QuantScheme(3, 64, scale_bits=8)
    layer = QuantizedLinear.from_weight(random_weight(scheme), None)
    stored = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored == sum(tensor.nbytes for tensor in layer.state_dict().values())
    layer(torch.randn(2, 100))
    laid_out = [buffer.nbytes for buffer in layer.buffers()]
    assert laid_out == [ops.tiles_bytes(scheme, 24, 100)]
    layer.restore()
    assert sum(buffer.nbytes for buffer in layer.buffers()) == stored


@tiled
@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 1, 100), (0, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_it_computes_the_same_past_the_dispatcher(shape, dtype):
    layer = QuantizedLinear.from_weight(random_weight(SCHEMES[-1]), torch.randn(24))
    x = torch.randn(shape).to(dtype)
    wanted = layer(x)
    with torch.no_grad():
        got = layer(x)
        strided = torch.randn(5, 200)[:, ::2].to(dtype)
        assert torch.equal(layer(strided), layer(strided.contiguous()))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            assert layer(fake.from_tensor(x)).shape == wanted.shape
    assert got.dtype == dtype and not got.requires_grad and torch.equal(got, wanted)
    assert wanted.requires_grad and wanted.grad_fn is not None  # of the bias


@tiled
@torch.no_grad()
def test_past_the_dispatcher_the_same_is_refused():
    layer = QuantizedLinear.from_weight(random_weight(QuantScheme(3, 64)), torch.randn(24))
    x = torch.randn(2, 100)
    wanted = layer(x)
    with pytest.raises(LwquantError, match="x must be"):
        layer(x.double())
    with pytest.raises(ValueError, match="inputs has 100, expected 99"):
        layer(x[:, :99])
    strided = torch.randn(48)
    expected = wanted - layer.bias + strided[::2]
    layer.bias = nn.Parameter(strided[::2])
    assert not layer.bias.is_contiguous()
    torch.testing.assert_close(layer(x), expected)
    layer.bias = nn.Parameter(torch.randn(23))
    with pytest.raises(LwquantError, match=r"bias must be \(24,\)"):
        layer(x)


@tiled
def test_loading_another_weight_replaces_the_one_laid_out():
    scheme = QuantScheme(3, 64)
    layer, other = (QuantizedLinear.from_weight(random_weight(scheme), None) for _ in range(2))
    x = torch.randn(2, 100)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@tiled
def test_threads_that_call_it_first_lay_it_out_once():
    layer = QuantizedLinear.from_weight(random_weight(QuantScheme(4, 64), 512, 640), None)
    x = torch.randn(1, 640)
    wanted = copy.deepcopy(layer)(x)
    results = []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, wanted) for result in results)


def test_the_stored_bytes_are_those_the_scheme_promises():
    for scheme in SCHEMES:
        layer = QuantizedLinear.from_weight(random_weight(scheme), None)
        stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        assert stored * 8 == scheme.stored_bits(24, 100)


def test_it_says_what_it_is():
    layer = QuantizedLinear(100, 24, QuantScheme(3, 64), bias=False)
    assert repr(layer) == (
        "QuantizedLinear(in_features=100, out_features=24, scheme=3b-g64, activations=16b,"
        " bias=False)"
    )


def wrong_zeros() -> QuantizedWeight:
    good = random_weight(QuantScheme(4, 64, symmetric=True))
    return QuantizedWeight(good.scheme, good.codes, good.scales, good.zeros + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantizedLinear(8, 8, QuantScheme(16), bias=False), "16b is not a packed one"),
        (lambda: QuantizedLinear(0, 8, QuantScheme(4), bias=False), "0 inputs, 8 outputs is empty"),
        (lambda: QuantizedLinear.from_weight(wrong_zeros(), None), "not every zero is 8"),
        (lambda: load_scales(torch.zeros(8, 1)), "scales is torch.float32, expected torch.float16"),
        (lambda: load_values(torch.zeros(16)), "outlier_values is torch.float32, expected"),
    ],
)
def test_what_cannot_be_stored_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def load_values(values: Tensor) -> None:
    layer = QuantizedLinear.from_weight(random_weight(SCHEMES[-1]), None)
    layer.load_state_dict(layer.state_dict() | {"outlier_values": values})


def load_scales(scales: Tensor) -> None:
    layer = QuantizedLinear(8, 8, QuantScheme(4, 64), bias=False)
    layer.load_state_dict(layer.state_dict() | {"scales": scales})
