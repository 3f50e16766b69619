"""Publishes a result folder on the Hugging Face Hub: whole, verified, in one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    metadata_load,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from lwquant.errors import OutputError
from lwquant.export.card import CARD, license_of, model_card
from lwquant.export.folder import MANIFEST, verify
from lwquant.export.loaders import loader_of
from lwquant.export.public import is_hub_id, public_files, public_manifest
from lwquant.export.record import EVALUATION_FILE, read_evaluation, read_run
from lwquant.model.model_folder import read_json
from lwquant.progress import Progress, silent

STAGE = "push"

# What from_pretrained could load in place of our files, were it left beside them.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")

Files = Mapping[str, Path | bytes]


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
    progress: Progress = silent,
) -> str:
    """Send a complete result to the repository "user/name" and return its URL.

    The repository is made where it does not exist. One that exists must be as private as asked:
    its visibility is never changed, and nothing private goes to a public one. Weights that an
    earlier result left there are deleted in the same commit, foreign ones are refused.

    Args:
        token: an access token with write permission; the one of `hf auth login` by default.
        revision: the branch, made from the default one where it does not exist.
        endpoint: another Hub than huggingface.co.

    Raises OutputError, and sends nothing, where the folder is not a complete result, the id is
    malformed or there is no token; and where the Hub refuses, cannot be reached, or does not hold
    afterwards exactly what was sent.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    if endpoint is not None and not endpoint.startswith(("https://", "http://")):
        raise OutputError(f"endpoint {endpoint!r} does not begin with https:// or http://")
    progress(STAGE, "verify", 0, 1)
    files = published(folder, repo_id)
    api = HfApi(endpoint=endpoint, token=_token(token))
    with _quiet(), _explained(repo_id, api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if info.private is not private:
            found, flag = ("private", True) if info.private else ("public", False)
            raise OutputError(
                f"{repo_id}: exists and is {found}; to push there say private={flag}, or change "
                "it in its settings on the Hub"
            )
        stale = _stale_weights(api, repo_id, info.sha, files)
        additions = _upload(api, repo_id, files, revision, progress)
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message or "Upload a model quantized by lwquant",
            revision=revision,
            parent_commit=info.sha,  # refused where somebody else pushed meanwhile
        )
        _check_arrival(api, repo_id, commit.oid, files)
    progress(STAGE, repo_id, len(files), len(files))
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def published(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """All that a push of `folder` sends: its files, a model card, and the manifest of both.

    Raises OutputError where the folder is not complete or its config.json would load as an
    unquantized model.
    """
    verify(folder)
    record, evaluation = read_run(folder), read_evaluation(folder)
    files = public_files(folder)
    if evaluation is not None and EVALUATION_FILE not in files:
        raise OutputError(f"{folder / EVALUATION_FILE}: is not in {MANIFEST}")
    _check_config(folder, files, loader_of(record.format).quant_method)
    files.pop(CARD, None)  # of an earlier push; it is made anew
    sizes = {name: _n_bytes(content) for name, content in files.items()}
    card = model_card(
        record, evaluation, sizes, repo_id=repo_id, license=_base_license(record.base_model)
    )
    files[CARD] = card.encode()
    files[MANIFEST] = public_manifest(folder, files)
    return files


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OutputError(f"repository {repo_id!r}: {error}") from error
    if not is_hub_id(repo_id):
        raise OutputError(f"repository {repo_id!r} is not of the form 'user/name'")


def _token(token: str | None) -> str:
    token = (token or get_token() or "").strip()
    if not token:
        raise OutputError(
            "there is no Hub token: log in once with `hf auth login`, or pass one with write "
            "permission"
        )
    return token


def _check_config(folder: Path, files: Files, method: str | None) -> None:
    path = folder / "config.json"
    content = files.get("config.json")
    if not isinstance(content, bytes):
        raise OutputError(f"{path}: is missing")
    try:
        config = json.loads(content)
    except ValueError as error:
        raise OutputError(f"{path}: is not JSON: {error}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != method:
        named = f" with quant_method {method!r}" if method else ""
        raise OutputError(
            f"{path}: has no quantization_config{named}, so nobody could load these weights"
        )


def _base_license(base_model: str) -> dict[str, object]:
    """The license on the base model's card, where this machine has that card."""
    if is_hub_id(base_model):
        cached = try_to_load_from_cache(base_model, CARD)
        card = Path(cached) if isinstance(cached, str) else None
    else:
        card = Path(base_model) / CARD
    if card is None or not card.is_file():
        return {}
    try:
        return license_of(metadata_load(card))
    except Exception:  # the YAML library's errors: a header that is no YAML states no license
        return {}


def _upload(
    api: HfApi, repo_id: str, files: Files, revision: str | None, progress: Progress
) -> list[CommitOperationAdd]:
    """Store the large files, which nobody sees before a commit names them."""
    additions = []
    for done, (name, content) in enumerate(files.items()):
        progress(STAGE, name, done, len(files))
        addition = CommitOperationAdd(name, content)
        api.preupload_lfs_files(repo_id, [addition], revision=revision)
        additions.append(addition)
    return additions


def _stale_weights(api: HfApi, repo_id: str, commit: str | None, files: Files) -> list[str]:
    """Weight files in the repository that an earlier result left and this one does not replace.

    Beside our index a single `model.safetensors` of an earlier push would be what loads. Weights
    that no manifest of ours lists are somebody's, so OutputError.
    """
    present = _remote_files(api, repo_id, commit)
    others = [n for n in present if n.endswith(WEIGHT_SUFFIXES) and n not in files]
    if not others:
        return []
    ours: dict[str, object] = {}
    if MANIFEST in present:
        with TemporaryDirectory() as aside:
            path = api.hf_hub_download(repo_id, MANIFEST, revision=commit, local_dir=aside)
            listed = read_json(Path(path)).get("files")
        ours = listed if isinstance(listed, dict) else {}
    if foreign := [name for name in others if name not in ours]:
        raise OutputError(f"{repo_id}: holds other weights, {foreign[0]}; push to a new repository")
    return others


def _remote_files(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_arrival(api: HfApi, repo_id: str, commit: str, files: Files) -> None:
    """OutputError naming the first file that the commit lacks or holds otherwise than sent."""
    manifest = json.loads(_bytes(files[MANIFEST]))["files"]
    remote = _remote_files(api, repo_id, commit)
    for name, content in files.items():
        if name not in remote:
            raise OutputError(f"{repo_id}: {name} did not arrive; the upload is not complete")
        entry = remote[name]
        if entry.lfs is not None and name in manifest:
            same = entry.lfs.sha256 == manifest[name]["sha256"]
        else:
            same = entry.blob_id == _git_oid(_bytes(content))
        if entry.size != _n_bytes(content) or not same:
            raise OutputError(
                f"{repo_id}: {name} arrived changed, {entry.size} bytes for {_n_bytes(content)}; "
                "the upload is not usable"
            )


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _n_bytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of huggingface_hub on stderr: the caller has our progress callback."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into OutputError that says what the user can do."""
    try:
        yield
    except OutputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{repo_id}: {_reason(error, endpoint)}") from error


def _reason(error: BaseException, endpoint: str) -> str:
    # The client wraps a failed upload of one file in a RuntimeError that says no more than that.
    cause = error.__cause__
    if isinstance(error, RuntimeError) and cause is not None:
        return f"{error} {_reason(cause, endpoint)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"{endpoint} does not accept the token, or it has expired"
        if status in (403, 404):
            return f"the token gives no permission to write there ({endpoint} says {status})"
        if status == 412:
            return "somebody else pushed there at the same time; try again"
        return f"{endpoint} refused: {error}"
    if isinstance(error, HTTPError):
        return f"{endpoint} cannot be reached: {error}"
    return f"the push failed: {error}"
