"""tests/kernels/kernel_properties.cpp under sanitizers, and on processors that this one is not."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lwquant import ops

SOURCE = Path(__file__).parents[2] / "csrc"
CPUS = {"Haswell": ["reference", "avx2"], "Nehalem": ["reference"]}
EVERY = "7"  # of the cases, where a processor is emulated: some fifty times slower

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not ops.compiled(), reason="for x86-64, with a compiler"
)


def built(folder: Path, *settings: str) -> Path:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = [shutil.which(name, path=path) for name in ("cmake", "ninja")]
    assert all(tools), "the extra `dev` brings cmake and ninja"
    cmake, ninja = map(str, tools)
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", SOURCE, "-B", folder]
    for command in (
        [*configure, "-DLWQUANT_PROPERTIES=ON", *settings],
        [ninja, "-C", folder, "-j", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "kernel_properties"


def isas_run(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_no_kernel_reads_or_writes_what_it_must_not(tmp_path):
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    program = built(tmp_path, "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}")
    assert isas_run(program) == list(ops.available_isas())


@pytest.mark.skipif("avx512_vnni" not in ops.available_isas(), reason="needs AVX-512 VNNI")
def test_the_avx_vnni_kernels_compute_the_same_in_the_other_encoding(tmp_path):
    program = built(tmp_path, "-DLWQUANT_VNNI_OF_AVX512=ON")
    assert "avx_vnni" in isas_run(program)


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs Debian's qemu-user")
def test_every_kernel_runs_on_the_processors_it_is_for(tmp_path):
    program = built(tmp_path, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    for cpu, isas in CPUS.items():
        assert isas_run("qemu-x86_64", "-cpu", cpu, program, EVERY) == isas
