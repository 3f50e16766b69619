"""A result folder appears whole or not at all; verify finds whatever is wrong with one."""

import json
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lwquant.errors import OutputError
from lwquant.export.folder import MANIFEST, check_output, new_folder, verify, write_manifest


def result(folder: Path) -> Path:
    """A complete result of three files."""
    with new_folder(folder) as partial:
        fill(partial)
    return folder


def fill(partial: Path) -> None:
    (partial / "config.json").write_text('{"a": 1}')
    (partial / "sub").mkdir()
    (partial / "sub" / "notes.txt").write_text("hello")
    save_file({"w": torch.arange(8.0)}, partial / "model.safetensors")
    write_manifest(partial)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------- appearing


def test_the_folder_appears_only_when_the_block_is_done(tmp_path):
    output = tmp_path / "out"
    with new_folder(output) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".out.partial-")
        (partial / "config.json").write_text("{}")
        assert not output.exists()
    assert everything(tmp_path) == ["out", "out/config.json"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    verify(result(tmp_path / "out"))


def test_a_relative_output_is_where_the_run_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("out") as partial:
        (partial / "f").touch()
        monkeypatch.chdir("/")
    assert (tmp_path / "out" / "f").is_file()


def test_others_may_read_the_result_as_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "plain", result(tmp_path / "out"))]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_folder(tmp_path / "out") as partial:
        fill(partial)
        raise error
    assert everything(tmp_path) == []


