"""--device cuda without a GPU: nothing is left on another device, results are those of the CPU.

On tests/emulated_device.py every operator computes what it does on the CPU, so that whatever runs
in plain torch must give the very same files. On a real GPU sums have another order, and the last
test says how far results may be apart.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_device import DeviceMismatch, EmulatedDevice
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import random_model
from transformers import AutoConfig

import lwquant
from lwquant import ops
from lwquant.errors import LwquantError
from lwquant.inspection import inspect_folder
from lwquant.ops import rounding
from lwquant.recipe import Recipe

DEVICE = "cuda:0"
QUICK = {"name": "gptq", "search": False}
SMALL = Recipe(
    sources=("builtin",),
    n_samples=4,
    seq_len=48,
    held_out=2,
    sensitivity_samples=2,
    group_size=32,
    bits=(3, 4),
    quantizer=QUICK,
)
# What each stage may be made of, several at once; all of it runs on the device.
VARIANTS: dict[str, dict[str, Any]] = {
    "measured KL, descent": {
        "metric": "measured_kl",
        "quantizer": {"name": "quantease", "search": False},
    },
    "augmented Hessian, full range for some": {"metric": "augmented_hessian", "unclipped_qk": 0.1},
    "relevance, gptaq": {"metric": "relevance", "correction": "gptaq"},
    "own text, block scores, codebook": {
        "sources": ("self",),
        "metric": "embedding_delta",
        "codebook": "nf4",
    },
    "output error, guided, embeddings": {
        "metric": "output_error",
        "guided": 2,
        "embedding_bits": 8,
    },
    "delta loss, rotated, embeddings, weighted tokens, learned rounding, tuned scales": {
        "embedding_bits": 6,
        "metric": "delta_loss",
        "transform": "rotate",
        "token_importance": "attention_concentration",
        "polish": 2,
        "tune": 2,
    },
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def plain_torch(monkeypatch):
    """No driver to ask, and on both devices the loops of rounding that are not compiled."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(ops, "compile_ahead", lambda _: None)
    monkeypatch.setattr(rounding.cuda, "can_round", lambda *_: False)
    monkeypatch.setattr(rounding, "rounding_compiled", lambda *_: False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_model("llama", tmp_path_factory.mktemp("llama"))


def deeper(model: Path, folder: Path, n_blocks: int) -> Path:
    """The model with so many blocks, all like its first."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = n_blocks
    config.layer_types = None
    weights = load_file(model / "model.safetensors")
    first = {name: w for name, w in weights.items() if ".layers.0." in name}
    rest = {name: w for name, w in weights.items() if ".layers." not in name}
    for index in range(n_blocks):
        for name, weight in first.items():
            rest[name.replace(".layers.0.", f".layers.{index}.")] = weight.clone()
    shutil.copytree(model, folder)
    config.save_pretrained(folder)
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    return folder


def made(model: Path, output: Path, device: str, **settings: Any) -> dict[str, torch.Tensor]:
    lwquant.quantize(
        model, bpw=4.3, output=output, recipe=SMALL, device=device, progress=lambda *_: None,
        **settings,
    )  # fmt: skip
    return load_file(output / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.usefixtures("plain_torch")
def test_the_default_recipe_writes_the_same_files(llama, tmp_path):
    settings = {"quantizer": "quantease", "bits": (2, 4), "n_samples": 2}
    with EmulatedDevice() as device:
        on_device = made(llama, tmp_path / "device", DEVICE, **settings)
    assert device.peak > 0
    on_cpu = made(llama, tmp_path / "cpu", "cpu", **settings)
    assert_same(on_device, on_cpu)
    shown = [inspect_folder(tmp_path / where) for where in ("device", "cpu")]
    assert shown[0].linears == shown[1].linears


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stage_runs_on_the_device(llama, tmp_path, variant):
    with EmulatedDevice():
        on_device = made(llama, tmp_path / "device", DEVICE, **VARIANTS[variant])
    assert_same(on_device, made(llama, tmp_path / "cpu", "cpu", **VARIANTS[variant]))


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("kernels", [True, False])
def test_a_packed_model_is_measured_on_the_device(llama, tmp_path, heldout_text, kernels):
    """Layers with kernels keep tiles on it, those with outliers are unpacked there."""
    settings: dict[str, Any] = {"embedding_bits": 8}
    if not kernels:
        settings = {"outliers": 5, "quantizer": {**QUICK, "name": "quantease"}}
    made(llama, tmp_path / "out", "cpu", metric="outlier_count", **settings)
    (tmp_path / "text.txt").write_text(heldout_text[:2000])
    settings = {
        "text": tmp_path / "text.txt",
        "reference": llama,
        "windows": 2,
        "seq_len": 48,
        "cache": None,
    }
    on_cpu = lwquant.evaluate(tmp_path / "out", **settings, progress=lambda *_: None)
    with EmulatedDevice() as device:
        found = lwquant.evaluate(
            tmp_path / "out", **settings, device=DEVICE, progress=lambda *_: None
        )
    assert device.peak > 0
    if kernels:
        assert found == on_cpu
    else:  # inputs stay float32 there
        assert found.kl_divergence == pytest.approx(on_cpu.kl_divergence, rel=0.02)


@pytest.mark.usefixtures("plain_torch")
def test_a_block_at_a_time_is_on_the_device(tmp_path, llama):
    """Six blocks more do not take the memory of one more on the device."""
    with safe_open(llama / "model.safetensors", "pt") as file:
        one_block = sum(file.get_tensor(k).nbytes for k in file.keys() if ".layers.0." in k)
    peaks = {}
    for n_blocks in (2, 8):
        model = deeper(llama, tmp_path / f"{n_blocks}", n_blocks)
        with EmulatedDevice() as device:
            made(model, tmp_path / f"out-{n_blocks}", DEVICE, quantizer="rtn", metric="hessian")
        peaks[n_blocks] = device.peak
    assert peaks[8] - peaks[2] < one_block / 2


@pytest.mark.usefixtures("plain_torch")
def test_the_device_refuses_what_cuda_refuses():
    with EmulatedDevice():
        here, elsewhere = torch.ones(3, device=DEVICE), torch.ones(3)
        assert here.device == torch.device(DEVICE) and (here * 2)[0].is_cuda
        for mix in (
            lambda: here + elsewhere,
            lambda: elsewhere.addcmul_(here, here),
            lambda: torch.cat([here, elsewhere]),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
            lambda: elsewhere[torch.zeros(1, dtype=torch.long, device=DEVICE)],
        ):
            with pytest.raises(DeviceMismatch):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3]
        elsewhere.copy_(here * 4)
        assert not elsewhere.is_cuda and elsewhere.tolist() == [4, 4, 4]
        assert not here.cpu().is_cuda and here[torch.tensor([1])].is_cuda


@needs_gpu
def test_a_gpu_quantizes_as_well_as_the_cpu(tiny_folder, tmp_path):
    """Sums have another order there: some weights go the other way, and plans where costs tie."""
    results = {}
    for device in ("cpu", "cuda"):
        results[device] = lwquant.quantize(
            tiny_folder, bpw=3.6, output=tmp_path / device, recipe=SMALL.changed(n_samples=12),
            device=device, progress=lambda *_: None,
        )  # fmt: skip
    assert results["cuda"].bpw == pytest.approx(results["cpu"].bpw, rel=0.02)
    kl = [result.held_out.kl_divergence for result in results.values()]
    assert kl[1] == pytest.approx(kl[0], rel=0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_any_work(tiny_folder, tmp_path, device):
    refused = rf"device '{device}' cannot be used with this torch"
    with pytest.raises(LwquantError, match=refused):
        lwquant.quantize(tiny_folder, bpw=4, output=tmp_path / "out", device=device)
    with pytest.raises(LwquantError, match=refused):
        lwquant.evaluate(tiny_folder, text=Path(__file__), device=device)
    assert not (tmp_path / "out").exists()
