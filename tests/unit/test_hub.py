"""Pushing a result with the real client of huggingface_hub to a small Hub on localhost."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import hub_server, use_hub
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from lwquant.errors import OutputError
from lwquant.export.folder import MANIFEST, verify, write_manifest
from lwquant.export.hub import push_to_hub
from lwquant.export.record import CalibrationRecord, EvaluationRecord, LinearRecord, RunRecord
from lwquant.scheme import QuantScheme

# huggingface_hub 2.4 uploads over LFS with an argument that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "ann/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RECORD = RunRecord(
    lwquant="0.1.0",
    base_model="/home/secret/base",
    command="lwquant quantize /home/secret/base --bpw 3.5",
    seed=0,
    calibration=CalibrationRecord("builtin", 4, 32, "ab" * 32),
    metric={"name": "kl"},
    allocator={"name": "exact"},
    quantizer={"name": "gptq"},
    budget={"bpw": 3.5},
    bpw=3.497,
    size_bytes=2000,
    original_size_bytes=8000,
    linears={"layers.0.q_proj": LinearRecord(QuantScheme(3, scale_bits=8), 0.5)},
)
EVALUATION = EvaluationRecord("t.txt", 21.5, 6132, 3.497, 2000, 18.25, 0.12, 0.875)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return result(tmp_path / "out", SHARDS)


def result(folder: Path, weights: tuple[str, ...]) -> Path:
    """A complete result: small text files, one text large enough for LFS, and weights."""
    (folder / "additional_chat_templates").mkdir(parents=True)
    config = {"quantization_config": {"quant_method": "lwquant", "version": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": "x" * 5000}))
    (folder / "additional_chat_templates" / "t.jinja").write_text("{{ text }}")
    (folder / "lwquant.json").write_text(RECORD.to_json())
    (folder / "evaluation.json").write_text(EVALUATION.to_json())
    for seed, name in enumerate(weights):
        torch.manual_seed(seed)
        save_file({f"w{seed}": torch.randn(40, 50)}, folder / name)
    write_manifest(folder)
    return folder


def push(hub, folder, repo_id=REPO, **options) -> str:
    options = {"token": hub.token, "endpoint": hub.url} | options
    return push_to_hub(folder, repo_id, **options)


def writes(hub) -> list[str]:
    return [path for method, path, _ in hub.requests if method not in ("GET", "HEAD")]


# ---------------------------------------------------------------- success


def test_what_was_pushed_comes_back_and_is_a_complete_result(hub, folder, tmp_path):
    assert push(hub, folder) == f"{hub.url}/{REPO}"
    down = tmp_path / "down"
    snapshot_download(REPO, token=hub.token, endpoint=hub.url, cache_dir=down)
    (down,) = down.glob("models--*/snapshots/*")
    verify(down)
    found = {p.relative_to(down).as_posix(): p.read_bytes() for p in down.rglob("*") if p.is_file()}
    sent = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(found) == {*sent, "README.md", ".gitattributes"}
    for name in set(sent) - {MANIFEST, "lwquant.json"}:
        assert found[name] == sent[name].read_bytes(), name


def test_weights_and_large_texts_go_through_lfs_in_one_commit(hub, folder):
    push(hub, folder, commit_message="the first")
    repo = hub.repos[REPO]
    assert repo.messages == ["initial commit", "the first"]
    tree = repo.commits[repo.branches["main"]]
    assert {name for name, blob in tree.items() if blob.lfs} == {*SHARDS, "tokenizer.json"}
    assert len(hub.uploads) == 3


def test_a_push_is_private_unless_told_otherwise(hub, folder):
    push(hub, folder)
    assert hub.repos[REPO].private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info(REPO)
    push(hub, folder, "ann/open", private=False)
    assert HfApi(endpoint=hub.url, token=False).model_info("ann/open").private is False


def test_the_card_is_made_from_the_record_and_tells_no_local_path(hub, folder):
    push(hub, folder)
    files = hub.repos[REPO].files()
    card = files["README.md"].decode()
    assert f'from_pretrained("{REPO}")' in card and "| 18.250 | 21.500 |" in card
    assert b"secret" not in b"".join(files.values())
    assert json.loads(files["lwquant.json"])["command"] == "lwquant quantize base --bpw 3.5"


def test_the_license_on_the_base_models_card_is_passed_on(hub, folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (folder / "lwquant.json").write_text(replace(RECORD, base_model=str(base)).to_json())
    write_manifest(folder)
    push(hub, folder)
    assert b'\nlicense: "apache-2.0"\n' in hub.repos[REPO].files()["README.md"]


def test_a_revision_becomes_a_branch_and_main_stays(hub, folder):
    assert push(hub, folder, revision="w3") == f"{hub.url}/{REPO}/tree/w3"
    assert set(SHARDS) <= set(hub.repos[REPO].files("w3"))
    assert hub.repos[REPO].files("main") == {}


def test_pushing_the_same_again_changes_nothing(hub, folder):
    push(hub, folder)
    push(hub, folder)
    assert len(hub.repos[REPO].messages) == 2 and len(hub.uploads) == 3


def test_weights_of_an_earlier_result_are_replaced_in_the_same_commit(hub, folder, tmp_path):
    push(hub, result(tmp_path / "single", ("model.safetensors",)))
    push(hub, folder)
    names = set(hub.repos[REPO].files())
    assert "model.safetensors" not in names and set(SHARDS) <= names
    assert len(hub.repos[REPO].messages) == 3


def test_progress_names_every_file(hub, folder):
    seen = []
    push(hub, folder, progress=lambda *step: seen.append(step))
    assert {*SHARDS, "README.md", MANIFEST} <= {item for _, item, _, _ in seen}
    assert {stage for stage, *_ in seen} == {"push"} and seen[-1][2] == seen[-1][3]


def test_nothing_is_printed(hub, folder, capfd):
    push(hub, folder)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_token_of_the_machine_is_used_where_none_is_given(hub, folder):
    push(hub, folder, token=None)
    assert set(SHARDS) <= set(hub.repos[REPO].files())


# ---------------------------------------------------------------- refused before anything is sent


def flip_a_byte(folder: Path) -> None:
    path = folder / SHARDS[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lose_the_quantization(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(folder)


def change_the_method(folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)


def name_an_unknown_format(folder: Path) -> None:
    (folder / "lwquant.json").write_text(replace(RECORD, format="awq").to_json())
    write_manifest(folder)


def lose_the_record(folder: Path) -> None:
    (folder / "lwquant.json").unlink()
    write_manifest(folder)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda folder: (folder / SHARDS[0]).unlink(), f"{SHARDS[0]}: is missing"),
        (flip_a_byte, f"{SHARDS[1]}: was changed"),
        (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
        (lambda folder: (folder / "key.pem").touch(), "key.pem: is not in"),
        (lose_the_quantization, "config.json: has no quantization_config"),
        (change_the_method, "quant_method 'lwquant'"),
        (name_an_unknown_format, "format 'awq', which is not known"),
        (lose_the_record, "lwquant.json: cannot be read"),
    ],
)
def test_an_incomplete_folder_is_refused_and_nothing_is_sent(hub, folder, spoil, told):
    spoil(folder)
    with pytest.raises(OutputError, match=told):
        push(hub, folder)
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.parametrize("repo_id", ["", "tiny", "ann/tiny/x", "ann/a b", "ann/a--b", "../tiny"])
def test_a_malformed_repository_is_refused_and_nothing_is_sent(hub, folder, repo_id):
    with pytest.raises(OutputError, match=f"^repository {repo_id!r}"):
        push(hub, folder, repo_id)
    assert hub.requests == []


def test_without_a_token_nothing_is_sent(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match="hf auth login"):
        push(hub, folder, token=None)
    assert hub.requests == []


def test_an_endpoint_that_is_no_url_is_refused(folder):
    with pytest.raises(OutputError, match="'localhost' does not begin with"):
        push_to_hub(folder, REPO, token="t", endpoint="localhost")


# ---------------------------------------------------------------- refused by the Hub


def test_a_wrong_token_is_said_and_makes_nothing(hub, folder):
    with pytest.raises(OutputError, match="does not accept the token") as error:
        push(hub, folder, token="hf_wrong")
    assert hub.repos == {} and "hf_wrong" not in str(error.value)


def test_a_token_that_may_only_read_is_said_and_makes_nothing(hub, folder):
    with pytest.raises(OutputError, match="gives no permission to write"):
        push(hub, folder, token=hub.read_token)
    assert hub.repos == {}


def test_somebody_elses_name_is_refused(hub, folder):
    with pytest.raises(OutputError, match="gives no permission to write"):
        push(hub, folder, "bob/tiny")
    assert hub.repos == {}


def test_a_hub_that_is_not_there_is_said(folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(OutputError, match=f"{endpoint} cannot be reached"):
        push_to_hub(folder, REPO, token="t", endpoint=endpoint)


@pytest.mark.parametrize("private, found", [(True, "public"), (False, "private")])
def test_nothing_goes_to_a_repository_of_another_visibility(hub, folder, private, found):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(REPO, private=not private)
    with pytest.raises(OutputError, match=f"exists and is {found}"):
        push(hub, folder, private=private)
    assert hub.repos[REPO].files() == {} and hub.uploads == []


def test_weights_that_are_not_ours_are_never_deleted(hub, folder):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(REPO, private=True)
    theirs = {"path_or_fileobj": b"weights", "path_in_repo": "pytorch_model.bin"}
    api.upload_file(**theirs, repo_id=REPO)
    with pytest.raises(OutputError, match=r"holds other weights, pytorch_model\.bin"):
        push(hub, folder)
    assert set(hub.repos[REPO].files()) == {"pytorch_model.bin"} and hub.uploads == []


# ---------------------------------------------------------------- a Hub that fails half-way


@pytest.fixture
def impatient(monkeypatch):
    """The client tries again five times, without the seconds it waits in between."""
    from huggingface_hub.utils import _http

    class Impatient:
        def __getattr__(self, name):
            import time

            return (lambda seconds: None) if name == "sleep" else getattr(time, name)

    monkeypatch.setattr(_http, "time", Impatient())


def test_an_upload_refused_half_way_leaves_no_commit(hub, folder):
    hub.faults.lfs_uploads = 1
    with pytest.raises(OutputError, match=r"Error while uploading.*no permission"):
        push(hub, folder)
    assert len(hub.uploads) == 1
    assert hub.repos[REPO].messages == ["initial commit"] and hub.repos[REPO].files() == {}


def test_a_connection_cut_within_a_file_leaves_no_commit(hub, folder, impatient):
    hub.faults.cut_uploads = True
    with pytest.raises(OutputError, match=r"Error while uploading.*cannot be reached"):
        push(hub, folder)
    assert hub.repos[REPO].messages == ["initial commit"] and hub.uploads == []


def test_a_push_that_failed_can_be_done_again(hub, folder):
    hub.faults.lfs_uploads = 1
    with pytest.raises(OutputError):
        push(hub, folder)
    hub.faults.lfs_uploads = None
    push(hub, folder)
    assert set(SHARDS) <= set(hub.repos[REPO].files()) and len(hub.uploads) == 3


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "README.md"])
def test_a_file_that_did_not_arrive_is_an_error(hub, folder, name):
    hub.faults.lose = name
    with pytest.raises(OutputError, match=f"{name} did not arrive"):
        push(hub, folder)


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "README.md"])
def test_a_file_that_arrived_changed_is_an_error(hub, folder, name):
    hub.faults.damage = name
    with pytest.raises(OutputError, match=f"{name} arrived changed"):
        push(hub, folder)


def test_a_push_between_ours_is_not_overwritten(hub, folder):
    hub.faults.move = True
    with pytest.raises(OutputError, match="somebody else pushed"):
        push(hub, folder)
    assert hub.repos[REPO].files() == {}


def test_use_hub_is_undone(monkeypatch, tmp_path):
    before = constants.ENDPOINT, constants.HF_HUB_CACHE
    with hub_server() as hub, monkeypatch.context() as patch:
        use_hub(patch, hub, tmp_path)
        assert constants.ENDPOINT == hub.url
    assert (constants.ENDPOINT, constants.HF_HUB_CACHE) == before