def killed_run(output: Path, signum: int) -> int:
    """Fork a run that writes to `output` until it gets `signum`; its wait status."""
    started, tell = os.pipe()
    child = os.fork()
    if child == 0:
        # A shell that runs the tests in the background makes them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with new_folder(output) as partial:
                fill(partial)
                os.write(tell, b"!")
                time.sleep(60)
        finally:
            os._exit(3)  # nothing of pytest may run in the child
    assert os.read(started, 1) == b"!"
    os.kill(child, signum)
    status = os.waitpid(child, 0)[1]
    os.close(started)
    os.close(tell)
    return status


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_interrupted_run_leaves_nothing(tmp_path):
    assert os.waitstatus_to_exitcode(killed_run(tmp_path / "out", signal.SIGINT)) == 3
    assert everything(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_leaves_only_a_hidden_folder(tmp_path):
    assert os.waitstatus_to_exitcode(killed_run(tmp_path / "out", signal.SIGKILL)) < 0
    assert [path.name[:13] for path in tmp_path.iterdir()] == [".out.partial-"]
    verify(result(tmp_path / "out"))


# ---------------------------------------------------------------- refusing


def refused(output: Path | str, *words: str, overwrite: bool = False) -> None:
    """Both the early check and the real thing refuse, the latter before its block runs."""
    for attempt in (check_output, new_folder):
        with pytest.raises(OutputError) as caught:
            if attempt is check_output:
                check_output(output, overwrite)
            else:
                with new_folder(output, overwrite):
                    pytest.fail("the block ran")
        for word in (str(output), *words):
            assert word in str(caught.value)


def test_an_existing_result_is_refused_and_kept(tmp_path):
    refused(result(tmp_path / "out"), "exists and is not empty")
    verify(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_a_file_at_the_output_is_refused(tmp_path):
    (tmp_path / "out").touch()
    refused(tmp_path / "out", "exists and is not a folder")


def test_a_missing_parent_is_refused(tmp_path):
    refused(tmp_path / "none" / "out", "its parent", "is not an existing folder")


def test_a_file_as_parent_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "out", "its parent", "is not an existing folder")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_parent_that_takes_no_folders_is_refused():
    refused("/proc/out", "/proc cannot be written")


def test_the_early_check_changes_nothing(tmp_path):
    check_output(tmp_path / "out")
    assert everything(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="cannot be put there"):
        with new_folder(tmp_path / "out") as partial:
            fill(partial)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()
    assert everything(tmp_path) == ["out", "out/theirs"]


# ---------------------------------------------------------------- overwriting


def test_an_old_result_is_replaced_when_asked(tmp_path):
    result(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").touch()
        verify(tmp_path / "out")
    assert everything(tmp_path) == ["out", "out/new"]


def test_overwriting_a_free_path_is_fine(tmp_path):
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
    verify(tmp_path / "out")


def test_a_failed_overwrite_keeps_the_old_result(tmp_path):
    result(tmp_path / "out")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    verify(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1


def test_an_overwrite_that_fails_in_the_last_step_restores_the_old_result(tmp_path, monkeypatch):
    result(tmp_path / "out")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match=r"out: the result cannot be put there: Input/output"):
        with new_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "new").touch()
    verify(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_ours_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    refused(tmp_path / "home", "is not overwritten", MANIFEST, overwrite=True)
    assert everything(tmp_path) == ["home", "home/thesis.txt"]


# ---------------------------------------------------------------- verifying


def bad(folder: Path, *words: str) -> None:
    with pytest.raises(OutputError) as caught:
        verify(folder)
    for word in words:
        assert word in str(caught.value)


def test_the_manifest_lists_every_file_but_itself(tmp_path):
    manifest = json.loads((result(tmp_path / "out") / MANIFEST).read_text())
    assert list(manifest["files"]) == ["config.json", "model.safetensors", "sub/notes.txt"]
    assert manifest["files"]["sub/notes.txt"] == {
        "bytes": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    }


def test_a_complete_result_verifies(tmp_path):
    verify(result(tmp_path / "out"))


def test_hidden_files_of_other_tools_do_not_matter(tmp_path):
    (result(tmp_path / "out") / ".gitattributes").touch()
    verify(tmp_path / "out")


def test_a_result_without_manifest_is_refused(tmp_path):
    (result(tmp_path / "out") / MANIFEST).unlink()
    bad(tmp_path / "out", f"has no {MANIFEST}", "not a complete result")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub/notes.txt"])
def test_a_missing_file_is_named(name, tmp_path):
    (result(tmp_path / "out") / name).unlink()
    bad(tmp_path / "out", name, "is missing")


def test_a_file_of_the_right_size_with_other_bytes_is_named(tmp_path):
    (result(tmp_path / "out") / "config.json").write_text('{"a": 2}')
    bad(tmp_path / "out", "config.json", "was changed")


def test_a_shortened_file_is_named_with_both_sizes(tmp_path):
    (result(tmp_path / "out") / "config.json").write_text("{")
    bad(tmp_path / "out", "config.json", f"has 1 bytes, {MANIFEST} says 8")


def test_an_extra_file_is_named(tmp_path):
    (result(tmp_path / "out") / "sub" / "extra.bin").touch()
    bad(tmp_path / "out", "sub/extra.bin", "is not in")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "lists no files"),
        ('{"files": {}}', "lists no files"),
        ('{"files": {"config.json": 3}}', "has no bytes and sha256 for 'config.json'"),
    ],
)
def test_a_damaged_manifest_is_refused(content, words, tmp_path):
    (result(tmp_path / "out") / MANIFEST).write_text(content)
    bad(tmp_path / "out", MANIFEST, words)


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path):
    (tmp_path / "secret").touch()
    path = result(tmp_path / "out") / MANIFEST
    path.write_text('{"files": {"../secret": {"bytes": 0, "sha256": ""}}}')
    bad(tmp_path / "out", "'../secret'", "leaves the folder")


def test_weights_that_were_damaged_before_the_manifest_are_refused(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
        whole = (partial / "model.safetensors").read_bytes()
        (partial / "model.safetensors").write_bytes(whole[:-4])
        write_manifest(partial)
    bad(tmp_path / "out", "model.safetensors", "truncated", "tensor 'w'")


@settings(max_examples=50, deadline=None, database=None)
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "sub/notes.txt", MANIFEST]),
    share=st.floats(0, 1, exclude_max=True),
)
def test_every_truncated_file_is_named(name, share):
    with tempfile.TemporaryDirectory() as parent:
        (Path(parent) / "out").mkdir()
        fill(Path(parent) / "out")
        path = Path(parent) / "out" / name
        whole = path.read_bytes().rstrip()  # the manifest is as good without its last newline
        path.write_bytes(whole[: int(share * len(whole))])
        bad(path.parents[name.count("/")], name)
