"""The header reader against files that are cut short or lie about their tensors."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lwquant.errors import CheckpointError
from lwquant.model.safetensors_header import read_header

TENSORS = {
    "embed.weight": torch.arange(32.0).reshape(8, 4),
    "layer.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
}


def raw(header: object, n_data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(n_data)


def claim(dtype: str, shape: list, start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def header_refused(folder: Path, content: bytes, *words: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@settings(max_examples=150, deadline=None, database=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_proper_prefix_of_a_file_is_refused(share):
    whole = save(TENSORS, {"format": "pt"})
    with tempfile.TemporaryDirectory() as folder:
        header_refused(Path(folder), whole[: int(share * len(whole))], "truncated")


def test_a_truncated_file_is_refused_with_the_tensor_and_both_sizes(tmp_path):
    whole = save({"a": torch.zeros(4), "b": torch.zeros(4)})
    words = ("tensor 'b'", f"ends at byte {len(whole)}", f"the file has {len(whole) - 5} bytes")
    header_refused(tmp_path, whole[:-5], "truncated", *words)


def test_a_file_that_goes_on_after_its_tensors_is_refused(tmp_path):
    header_refused(tmp_path, save(TENSORS) + b"12345", "5 bytes follow the last tensor")


@pytest.mark.parametrize(
    ("header", "n_data", "words"),
    [
        ({"w": claim("F32", [4], 0, 8)}, 8, "'w' of dtype F32 and shape (4,) needs 16 bytes"),
        ({"w": claim("F16", [4], 0, 16)}, 16, "needs 8 bytes, its offsets hold 16"),
        ({"w": claim("F33", [4], 0, 16)}, 16, "unknown dtype 'F33'"),
        ({"w": claim("F32", [-4], 0, 16)}, 16, "impossible shape"),
        ({"w": claim("F32", [True], 0, 4)}, 4, "impossible shape"),
        ({"w": claim("F32", [0, 2**63], 0, 0)}, 0, "impossible shape"),
        ({"w": claim("F32", [4.0], 0, 16)}, 16, "impossible shape"),
        ({"w": claim("F32", [4], 16, 0)}, 16, "impossible offsets"),
        ({"w": claim("F32", [4], -16, 0)}, 16, "impossible offsets"),
        ({"w": {"dtype": "F32", "shape": [4]}}, 16, "lacks dtype, shape or data_offsets"),
        ({"w": [1, 2]}, 16, "lacks dtype, shape or data_offsets"),
        ({"w": {**claim("F32", [4], 0, 16), "dtype": ["F32"]}}, 16, "unknown dtype"),
        ({"w": claim("F32", [4], 4, 20)}, 20, "leaves a hole before it"),
        (
            {"v": claim("F32", [4], 0, 16), "w": claim("F32", [4], 8, 24)},
            24,
            "'w' overlaps the tensor before it",
        ),
        ({"__metadata__": 3}, 0, "__metadata__"),
        ([1], 0, "not a JSON object"),
        (b'{"w": ', 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b'{"w":' * 50_000, 0, "not JSON"),
        (b'{"w": {}, "w": {}}', 0, "names 'w' twice"),
    ],
)
def test_a_lying_header_is_refused(header, n_data, words, tmp_path):
    header_refused(tmp_path, raw(header, n_data), words)


def test_a_huge_header_length_is_refused_without_reading_it(tmp_path):
    header_refused(tmp_path, (2**62).to_bytes(8, "little") + b"{}", "is not safetensors")


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path):
    header_refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer")


def test_the_header_says_where_each_tensor_lies(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(TENSORS))
    header, content = read_header(path), path.read_bytes()
    assert header.file_bytes == len(content)
    assert header.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.start : entry.stop] == stored
