"""The shard writer, read back by the safetensors package and by our own header reader."""

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lwquant.errors import OutputError
from lwquant.export.shards import ShardWriter
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.safetensors_header import DTYPES, read_header


def weights(n: int, size: int = 100) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(size, generator=generator) for i in range(n)}


def write(folder: Path, content: dict[str, torch.Tensor], **settings: int) -> int:
    writer = ShardWriter(folder, **settings)
    for name, tensor in content.items():
        writer.add(name, tensor)
    return writer.finish()


def test_a_small_model_is_one_file_and_nothing_else(tmp_path):
    content = weights(3)
    n_bytes = write(tmp_path, content)
    assert n_bytes == (tmp_path / "model.safetensors").stat().st_size > 3 * 400
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    got = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in content.items())
    assert got.keys() == content.keys()


def test_shards_and_index_hold_every_tensor_once_within_the_limit(tmp_path):
    content = weights(5)
    n_bytes = write(tmp_path, content, max_shard_bytes=900)
    assert n_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert len(list(tmp_path.iterdir())) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    got = {}
    for shard in shards:
        part = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in part.values()) <= 900
        assert {index["weight_map"][name] for name in part} == {shard}
        got |= part
    assert got.keys() == index["weight_map"].keys() == content.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in content.items())


def test_our_checkpoint_reads_what_was_written(tmp_path):
    content = weights(5)
    write(tmp_path, content, max_shard_bytes=900)
    config = {"architectures": ["A"], "model_type": "a"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in content.items())


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path):
    write(tmp_path, weights(3), max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_every_dtype_and_odd_shape_comes_back(tmp_path):
    # Odd byte counts first: without reordering, every later tensor would be misaligned.
    content = {
        f"a{i}.{name}": torch.arange(60, dtype=torch.uint8)[: 3 * dtype.itemsize].view(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
        if name != "BOOL"
    }
    content["bool"] = torch.tensor([True, False, True])
    content["scalar"] = torch.tensor(2.5, dtype=torch.float16)
    content["empty"] = torch.empty(0, 4)
    write(tmp_path, content)
    got = load_file(tmp_path / "model.safetensors")
    for name, tensor in content.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(got[name]), as_bytes(tensor))
    for entry in read_header(tmp_path / "model.safetensors").tensors.values():
        assert entry.start % entry.dtype.itemsize == 0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_a_view_is_written_as_it_looks(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": base.T, "slice": base[:, 1:3], "stride": base.reshape(-1)[::2]}
    write(tmp_path, {**views, "parameter": base.clone().requires_grad_()})
    got = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(got[name], view) for name, view in views.items())
    assert torch.equal(got["parameter"], base)


def test_the_header_names_the_pytorch_format(tmp_path):
    write(tmp_path, weights(1))
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_the_writer_holds_no_tensors(tmp_path):
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    size = 2**22  # bytes of one tensor; 20 of them make one shard
    writer = ShardWriter(tmp_path)
    writer.add("first", torch.zeros(size // 4))
    before, peak = resident(), 0
    for i in range(20):
        writer.add(f"w{i}", torch.full((size // 4,), float(i)))
        peak = max(peak, resident() - before)
    writer.finish()
    assert max(peak, resident() - before) < 8 * size


def test_a_name_written_twice_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, max_shard_bytes=1)
    writer.add("w", torch.zeros(2))
    writer.add("v", torch.zeros(2))
    with pytest.raises(OutputError, match="tensor 'w' is written twice"):
        writer.add("w", torch.zeros(2))


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"'w': safetensors has no dtype for torch.complex128"):
        ShardWriter(tmp_path).add("w", torch.zeros(2, dtype=torch.complex128))


def test_an_empty_model_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no tensors to write"):
        ShardWriter(tmp_path).finish()


def test_a_finished_writer_takes_nothing_more(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("w", torch.zeros(2))
    writer.finish()
    with pytest.raises(OutputError, match="'v' comes after the shards"):
        writer.add("v", torch.zeros(2))
    with pytest.raises(OutputError, match="already finished"):
        writer.finish()


def test_a_shard_limit_below_one_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        ShardWriter(tmp_path, 0)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"none: writing 0 bytes failed.*No such file"):
        ShardWriter(tmp_path / "none")


def test_an_unfinished_writer_leaves_nothing_that_looks_like_a_model(tmp_path):
    writer = ShardWriter(tmp_path, max_shard_bytes=900)
    for name, tensor in weights(5).items():
        writer.add(name, tensor)
    assert all(file.name.startswith(".") for file in tmp_path.iterdir())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture
def file_limit():
    """Files may not grow beyond 1 MiB: writes then fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_names_the_folder_and_the_bytes(tmp_path, file_limit):
    writer = ShardWriter(tmp_path)
    with pytest.raises(OutputError) as caught:
        writer.add("w", torch.zeros(2**19))
    assert str(tmp_path) in str(caught.value)
    assert f"writing {2**21} bytes failed" in str(caught.value)
    assert caught.value.__cause__.errno == errno.EFBIG


def test_a_failed_shard_names_its_size_with_the_header(tmp_path, file_limit):
    writer = ShardWriter(tmp_path)
    writer.add("w", torch.zeros(2**18))  # the spool just fits, the header makes it too much
    with pytest.raises(OutputError, match=r"shard-00001.*writing 10486\d\d bytes failed"):
        writer.finish()
    assert not list(tmp_path.glob("*.safetensors"))
