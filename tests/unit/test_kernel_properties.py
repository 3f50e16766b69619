"""tests/kernels: programs under sanitizers, on processors that this one is not, and for GPUs."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lwquant import ops
from lwquant.scheme import WIDTHS

SOURCE = Path(__file__).parents[2] / "csrc"
CPUS = {"Haswell": ["reference", "avx2"], "Nehalem": ["reference"]}
SANITIZED = (
    "-DCMAKE_BUILD_TYPE=None",
    "-DCMAKE_CXX_FLAGS=-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all",
)
# AVX-VNNI in AVX-512's encoding of the same instruction, AMX on registers in memory.
RARE = ("-DLWQUANT_VNNI_OF_AVX512=ON", "-DLWQUANT_EMULATE_AMX=ON")
EVERY = "11"  # of the cases, where a processor is emulated: some fifty times slower

needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or not ops.compiled(), reason="for x86-64, with a compiler"
)
WIDTHS_RUN = [str(bits) for bits in WIDTHS]


def built(folder: Path, target: str, *settings: str) -> Path:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = [shutil.which(name, path=path) for name in ("cmake", "ninja")]
    assert all(tools), "the extra `dev` brings cmake and ninja"
    cmake, ninja = map(str, tools)
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", SOURCE, "-B", folder]
    for command in (
        [*configure, "-DLWQUANT_PROPERTIES=ON", *settings],
        [ninja, "-C", folder, "-j", str(os.cpu_count()), target],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / target


def lines_of(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> tuple[Path, list[str]]:
    """Where programs are built with sanitizers, and the settings: they share the kernels."""
    settings = list(SANITIZED)
    if "avx512_vnni" in ops.available_isas():
        settings += RARE
    return tmp_path_factory.mktemp("sanitized"), settings


@needs_compiler
def test_no_kernel_reads_or_writes_what_it_must_not(sanitized):
    folder, settings = sanitized
    isas = list(ops.available_isas())
    if "avx512_vnni" in isas:
        isas = ["reference", "avx2", "avx_vnni", "avx512_vnni", "amx"]
    assert lines_of(built(folder, "kernel_properties", *settings)) == isas


@needs_compiler
def test_the_gpu_kernels_compute_what_they_should_in_any_order_of_threads(sanitized):
    folder, settings = sanitized
    assert lines_of(built(folder, "cuda_properties", *settings)) == WIDTHS_RUN


@needs_compiler
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs Debian's qemu-user")
def test_every_kernel_runs_on_the_processors_it_is_for(tmp_path):
    less = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")  # half the compiler's time
    program = built(tmp_path, "kernel_properties", "-DCMAKE_EXE_LINKER_FLAGS=-static", *less)
    for cpu, isas in CPUS.items():
        assert lines_of("qemu-x86_64", "-cpu", cpu, program, EVERY) == isas
