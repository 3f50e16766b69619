"""Where a model is: local paths never reach the hub, and hub ids bring only harmless files."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from lwquant.errors import CheckpointError
from lwquant.model.checkpoint import resolve


def test_a_local_folder_resolves_to_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["", "./none", "../none", "/none", "~/none", "a/b/c", "x.gguf"])
def test_a_local_path_that_does_not_exist_is_refused_without_asking_the_hub(model, no_hub):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(model)


def test_a_path_object_is_never_a_hub_id(no_hub):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(Path("user/none"))


def test_a_file_that_is_no_model_is_refused(tmp_path, no_hub):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither a model folder nor a \.gguf file"):
        resolve(tmp_path / "weights.bin")


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="revision='main' has no meaning"):
        resolve(tmp_path, revision="main")


def test_a_name_too_long_for_the_file_system_is_refused(no_hub):
    with pytest.raises(CheckpointError, match="cannot be read"):
        resolve("a" * 5000)


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*_args: object, **_settings: object) -> str:
        pytest.fail("the hub was asked")  # no Exception, so nothing turns it into an error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_nothing_that_can_run_is_asked_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(model: str, **request: object) -> str:
        asked.update(request, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("user/model", revision="v1") == tmp_path
    assert (asked["model"], asked["revision"]) == ("user/model", "v1")

    repo = ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.model"]
    unsafe = ["pytorch_model.bin", "modeling_x.py", "model.pt", "model.gguf", "onnx/config.json"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        [*repo, *unsafe],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(chosen) == repo


def test_an_unreachable_hub_is_an_error_that_says_so(monkeypatch):
    def fail(*_args: object, **_settings: object) -> str:
        raise LocalEntryNotFoundError("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"'user/model'.*hub cannot be reached.*refused"):
        resolve("user/model")


def test_a_name_that_is_no_hub_id_is_refused_before_any_request():
    with pytest.raises(CheckpointError, match="neither an existing path nor a hub id"):
        resolve("no such model")
