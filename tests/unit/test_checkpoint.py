"""Opening and reading model folders: what is refused, with which words, and what is read."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lwquant.errors import CheckpointError
from lwquant.model.checkpoint import Checkpoint, open_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(8, 4, generator=generator),
        "layer.weight": torch.randn(4, 4, generator=generator).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
    }


def single(folder: Path, content: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(content or tensors(), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    parts = {FIRST: ["embed.weight", "mask"], SECOND: ["layer.weight", "scalar"]}
    for file, names in parts.items():
        save_file({name: tensors()[name] for name in names}, folder / file)
    write_index(folder, {name: file for file, names in parts.items() for name in names})
    return folder


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", [single, sharded])
def test_every_tensor_is_read_as_stored(layout, tmp_path):
    checkpoint = open_checkpoint(layout(tmp_path))
    assert sorted(checkpoint.names()) == sorted(tensors())
    for name, expected in tensors().items():
        got = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) == got.dtype == expected.dtype
        assert torch.equal(got, expected)
    weight_files = tmp_path.glob("*.safetensors")
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in weight_files)
    assert checkpoint.config == CONFIG


def test_changing_a_tensor_in_place_leaves_the_file_alone(tmp_path):
    checkpoint = Checkpoint.open(single(tmp_path))
    checkpoint.read("embed.weight").zero_()
    assert torch.equal(checkpoint.read("embed.weight"), tensors()["embed.weight"])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_reading_all_tensors_one_by_one_keeps_none_of_them_resident(tmp_path):
    size = 2**24
    content = {f"w{i}": torch.full((size // 4,), float(i)) for i in range(8)}
    checkpoint = Checkpoint.open(single(tmp_path, content))
    del content
    checkpoint.read("w0")
    before, peak = resident_bytes(), 0
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        peak = max(peak, resident_bytes() - before)
        del tensor
    assert peak < 3 * size  # the file holds eight; the allocator keeps a little for itself
    assert resident_bytes() - before < 2 * size


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    first = Checkpoint.open(single(tmp_path / "a")).fingerprint()
    assert Checkpoint.open(single(tmp_path / "b")).fingerprint() == first


@pytest.mark.parametrize("change", ["value", "name", "config"])
def test_the_fingerprint_changes_with(change, tmp_path):
    before = Checkpoint.open(single(tmp_path / "a")).fingerprint()
    content = tensors()
    if change == "value":
        content["embed.weight"][0, 0] += 1
    if change == "name":
        content["other.weight"] = content.pop("layer.weight")
    config = {"rope_theta": 1.0} if change == "config" else {}
    assert Checkpoint.open(single(tmp_path / "b", content, **config)).fingerprint() != before


def test_the_hub_cache_layout_is_followed(tmp_path):
    folder = single(tmp_path / "snapshots" / "abc")
    (tmp_path / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "blobs" / f"{file.name}-sha")
        file.symlink_to(Path("../../blobs") / f"{file.name}-sha")
    assert torch.equal(Checkpoint.open(folder).read("scalar"), torch.tensor(3.5))


def test_the_trace_of_an_unpacked_gguf_is_dropped_from_the_config(tmp_path):
    content = {"embed.weight": tensors()["embed.weight"]}
    folder = single(tmp_path, content, quantization_config={"quant_method": "gguf"})
    assert Checkpoint.open(folder).config == CONFIG


# ---------------------------------------------------------------- bad folders


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "none", "none", "is not a folder")


def test_a_folder_without_config_is_refused(tmp_path):
    (single(tmp_path) / "config.json").unlink()
    refused(tmp_path, "has no config.json")


def test_a_folder_with_only_a_gguf_points_to_the_file(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    refused(tmp_path, "has no config.json", str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ("\xff".encode("latin1"), "is not JSON"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": null}', "names no architecture"),
        ('{"architectures": [3]}', "not class names"),
        ('{"architectures": ["LlamaForCausalLM"]}', "model_type"),
    ],
)
def test_an_unusable_config_is_refused(text, words, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (single(tmp_path) / "config.json").write_bytes(content)
    refused(tmp_path, "config.json", words)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"compression_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_quantized_checkpoint_is_refused(config, tmp_path):
    refused(single(tmp_path, **config), "already quantized", "gptq")


def test_packed_blocks_of_a_gguf_are_refused(tmp_path):
    content = {"layer.weight": torch.zeros(4, dtype=torch.uint8)}
    folder = single(tmp_path, content, quantization_config={"quant_method": "gguf"})
    refused(folder, "gguf", "layer.weight", "uint8")


def test_a_folder_of_pickle_is_refused(tmp_path):
    (single(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin is pickle", "only safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    (single(tmp_path) / "model.safetensors").unlink()
    refused(tmp_path, "nor model.safetensors.index.json; only safetensors is read")


def test_a_file_without_tensors_is_refused(tmp_path):
    (single(tmp_path) / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(tmp_path, "hold no tensors")


# ---------------------------------------------------------------- bad indexes


def test_a_missing_shard_is_refused(tmp_path):
    (sharded(tmp_path) / SECOND).unlink()
    refused(tmp_path, INDEX, SECOND, "for 2 tensors", "no such file")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/../../x", "", "..\\x"])
def test_an_index_that_leaves_the_folder_is_refused(name, tmp_path):
    folder = sharded(tmp_path / "in")
    save_file({"embed.weight": tensors()["embed.weight"]}, tmp_path / "out.safetensors")
    write_index(folder, {"embed.weight": name})
    refused(folder, repr(name), "leaves the folder")


@pytest.mark.parametrize("depth", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(depth, tmp_path):
    folder, outside = sharded(tmp_path / "in"), tmp_path / "outside"
    outside.mkdir()
    (folder / SECOND).rename(outside / SECOND)
    if depth == "file":
        (folder / SECOND).symlink_to(outside / SECOND)
    else:
        (folder / "sub").symlink_to(outside)
        write_index(folder, {"layer.weight": f"sub/{SECOND}", "scalar": f"sub/{SECOND}"})
    refused(folder, SECOND, str(outside), "outside the folder")


def test_a_blobs_folder_elsewhere_is_no_hub_cache(tmp_path):
    folder = single(tmp_path / "snapshots" / "abc")
    blob = tmp_path / "other" / "blobs" / "weights"
    blob.parent.mkdir(parents=True)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    refused(folder, "model.safetensors", "outside the folder")


@pytest.mark.parametrize("weight_map", [None, [], {"embed.weight": 3}])
def test_an_index_without_file_names_is_refused(weight_map, tmp_path):
    write_index(sharded(tmp_path), weight_map)
    refused(tmp_path, INDEX, "weight_map")


def test_an_index_that_is_cut_is_refused(tmp_path):
    whole = (sharded(tmp_path) / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, INDEX, "is not JSON")


def edit_index(folder: Path, **changes: str | None) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] | changes
    write_index(folder, {name: file for name, file in weight_map.items() if file})


def test_a_tensor_the_shard_lacks_is_refused(tmp_path):
    edit_index(sharded(tmp_path), ghost=FIRST)
    refused(tmp_path, "'ghost' is not in", FIRST)


def test_a_tensor_the_index_lacks_is_refused(tmp_path):
    edit_index(sharded(tmp_path), scalar=None)
    refused(tmp_path, "'scalar'", SECOND, "the index says None")


def test_a_tensor_in_another_shard_than_indexed_is_refused(tmp_path):
    edit_index(sharded(tmp_path), scalar=FIRST)
    refused(tmp_path, "'scalar'", f"is in {SECOND}, the index says {FIRST}")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    names = ["layer.weight", "scalar", "mask"]
    save_file({name: tensors()[name] for name in names}, sharded(tmp_path) / SECOND)
    refused(tmp_path, "'mask'", f"is in {FIRST} and in {SECOND}")


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_is_refused_with_the_tensor_and_the_count(dtype, tmp_path):
    weight = torch.ones(4, 4)
    weight[1, 2:] = torch.nan
    checkpoint = Checkpoint.open(single(tmp_path, {"good": torch.ones(2), "w": weight.to(dtype)}))
    with pytest.raises(CheckpointError, match="'w' holds 2 NaN or Inf among 16 values"):
        checkpoint.read("w")
    with pytest.raises(CheckpointError, match="'w' holds 2"):
        checkpoint.check_finite()


def test_nan_is_counted_over_the_whole_of_a_large_tensor(tmp_path):
    weight = torch.zeros(300, 1000)
    weight[0, 0] = weight[150, 7] = weight[299, 999] = torch.nan
    checkpoint = Checkpoint.open(single(tmp_path, {"w": weight}))
    with pytest.raises(CheckpointError, match="'w' holds 3 NaN or Inf among 300000 values"):
        checkpoint.read("w")


def test_infinity_is_refused(tmp_path):
    checkpoint = Checkpoint.open(single(tmp_path, {"w": torch.tensor([1.0, -torch.inf])}))
    with pytest.raises(CheckpointError, match="'w' holds 1 NaN or Inf"):
        checkpoint.read("w")


def test_an_unknown_tensor_is_refused(tmp_path):
    checkpoint = Checkpoint.open(single(tmp_path))
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match="holds no tensor 'nope'"):
            ask("nope")


def test_a_file_that_changes_after_opening_is_refused(tmp_path):
    checkpoint = Checkpoint.open(single(tmp_path))
    save_file({"scalar": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'scalar' changed after the checkpoint was opened"):
        checkpoint.read("scalar")
    with pytest.raises(CheckpointError, match=r"'mask' cannot be read"):
        checkpoint.read("mask")
