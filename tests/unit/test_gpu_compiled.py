"""The GPU kernels through NVRTC: every architecture compiles, within the rules for registers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lwquant.ops.cuda import nvrtc

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from gpu_runs.compiled import ARCHITECTURES, LAYER_KINDS, compiled_kernels

# The widths and spans that need most, and one of each kind; `benchmarks/gpu.py --compile-only` has
# all for all, which takes many minutes.
CHOSEN = ((8, 16, 1), (3, 16, 2), (4, 16, 4), (8, 16, 2), (6, 8, 2), (2, 8, 4))

pytestmark = pytest.mark.skipif(
    not nvrtc.found(), reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


def test_every_architecture_compiles_without_spills_and_with_tensor_cores_where_meant():
    kinds = [nvrtc.KernelKind(*numbers) for numbers in CHOSEN]
    assert set(kinds) <= set(LAYER_KINDS)
    jobs = [*zip(kinds, ARCHITECTURES, strict=True)]
    jobs += [(nvrtc.RoundingKind(), architecture) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:  # NVRTC does not hold Python's lock
        results = list(pool.map(compiled_kernels, *zip(*jobs, strict=True)))
    kernels = [kernel for result in results for kernel in result]
    broken = {
        (kernel.name, kernel.kind.label, kernel.architecture): list(kernel.broken_rules())
        for kernel in kernels
    }
    assert {name: rules for name, rules in broken.items() if rules} == {}


def test_an_error_of_the_compiler_is_shown():
    with pytest.raises(ValueError, match=r"NVRTC cannot compile kernels of 4b-a16-s128 for sm_10"):
        nvrtc.compile_kernels(nvrtc.KernelKind(4, 16, 4), "sm_10")
