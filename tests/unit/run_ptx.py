"""`python run_ptx.py FOLDER` runs layers and the rounding loop from Python to PTX and back.

FOLDER holds what NVRTC made, LABEL.ptx for each kind. The loader must find the libcuda.so.1 of
tests/kernels/forwarding_libcuda.cpp. The host code of csrc/cuda is the real one; its memory is the
CPU's, so that CPU tensors stand for those of a GPU.
"""

from __future__ import annotations

import ctypes
import re
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from ptx import machine
from ptx.text import Kernel, parse
from test_ops_linear import random_inputs, random_layer

from lwquant.ops import rounding as loops
from lwquant.ops.cuda import nvrtc, rounding, tiled

CALLS = (
    (1, torch.float32),
    (1, torch.float16),
    (1, torch.bfloat16),
    (2, torch.float32),
    (9, torch.bfloat16),
    (17, torch.float16),
    (33, torch.float32),
)


class Modules:
    """The functions that the driver forwards to; kernels are known by their number."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, Kernel]] = []
        self.found: list[Kernel] = []
        self.launched: set[str] = set()
        integer, word = ctypes.c_int, ctypes.c_uint
        launch = integer, integer, word, word, word, word, ctypes.c_void_p
        self._kept = (  # as long as the driver has their addresses
            ctypes.CFUNCTYPE(integer, ctypes.c_char_p)(self.load),
            ctypes.CFUNCTYPE(integer, integer, ctypes.c_char_p)(self.find),
            ctypes.CFUNCTYPE(*launch)(self.launch),
        )
        ctypes.CDLL("libcuda.so.1").forward_to(*self._kept)

    def load(self, image: bytes) -> int:
        self.loaded.append(parse(image.decode()))
        return len(self.loaded)

    def find(self, module: int, name: bytes) -> int:
        kernel = self.loaded[module - 1].get(name.decode())
        if kernel is not None:
            self.found.append(kernel)
        return 0 if kernel is None else len(self.found)

    def launch(self, function: int, x: int, y: int, z: int, n: int, arguments: int) -> int:
        kernel = self.found[function - 1]
        try:
            machine.launch(kernel, (x, y, z), n, arguments)
        except Exception:
            traceback.print_exc()  # C++ between here and the test knows no exceptions of Python
            return 1
        self.launched.add(kernel.name)
        return 0


def check_layer(kind: nvrtc.KernelKind) -> None:
    """Products within their bound with every kernel and dtype, and the weight bit for bit."""
    group_size = 32 * kind.span_blocks
    layer = random_layer(70, 700, kind.bits, group_size, bias=True, fine=kind.bits == 2)
    tiles = layer.tiles
    for n, dtype in CALLS:
        x = random_inputs(n, 700).to(dtype)
        exact, error = layer.oracle(x, kind.activation_bits)
        error += exact.abs() * torch.finfo(dtype).eps / 2
        got = tiled.linear(x, tiles, layer.bias, 70, kind.activation_bits)
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= error).all(), (kind.label, n, dtype)
    steps = layer.codes.float() - layer.zero_points[:, layer.group]
    weight = tiled.dequantize(tiles, 70, 700)  # by the kernels that are there
    assert torch.equal(weight, steps * layer.scales.float()[:, layer.group])
    x = random_inputs(2, 700)
    x[1, 650] = torch.inf
    got = tiled.linear(x, tiles, None, 70, kind.activation_bits)
    assert got[0].isfinite().all() and got[1].isnan().all()


def check_rounding() -> None:
    """As the loop in torch, but where a sum is within rounding of the middle of a step."""
    for n_rows, n_columns, base in ((33, 300, False), (64, 128, True)):
        shape = n_columns, n_rows
        targets, scales = torch.randn(shape), torch.rand(shape) / 4 + 0.1
        zeros = torch.randint(0, 8, shape).float()
        feedback = torch.randn(n_columns, n_columns).mT / 50
        start = targets + torch.randn(shape) / 10 if base else None
        by = {}
        for loop in (loops.round_block_torch, rounding.round_block):
            by[loop] = targets.clone()
            with mock.patch.object(loops, "_block_loop", lambda *_, loop=loop: loop):
                loops.round_columns(by[loop], feedback, scales, zeros, 7, start)
        plain, by_kernel = by.values()
        assert by_kernel.isfinite().all() and not torch.equal(plain, targets)
        assert ((plain - by_kernel).abs() < 1e-5).float().mean() > 0.98


def main(folder: Path) -> None:
    torch.manual_seed(0)
    modules = Modules()
    on_gpu = {
        "compiled": lambda kind, _: (folder / f"{kind.label}.ptx").read_bytes() + b"\0",
        "architecture": str,
        "index": lambda _: 0,
        "stream": lambda _: 0,
    }
    kinds = [
        nvrtc.KernelKind(int(found[1]), int(found[2]), int(found[3]) // 32)
        for file in sorted(folder.glob("*.ptx"))
        if (found := re.fullmatch(r"(\d)b-a(\d+)-s(\d+)", file.stem))
    ]
    with (
        mock.patch.multiple(tiled, multiprocessors=lambda _: 3, **on_gpu),
        mock.patch.multiple(rounding, **on_gpu),
    ):
        for kind in kinds:
            check_layer(kind)
        check_rounding()
    print(len(kinds), *sorted(modules.launched))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
