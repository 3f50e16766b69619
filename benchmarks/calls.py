"""What a call of a small layer costs beside its product: checks, the result's memory, Python.

    taskset -c 0 python benchmarks/calls.py

One token through the attention's and the MLP's first linears of SmolLM2, one after another, in
microseconds a call: by the module, by the layer past the module, and by the compiled kernel alone
with everything prepared; the best of the rounds. The difference is what small models wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from rows import commit, machine
from torch import Tensor

from lwquant.nn.linear import QuantizedLinear
from lwquant.scheme import QuantScheme

INPUTS = 576
LAYERS = {"q, k and v": (576, 192, 192), "gate and up": (1536, 1536)}
SCHEME = QuantScheme(4, 64, scale_bits=8)
ROUNDS, CALLS = 60, 100


def layer(out_features: int) -> QuantizedLinear:
    """What its weights are does not change its time."""
    made = QuantizedLinear(INPUTS, out_features, SCHEME, bias=False, activation_bits=8)
    made.prepare()
    return made


def kernel_alone(made: QuantizedLinear, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The compiled function on addresses; x and y, of one dtype, must be kept."""
    tiled = made.prepare()
    assert tiled is not None and tiled._kernel is not None
    in_bf16 = x.dtype is torch.bfloat16
    return partial(tiled._kernel.run, x.data_ptr(), 1, 0, 8, 1, y.data_ptr(), in_bf16)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """The mean of these calls, in the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            for call in calls:
                call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS / len(calls) * 1e6


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    print(f"{machine()}, {commit()}")
    print("| layers | inputs | module | layer | kernel alone | layer less kernel |")
    print("|---|---|---|---|---|---|")
    for name, outputs in LAYERS.items():
        made = [layer(n) for n in outputs]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 1, INPUTS).to(dtype)
            y = torch.empty(max(outputs), dtype=dtype)
            alone = microseconds([kernel_alone(one, x, y) for one in made])
            by_module = microseconds([partial(one, x) for one in made])
            tiled = [one.prepare() for one in made]
            by_layer = microseconds([partial(one, x, None, 8) for one in tiled])
            cells = (by_module, by_layer, alone, by_layer - alone)
            print(f"| {name} | {dtype} |", " | ".join(f"{cell:.1f}" for cell in cells), "|")


if __name__ == "__main__":
    main()
