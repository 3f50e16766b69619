"""Fixtures for all tests: the trained tiny model, its tokenizer, held-out text, fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_FOLDER
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lwquant import ops

# Files whose tests take minutes, most of it in compilers. They come first: a worker that took one
# of them last would leave the other cores idle.
LONGEST = ("test_kernel_properties.py", "test_gpu_compiled.py", "test_on_device.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    # The tiny models gain nothing from more, and on busy cores threads that wait for each other
    # made the tests 20 times slower.
    torch.set_num_threads(1)


@pytest.fixture
def integer_kernels() -> Iterator[None]:
    """Kernels that hold activations as integers for many tokens as for few: AMX takes bf16."""
    yield from _on([isa for isa in ops.available_isas() if isa != "amx"][-1])


@pytest.fixture
def amx() -> Iterator[None]:
    """For modules that are skipped where the processor has none."""
    yield from _on("amx")


def _on(isa: str) -> Iterator[None]:
    before = ops.isa()
    ops.set_isa(isa)
    yield
    ops.set_isa(before)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The trained Llama shipped with the tests (see tests/data/tiny/README.md); read only."""
    return TINY_FOLDER


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


@pytest.fixture(scope="session")
def heldout_text() -> str:
    """32,000 characters of English that the tiny model was not trained on."""
    return (TINY_FOLDER / "heldout.txt").read_text(encoding="utf-8")
