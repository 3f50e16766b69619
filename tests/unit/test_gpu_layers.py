"""lwquant/ops/cuda from Python to the kernels and back, on a driver that runs them on the CPU.

The driver is a libcuda.so.1 made of tests/kernels, found by a process of its own; its memory is the
CPU's, so that CPU tensors stand for those of a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernel_properties import built, needs_compiler
from test_ops_linear import random_inputs, random_layer
from test_quantized_linear import random_weight

from lwquant import ops
from lwquant.errors import LwquantError
from lwquant.nn.linear import QuantizedLinear
from lwquant.ops.cuda import device, driver, nvrtc, tiled
from lwquant.scheme import QuantScheme

SCRIPT = """
import concurrent.futures
import sys
from unittest import mock

sys.path += sys.argv[1:]
from run_ptx import check_rounding
from test_ops_linear import random_inputs, random_layer
import torch
from lwquant.ops.cuda import driver, nvrtc, rounding, tiled


# With 3 bits the driver has 8-bit activations in groups of 64, 16-bit ones in the others, see
# emulated_modules.h; unpacking a weight takes either.
PLANES = {1: 2, 2: 1, 4: 2}


def code(kind, architecture):
    return f"{kind.bits} {PLANES[kind.span_blocks]} {kind.span_blocks}\\0".encode()


fake = mock.patch.multiple(
    tiled,
    compiled=code,
    architecture=str,
    index=lambda _: 1,
    stream=lambda _: 0,
    multiprocessors=lambda _: 3,
)
with fake:
    layer = random_layer(210, 200, 3, 64, bias=True)  # more tiles than a block has warps
    for n in (9, 33, 70):
        x = random_inputs(n, 200)
        exact, error = layer.oracle(x, 8)
        got = tiled.linear(x, layer.tiles, layer.bias, 210, 8)
        assert ((got.double() - exact).abs() <= error).all(), n
    for group_size, activation_bits in ((32, 16), (64, 8), (128, 16), (1000, 16)):
        layer = random_layer(40, 1000, 3, group_size, bias=True, fine=group_size == 64)
        tiles = layer.tiles
        weight = tiled.dequantize(tiles, 40, 1000)
        most = {8: 512, 16: 256}[activation_bits]
        for n in (1, 2, 9, 40, 65, most, most + 1):
            for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 1 if n == most else 3]:
                x = random_inputs(n, 1000).to(dtype)
                got = tiled.linear(x, tiles, layer.bias, 40, activation_bits)
                assert got.dtype == dtype and got.shape == (n, 40)
                exact, error = layer.oracle(x, activation_bits)
                unit = torch.finfo(dtype).eps / 2
                error += exact.abs() * unit
                if n > most:  # then the weight is rounded, and sums are of the dtype's product
                    error += (unit + 1000 * 2.0**-24) * (x.double().abs() @ weight.double().abs().T)
                worst = ((got.double() - exact).abs() / error).max().item()
                assert worst <= 1, (group_size, n, dtype, worst)
        steps = layer.codes.float() - layer.zero_points[:, layer.group]
        assert torch.equal(weight, steps * layer.scales.float()[:, layer.group])
    x = random_inputs(12, 1000).reshape(2, 3, 2, 1000)
    whole = tiled.linear(x.flatten(0, 2), layer.tiles, None, 40, 16)
    assert torch.equal(tiled.linear(x, layer.tiles, None, 40, 16).flatten(0, 2), whole)
    strided = x.mT.contiguous().mT
    assert torch.equal(tiled.linear(strided, layer.tiles, None, 40, 16).flatten(0, 2), whole)
    assert tiled.linear(x[:0], layer.tiles, None, 40, 16).shape == (0, 3, 2, 40)
    assert torch.allclose(tiled.linear(x[0, 0, 0], layer.tiles, None, 40, 16), whole[0], atol=1e-3)
    for size in ((39, 1000), (40, 999)):
        try:
            tiled._known.clear()
            tiled.on_gpu_of(layer.tiles, *size)
            raise SystemExit("tiles of another layer were taken")
        except ValueError as error:
            assert "40 x 1000" in str(error)
    try:
        tiled.linear(x, random_layer(40, 1000, 4, 64).tiles, None, 40, 16)
        raise SystemExit("kernels that are not there")
    except RuntimeError as error:
        assert "CUDA: no kernel image" in str(error)
    for image, device, words in ((b"9 1 1\\0", 0, "refused the kernels"), (b"", 2, "ordinal")):
        try:
            driver.kernels(image, device, nvrtc.KernelKind(3, 16, 1), 3)
            raise SystemExit("an error was taken for success")
        except RuntimeError as error:
            assert words in str(error)
    x = random_inputs(257, 1000)
    apart = tiled.linear(x, layer.tiles, None, 40, 16)
    with torch.autocast("cpu"):
        assert torch.equal(tiled.linear(x, layer.tiles, None, 40, 16), apart)
    tiles, others = layer.tiles, random_layer(40, 1000, 3, 1000, seed=1).tiles
    tiled.dequantize(tiles, 40, 1000)
    tiles.data = others
    same = tiled.dequantize(others, 40, 1000)
    assert torch.equal(tiled.dequantize(tiles, 40, 1000), same)
    made = []
    tiled._loaded.cache_clear()
    with mock.patch.object(tiled, "compiled", lambda *kind: made.append(kind) or code(*kind)):
        sizes = ((32, 16), (64, 8), (64, 8), (128, 16), (1000, 16))
        layers = [(random_layer(40, 1000, 3, size).tiles, bits) for size, bits in sizes]
        tiled.compile_ahead((tiled.on_gpu_of(each, 40, 1000), bits) for each, bits in layers)
        assert len(made) == len(set(made)) == 3
        for each, bits in layers:
            tiled.linear(x, each, None, 40, bits)
            tiled.dequantize(each, 40, 1000)  # by kernels that are there
        tiled.compile_ahead([])
        assert len(made) == 3
    # A thread of its own begins without a context.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        there = pool.submit(tiled.linear, x, layer.tiles, None, 40, 16).result()
    assert torch.equal(there, tiled.linear(x, layer.tiles, None, 40, 16))
