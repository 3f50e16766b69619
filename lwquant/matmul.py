"""Float32 matrix products on the CPU by the faster of torch's two back ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT32_ERROR = 1e-6  # relative error of a float32 product of this size is about 3e-7


@contextmanager
def fast_float32() -> Iterator[None]:
    """Inside, float32 products go to oneDNN where it computes them in true float32.

    torch sends them to MKL, which runs at half speed and less on AMD processors. The only switch
    to oneDNN also allows it to compute in bfloat16; where it would (measured here, not guessed),
    nothing is changed.
    """
    backend = torch.backends.mkldnn
    before = backend.matmul.fp32_precision  # type: ignore[attr-defined]
    try:
        if backend.is_available():
            backend.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
            if _relative_error() > FLOAT32_ERROR:
                backend.matmul.fp32_precision = before  # type: ignore[attr-defined]
        yield
    finally:
        backend.matmul.fp32_precision = before  # type: ignore[attr-defined]


def _relative_error() -> float:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 512, generator=generator)
    right = torch.randn(256, 512, generator=generator)
    exact = left.double() @ right.double().T
    return ((torch.nn.functional.linear(left, right) - exact).norm() / exact.norm()).item()
