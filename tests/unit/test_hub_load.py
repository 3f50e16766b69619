"""A model that was pushed is loaded by its Hub id, by plain transformers."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_server import Hub, hub_server, use_hub
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwquant
from lwquant.export.folder import write_manifest
from lwquant.export.hub import push_to_hub
from lwquant.export.record import CalibrationRecord, LinearRecord, RunRecord
from lwquant.export.save import ModelWriter
from lwquant.model.checkpoint import Checkpoint
from lwquant.model.decoder import Decoder
from lwquant.nn.linear import QuantizedLinear
from lwquant.quantizers.rtn import rtn
from lwquant.scheme import QuantScheme
from lwquant.types import plan_bpw

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TINY = Path(__file__).parents[1] / "data" / "tiny"
REPO = "ann/tiny-3b"
SHARD_BYTES = 120_000

LOAD = f"""
import json, sys
import lwquant, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = AutoTokenizer.from_pretrained("{REPO}")(sys.argv[1], return_tensors="pt").input_ids
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained("{REPO}")(tokens).logits
json.dump(logits[0, -1].tolist(), sys.stdout)
"""


@dataclass(frozen=True)
class Pushed:
    hub: Hub
    folder: Path


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The tiny model in 3 and 4 bits, sharded, pushed to a private repository."""
    folder = quantized(tmp_path_factory.mktemp("result"))
    with hub_server() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub, tmp_path_factory.mktemp("home"))
        push_to_hub(folder, REPO, token=hub.token, endpoint=hub.url)
        yield Pushed(hub, folder)


def quantized(folder: Path) -> Path:
    decoder = Decoder.open(Checkpoint.open(TINY))
    schemes = {s.name: QuantScheme(3 + s.block % 2, 32) for s in decoder.linears}
    writer = ModelWriter(
        folder, decoder.source, decoder.linears, decoder.model, decoder.key_of, SHARD_BYTES
    )
    for spec in decoder.linears:
        weight = decoder.source.read(decoder.key_of(f"{spec.name}.weight"))
        writer.linear(spec, rtn(weight, None, schemes[spec.name]))
    bpw = plan_bpw(schemes, decoder.linears)
    n_bytes = writer.finish(schemes, bpw, TINY)
    record = RunRecord(
        lwquant=lwquant.__version__,
        base_model=str(TINY.resolve()),
        command="lwquant quantize tests/data/tiny",
        seed=0,
        calibration=CalibrationRecord("none", 0, 0, ""),
        metric={},
        allocator={},
        quantizer={"name": "rtn"},
        budget={"bpw": bpw},
        bpw=bpw,
        size_bytes=n_bytes,
        original_size_bytes=(TINY / "model.safetensors").stat().st_size,
        linears={name: LinearRecord(scheme) for name, scheme in schemes.items()},
    )
    (folder / "lwquant.json").write_text(record.to_json())
    write_manifest(folder)
    return folder


@torch.no_grad()
def last_logits(source: str | Path, text: str) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids
    return AutoModelForCausalLM.from_pretrained(source)(tokens).logits[0, -1]


def test_a_pushed_model_is_loaded_by_its_hub_id(pushed):
    assert len(list(pushed.folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(REPO)
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 4 * 7
    assert torch.equal(
        last_logits(REPO, "The value is"), last_logits(pushed.folder, "The value is")
    )


def test_another_process_loads_it_with_nothing_but_the_hubs_address_and_a_token(pushed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "The value is"],
        env=pushed.hub.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(logits, last_logits(pushed.folder, "The value is"))


def test_without_a_token_the_private_model_is_not_to_be_had(pushed, monkeypatch, tmp_path):
    use_hub(monkeypatch, pushed.hub, tmp_path)  # an empty cache
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=f"{REPO} is not a local folder and is not a valid model"):
        AutoModelForCausalLM.from_pretrained(REPO)