on_gpu = mock.patch.multiple(
    rounding,
    compiled=lambda *_: b"rounding\\0",
    architecture=str,
    index=lambda _: 0,
    stream=lambda _: 0,
)
with on_gpu:
    check_rounding()
print("done")
"""


@needs_compiler
def test_layers_are_within_their_bound_from_python_to_the_kernels_and_back(tmp_path):
    built(tmp_path, "cuda", "-DCMAKE_CXX_FLAGS=-O1")
    environment = dict(os.environ, LD_LIBRARY_PATH=str(tmp_path), OMP_NUM_THREADS="1")
    folder = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(folder), str(folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver")
def test_without_a_driver_kernels_are_refused_with_what_is_missing():
    from lwquant.ops.cuda import driver

    with pytest.raises(ValueError, match=r"no NVIDIA driver: libcuda.so.1"):
        driver.kernels(b"", 0, nvrtc.KernelKind(4, 16, 4), 132)
    with pytest.raises(ValueError, match=r"no NVIDIA driver: libcuda.so.1"):
        driver.rounding(b"", 0)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(nvrtc, "SYSTEM_LIBRARIES", ())
    nvrtc.library.cache_clear()
    try:
        with pytest.raises(LwquantError, match=r'NVRTC .* pip install "lwquant\[cuda13\]"'):
            nvrtc.compile_kernels(nvrtc.KernelKind(4, 16, 4), "sm_90")
    finally:
        nvrtc.library.cache_clear()


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T4")
    with pytest.raises(LwquantError, match="NVIDIA T4 is sm_75"):
        tiled.architecture(0)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 6), "sm_86"), ((8, 7), "sm_86"), ((9, 0), "sm_90a"), ((10, 3), "sm_100")],
)
def test_a_gpu_gets_the_latest_code_of_its_generation(monkeypatch, capability, target):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(device, "supported", lambda: (80, 86, 89, 90, 100, 120))
    assert tiled.architecture(0) == target


def test_a_gpu_that_the_compiler_does_not_know_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (13, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X100")
    monkeypatch.setattr(device, "supported", lambda: (80, 86, 120))
    with pytest.raises(LwquantError, match="NVRTC does not know NVIDIA X100, sm_130"):
        tiled.architecture(0)


@pytest.mark.skipif(not nvrtc.found(), reason="NVRTC is missing")
def test_nvrtc_says_what_it_compiles_for():
    assert {80, 86, 89, 90, 100, 120} <= set(nvrtc.supported())


def test_importing_the_operators_loads_no_compiler():
    code = "import lwquant.ops.cuda.nvrtc as n; assert not n.library.cache_info().currsize"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiled_kind_is_read_from_the_cache_until_sources_change(monkeypatch, tmp_path):
    from lwquant.ops.cuda import cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "version", lambda: "13.0")
    calls = []

    def compile_once(kind, architecture):
        calls.append((kind, architecture))
        return nvrtc.CompiledKernels(cache.ELF + b"code", "", "")

    monkeypatch.setattr(cache, "compile_kernels", compile_once)
    kind = nvrtc.KernelKind(4, 16, 4)
    assert cache.compiled(kind, "sm_90") == cache.compiled(kind, "sm_90") == cache.ELF + b"code"
    assert len(calls) == 1
    for file in cache.folder().iterdir():
        file.write_bytes(b"")  # a machine that went down while it wrote
    assert cache.compiled(kind, "sm_90") == cache.compiled(kind, "sm_90") == cache.ELF + b"code"
    assert len(calls) == 2
    cache.compiled(kind, "sm_80")
    cache.compiled(nvrtc.KernelKind(3, 16, 4), "sm_90")
    monkeypatch.setattr(cache, "version", lambda: "13.1")
    cache.compiled(kind, "sm_90")
    assert len(calls) == 5
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot be written to
    assert cache.compiled(kind, "sm_90") == cache.ELF + b"code"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home is known
    assert cache.compiled(kind, "sm_90") == cache.ELF + b"code"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_products_on_a_gpu_are_within_their_bound(bits, activation_bits):
    layer = random_layer(70, 700, bits, 64, bias=True)
    tiles, bias = layer.tiles.cuda(), layer.bias.cuda()
    weight = ops.dequantize_tiled(tiles, 70, 700)
    assert torch.equal(weight.cpu(), ops.dequantize_tiled(layer.tiles, 70, 700))
    most = driver.most_tokens(activation_bits)
    for n in (1, 2, 8, 9, 17, 33, 65, most, most + 1):
        x = random_inputs(n, 700)
        exact, error = layer.oracle(x, activation_bits)
        if n > most:  # cuBLAS has the weight and x themselves
            error += 2**-24 * 702 * (x.double().abs() @ weight.cpu().double().abs().T)
        got = tiled.linear(x.cuda(), tiles, bias, 70, activation_bits)
        assert ((got.cpu().double() - exact).abs() <= error).all()


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 8, 65, 257])
def test_a_graph_computes_what_calls_do_and_keeps_its_tiles(n_tokens):
    weight = random_weight(QuantScheme(4, 64), 256, 512)
    layer = QuantizedLinear.from_weight(weight, torch.randn(256)).cuda()
    inputs = torch.randn(2, n_tokens, 512, device="cuda")
    wanted = [layer(x) for x in inputs]
    assert not torch.equal(*wanted)
    x, graph = torch.zeros_like(inputs[0]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    layer.to("cuda").float().state_dict()
    for each, expected in zip(inputs, wanted, strict=True):
        x.copy_(each)
        graph.replay()
        assert torch.equal(y, expected)
