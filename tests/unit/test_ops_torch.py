"""The operators as torch sees them: tracing, gradients, threads, forks, memory."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lwquant import ops
from lwquant.ops import huge_pages, native
from lwquant.ops.reference import linear_reference
from lwquant.scheme import QuantScheme

Layer = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_layer(out_features: int, in_features: int, bits: int, group_size: int) -> Layer:
    n_groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (n_groups, out_features), dtype=torch.uint8)
    scales = torch.rand(out_features, n_groups).half()
    return ops.pack(codes, bits), scales, ops.pack(zeros, bits)


def tiled(layer: Layer, bits: int, group_size: int, in_features: int) -> Tensor:
    if not ops.compiled():
        pytest.skip("tiles are for the compiled kernels")
    return ops.make_tiles(QuantScheme(bits, group_size), in_features, *layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_their_promises_to_torch(dtype):
    qweight, scales, zeros = random_layer(8, 40, 3, 32)
    x, bias = torch.randn(2, 3, 40, dtype=dtype), torch.randn(8)
    torch.library.opcheck(torch.ops.lwquant.pack, (torch.zeros(2, 5, dtype=torch.uint8), 3))
    torch.library.opcheck(torch.ops.lwquant.unpack, (qweight, 3, 40))
    torch.library.opcheck(torch.ops.lwquant.dequantize, (qweight, scales, zeros, 3, 32, 40))
    torch.library.opcheck(torch.ops.lwquant.linear, (x, qweight, scales, zeros, bias, 3, 32))
    x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.lwquant.linear, (x, qweight, scales, None, bias, 3, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_on_tiles_keep_theirs(dtype):
    tiles = tiled(random_layer(8, 40, 3, 32), 3, 32, 40)
    x, bias = torch.randn(2, 3, 40, dtype=dtype), torch.randn(8)
    torch.library.opcheck(torch.ops.lwquant.dequantize_tiled, (tiles, 8, 40))
    torch.library.opcheck(torch.ops.lwquant.linear_tiled, (x, tiles, bias, 8))
    wanted = torch.ops.lwquant.linear_tiled(x, tiles, bias, 8)
    narrow = (x, tiles, bias, 8, None, None, None, 8)
    torch.library.opcheck(torch.ops.lwquant.linear_tiled, narrow)
    assert not torch.ops.lwquant.linear_tiled(*narrow).equal(wanted)
    with pytest.raises(ValueError, match="activation_bits=4 is not 8 or 16"):
        torch.ops.lwquant.linear_tiled(*narrow[:-1], 4)
    x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.lwquant.linear_tiled, (x, tiles, bias, 8))


@pytest.mark.parametrize("on_tiles", [False, True])
def test_compiling_leaves_the_result_as_it_is(on_tiles):
    layer = random_layer(16, 64, 4, 32)
    tiles = tiled(layer, 4, 32, 64) if on_tiles else None

    def two_calls(x: Tensor) -> Tensor:
        if tiles is not None:
            return ops.linear_tiled(x.relu(), tiles, None, 16) * 2 + 1
        return ops.linear(x.relu(), *layer, None, 4, 32) * 2 + 1

    compiled = torch.compile(two_calls, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_tokens in (1, 5):
        x = torch.randn(n_tokens, 64)
        assert torch.equal(compiled(x), two_calls(x))


def test_gradients_are_those_of_the_dequantized_weight():
    layer = random_layer(6, 40, 3, 32)
    x = torch.randn(2, 3, 40, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    direction = torch.randn(2, 3, 6)
    expected = torch.autograd.grad(linear_reference(x, *layer, bias, 3, 32), (x, bias), direction)
    got = torch.autograd.grad(ops.linear(x, *layer, bias, 3, 32), (x, bias), direction)
    torch.testing.assert_close(got, expected)
    tiles = tiled(layer, 3, 32, 40)
    got = torch.autograd.grad(ops.linear_tiled(x, tiles, bias, 6), (x, bias), direction)
    torch.testing.assert_close(got, expected)


def test_python_threads_and_kernel_threads_do_not_disturb_each_other(two_threads):
    # Large enough that most of each call is spent in the kernel, at the same time as others.
    layers = [tiled(random_layer(4096, 1024, bits, 64), bits, 64, 1024) for bits in (2, 4, 8)]
    inputs = [torch.randn(2, 1024) for _ in layers]
    torch.set_num_threads(1)
    expected = [
        ops.linear_tiled(x, tiles, None, 4096) for x, tiles in zip(inputs, layers, strict=True)
    ]
    torch.set_num_threads(2)
    wrong: list[int] = []

    def repeat(which: int) -> None:
        for _ in range(50):
            got = ops.linear_tiled(inputs[which], layers[which], None, 4096)
            if not torch.equal(got, expected[which]):
                wrong.append(which)

    workers = [threading.Thread(target=repeat, args=(i % 3,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_although_the_helpers_stayed_with_the_parent(two_threads):
    tiles = tiled(random_layer(1024, 512, 4, 64), 4, 64, 512)
    x = torch.randn(1, 512)
    expected = ops.linear_tiled(x, tiles, None, 1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forking with threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # rather than wait for helpers for ever
        same = torch.equal(ops.linear_tiled(x, tiles, None, 1024), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


reads_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def test_a_checked_layer_leaves_the_dispatcher_out_only_where_nothing_is_differentiated():
    layer = random_layer(6, 40, 4, 32)
    tiled_linear = ops.TiledLinear(tiled(layer, 4, 32, 40), 6, 40, (None, None, None))
    x, bias = torch.randn(3, 40), torch.randn(6)
    plain = tiled_linear(x, bias, 16)
    assert not plain.requires_grad
    for wanted in (x, bias):
        wanted.requires_grad_()
        y = tiled_linear(x, bias, 16)
        assert torch.equal(y, plain)
        (grad,) = torch.autograd.grad(y.sum(), wanted)
        assert grad.abs().sum() > 0
        wanted.requires_grad_(False)


@reads_proc
def test_thousands_of_calls_leave_no_memory_behind():
    layer = random_layer(2048, 64, 4, 32)
    tiles = tiled(layer, 4, 32, 64)
    x = torch.randn(8, 64, dtype=torch.bfloat16)

    def call(times: int) -> None:
        for _ in range(times):
            ops.linear_tiled(x, tiles, None, 2048)
            ops.linear(x, *layer, None, 4, 32)
            ops.unpack(layer[0], 4, 64)

    call(50)
    before = resident_bytes()
    call(2000)  # each makes more than 64 KB: all kept would be 128 MB
    assert resident_bytes() - before < 2**23


@reads_proc
def test_chunks_of_huge_pages_are_given_back_with_the_last_tensor_in_them():
    kept = huge_pages.empty_bytes(100).fill_(7)
    before = resident_bytes()
    for _ in range(400):  # 400 MB in all
        huge_pages.empty_bytes(2**20).fill_(1)
    assert resident_bytes() - before < 2 * huge_pages.CHUNK
    assert kept.eq(7).all()


@pytest.mark.parametrize("n", [1, 64, 1000, huge_pages.CHUNK // 2, huge_pages.CHUNK + 1])
def test_memory_in_huge_pages_is_aligned_and_nobody_elses(n):
    tensors = [huge_pages.empty_bytes(n) for _ in range(3)]
    for value, tensor in enumerate(tensors):
        assert tensor.shape == (n,) and tensor.data_ptr() % huge_pages.ALIGNMENT == 0
        tensor.fill_(value)
    assert all(tensor.eq(value).all() for value, tensor in enumerate(tensors))


def test_no_kernel_reads_beyond_the_end_of_a_tensor():
    # Each tensor ends where an unreadable page starts; a read beyond it kills the child.
    script = """
        import ctypes, mmap, torch
        from lwquant import ops
        from lwquant.scheme import QuantScheme
        libc = ctypes.CDLL(None, use_errno=True)
        page, kept = mmap.PAGESIZE, []

        def guarded(tensor):
            size = tensor.numel() * tensor.element_size()
            pages = -(-size // page)
            memory = mmap.mmap(-1, (pages + 1) * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
            kept.append(memory)
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(),
                                    offset=pages * page - size)
            flat.copy_(tensor.flatten())
            return flat.view(tensor.shape)

        for isa in ops.available_isas():
            ops.set_isa(isa)
            for bits in range(2, 9):
                for inputs in (1, 33, 100, 128, 160, 191):
                    for group in (32, 48, 999):
                        groups = -(-inputs // group)
                        codes = torch.ones(3, inputs, dtype=torch.uint8)
                        packed = guarded(ops.pack(guarded(codes), bits))
                        zeros = guarded(ops.pack(torch.ones(groups, 3, dtype=torch.uint8), bits))
                        scales = guarded(torch.ones(3, groups).half())
                        x = guarded(torch.ones(2, inputs))
                        y = ops.linear(x, packed, scales, zeros, None, bits, group)
                        assert y.abs().max() < 1e-3  # code - zero is 0 everywhere
                        one = torch.full((groups, 3), 2 ** (8 - bits), dtype=torch.uint8)
                        fine = ops.linear(x, packed, scales, guarded(one), None, bits, group)
                        assert torch.equal(fine, y)
                        last = torch.full((3,), inputs - 1, dtype=torch.int16)
                        starts = torch.arange(4, dtype=torch.int32)
                        sparse = (torch.ones(3).half(), last, starts)
                        added = ops.linear(x, packed, scales, zeros, None, bits, group,
                                           *map(guarded, sparse))
                        assert torch.equal(added, y + 1)
                        scheme = QuantScheme(bits, group)
                        if ops.tiles_bytes(scheme, 3, inputs):
                            # Tiles end on a line of 64 bytes, as a page does.
                            tiles = ops.make_tiles(scheme, inputs, packed, scales, zeros)
                            tiles = guarded(tiles)
                            for n in (1, 2):
                                got = ops.linear_tiled(x[:n], tiles, None, 3, *map(guarded, sparse))
                                assert (got - 1).abs().max() < 1e-3
                        assert torch.equal(ops.unpack(packed, bits, inputs), codes)
        print("survived", flush=True)
        import os; os._exit(0)  # the maps are still exported: do not tear them down
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "survived\n", (done.returncode, done.stderr[-2000:])


def test_uncompiled_kernels_are_reported_once_and_change_nothing_but_speed(monkeypatch):
    layer = random_layer(8, 64, 4, 32)
    x = torch.randn(3, 64)
    fast = ops.linear(x, *layer, None, 4, 32)
    monkeypatch.setattr(native, "_kernels", None)
    native.warn_uncompiled.cache_clear()
    assert not ops.compiled() and ops.isa() == "python"
    assert ops.tiles_bytes(QuantScheme(4, 32), 8, 64) == 0  # a module keeps to plain torch
    with pytest.warns(ops.UncompiledWarning, match="not compiled"):
        slow = ops.linear(x, *layer, None, 4, 32)
    ops.linear(x, *layer, None, 4, 32)  # a second warning would be an error
    torch.testing.assert_close(slow, fast, rtol=0, atol=0.01)  # 64 inputs of steps up to 15
    assert torch.equal(ops.pack(ops.unpack(layer[0], 4, 64), 4), layer[0])
