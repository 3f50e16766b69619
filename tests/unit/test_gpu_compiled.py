"""The GPU kernels through NVRTC: rules for registers, and what the assembly computes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import pytest
from test_kernel_properties import built, needs_compiler

from lwquant.ops.cuda import nvrtc
from lwquant.scheme import WIDTHS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from gpu_runs.compiled import ARCHITECTURES, LAYER_KINDS, N_KERNELS, VERBOSE, kernels_of

TESTS = Path(__file__).parents[1]
# Every width, and the spans that need most; `benchmarks/gpu.py --compile-only` has all for all,
# which takes many minutes.
CHOSEN = ((8, 16, 1), (3, 16, 2), (4, 16, 4), (5, 16, 2), (6, 8, 2), (2, 8, 4), (7, 16, 4))

pytestmark = pytest.mark.skipif(
    not nvrtc.found(), reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[nvrtc.Kind, str], nvrtc.CompiledKernels]:
    """By kind and architecture: those of CHOSEN in turn, the rounding loop for all."""
    kinds = [nvrtc.KernelKind(*numbers) for numbers in CHOSEN]
    assert set(kinds) <= set(LAYER_KINDS) and {kind.bits for kind in kinds} == set(WIDTHS)
    jobs: list[tuple[nvrtc.Kind, str]] = [*zip(kinds, cycle(ARCHITECTURES), strict=False)]
    jobs += [(nvrtc.RoundingKind(), architecture) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:  # NVRTC does not hold Python's lock
        results = pool.map(lambda job: nvrtc.compile_kernels(*job, VERBOSE), jobs)
        return dict(zip(jobs, results, strict=True))


def test_every_architecture_compiles_without_spills_and_with_tensor_cores_where_meant(compiled):
    kernels = [kernel for job, found in compiled.items() for kernel in kernels_of(found, *job)]
    broken = {
        (kernel.name, kernel.kind.label, kernel.architecture): list(kernel.broken_rules())
        for kernel in kernels
    }
    assert {name: rules for name, rules in broken.items() if rules} == {}


@needs_compiler
def test_the_assembly_computes_what_it_should_from_python_and_back(compiled, tmp_path):
    built(tmp_path, "forwarding_cuda")
    for (kind, _), found in compiled.items():
        (tmp_path / f"{kind.label}.ptx").write_text(found.ptx)
    environment = dict(
        os.environ,
        LD_LIBRARY_PATH=str(tmp_path / "forwarding"),
        PYTHONPATH=str(TESTS),
        OMP_NUM_THREADS="1",
    )
    command = [sys.executable, str(TESTS / "unit" / "run_ptx.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    n_kinds, *launched = done.stdout.split()
    assert int(n_kinds) == len(CHOSEN)
    assert len(launched) == sum(N_KERNELS.values())  # none was left out


def test_an_error_of_the_compiler_is_shown():
    with pytest.raises(ValueError, match=r"NVRTC cannot compile kernels of 4b-a16-s128 for sm_10"):
        nvrtc.compile_kernels(nvrtc.KernelKind(4, 16, 4), "sm_10")
