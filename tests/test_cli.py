"""The command line: names, JSON keys and exit statuses are a contract."""

import json
import subprocess
import sys

import pytest

from lwquant.cli import main


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of one call in this process."""
    monkeypatch.setattr(sys, "argv", ["lwquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, heldout_text):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text(heldout_text[:12000])
    (folder / "small.toml").write_text(
        f'sources = ["{folder}/text.txt"]\nn_samples = 8\nseq_len = 64\nheld_out = 2\n'
        "sensitivity_samples = 4\ngroup_size = 32\n"
    )
    return folder / "small.toml"


def test_the_stages_hand_their_files_on(
    monkeypatch, capsys, tiny_folder, tiny_tokenizer, recipe, heldout_text, tmp_path
):
    report, plan, out = (tmp_path / name for name in ("report.json", "plan.json", "out"))
    text = tmp_path / "test.txt"
    text.write_text(heldout_text[16000:22000])
    status, shown, progress = run(
        monkeypatch, capsys, "sensitivity", tiny_folder, "--output", report, "--recipe", recipe
    )
    assert status == 0 and "costliest" in shown and "elapsed" in progress
    status, shown, _ = run(
        monkeypatch, capsys, "plan", report, "--bpw", 3.5, "--output", plan, "--recipe", recipe
    )
    assert status == 0 and "bits per weight" in shown
    status, shown, _ = run(
        monkeypatch,
        capsys,
        "quantize",
        tiny_folder,
        "--plan",
        plan,
        "--output",
        out,
        "--recipe",
        recipe,
        "--json",
    )
    assert status == 0
    made = json.loads(shown)
    assert made["bpw"] <= 3.5 and made["output"] == str(out)

    status, shown, _ = run(monkeypatch, capsys, "inspect", out, "--json")
    found = json.loads(shown)
    assert found["bpw"] == made["bpw"] and found["size_bytes"] == made["size_bytes"]
    assert len(found["linears"]) == 28
    assert all({"bits", "group_size", "metric_cost"} <= e.keys() for e in found["linears"].values())
    assert run(monkeypatch, capsys, "inspect", out, "--plot", tmp_path / "bits.png")[0] == 0
    assert (tmp_path / "bits.png").stat().st_size > 10_000

    status, shown, _ = run(
        monkeypatch,
        capsys,
        "evaluate",
        out,
        "--text",
        text,
        "--reference",
        tiny_folder,
        "--seq-len",
        64,
        "--windows",
        4,
        "--save",
        "--json",
    )
    assert status == 0
    measured = json.loads(shown)
    assert {
        "perplexity",
        "reference_perplexity",
        "kl_divergence",
        "top1_agreement",
        "tokens",
        "bpw",
        "size_bytes",
    } <= measured.keys()
    assert measured["tokens"] == 4 * 63 and measured["bpw"] == made["bpw"]
    kept = json.loads((out / "evaluation.json").read_text())
    assert kept["perplexity"] == measured["perplexity"] and kept["text"] == "test.txt"
    assert run(monkeypatch, capsys, "inspect", out)[0] == 0  # still complete

    spread = ("--seq-len", 64, "--stride", 32, "--json")
    status, shown, _ = run(monkeypatch, capsys, "evaluate", out, "--text", text, *spread)
    tokens = tiny_tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert status == 0 and json.loads(shown)["tokens"] == len(tokens) - 1


def test_sweep_writes_a_table_a_csv_and_a_picture(
    monkeypatch, capsys, tiny_folder, recipe, tmp_path
):
    status, shown, _ = run(
        monkeypatch,
        capsys,
        "sweep",
        tiny_folder,
        "--bpw",
        "2.8,4",
        "--output",
        tmp_path / "sweep",
        "--recipe",
        recipe,
        "--metric",
        "outlier_count",
        "--quantizer",
        "rtn",
        "--correction",
        "none",
    )
    assert status == 0 and "mixed" in shown and "uniform" in shown
    lines = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("series,bpw") and sum(x.startswith("mixed") for x in lines) == 2
    assert sum(x.startswith("uniform") for x in lines) >= 2
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    plans = list((tmp_path / "sweep").glob("plan-mixed-*.json"))
    assert len(plans) == 2
    assert (tmp_path / "sweep" / "agreement.png").stat().st_size > 10_000
    names = lines[0].split(",")
    predicted = [
        float(line.split(",")[names.index("predicted_cost")])
        for line in lines
        if line.startswith("mixed")
    ]
    wanted = [
        sum(linear["cost"] for linear in json.loads(path.read_text())["linears"].values())
        for path in plans
    ]
    assert sorted(predicted) == pytest.approx(sorted(wanted))
    report = json.loads((tmp_path / "sweep" / "sensitivity.json").read_text())
    narrow = min(
        (line for line in lines[1:] if line.startswith("uniform")),
        key=lambda line: float(line.split(",")[1]),
    )
    scheme = report["schemes"][0]
    total = sum(linear["costs"][scheme] for linear in report["linears"].values())
    assert float(narrow.split(",")[names.index("predicted_cost")]) == pytest.approx(total)


def test_tasks_shows_accuracies_and_their_difference_from_the_reference(
    monkeypatch, capsys, tiny_folder, tmp_path
):
    words, questions = tmp_path / "words.jsonl", tmp_path / "questions.jsonl"
    words.write_text('{"context": "the value of", "continuation": "the"}\n' * 3)
    questions.write_text('{"query": "Which?", "choices": ["the name", "zq"], "gold": 0}\n' * 3)
    arguments = ["tasks", tiny_folder, "--lambada", words, "--arc", questions, "--limit", 2]
    status, shown, progress = run(monkeypatch, capsys, *arguments, "--no-passkey")
    assert status == 0 and "lambada" in shown and "difference" not in shown and "2/2" in progress
    compared = ["--passkey", "--passkey-lengths", "105,110", "--reference", tiny_folder]
    status, shown, _ = run(monkeypatch, capsys, *arguments, *compared)
    assert status == 0 and "difference" in shown and "passkey-105" in shown
    status, shown, _ = run(monkeypatch, capsys, *arguments, *compared, "--json")
    found = json.loads(shown)
    assert status == 0 and list(found) == ["tasks", "bpw", "size_bytes"]
    assert list(found["tasks"]) == [
        "lambada", "arc", "arc-normalized", "passkey-105", "passkey-110", "passkey",
    ]  # fmt: skip
    for task in found["tasks"].values():
        assert list(task) == [
            "examples", "correct", "accuracy", "standard_error", "log_prob",
            "reference_accuracy", "difference", "difference_error", "changed",
        ]  # fmt: skip
        assert task["difference"] == task["changed"] == 0
    assert found["tasks"]["arc"]["examples"] == found["tasks"]["arc"]["correct"] == 2


def test_input_errors_are_one_line_on_stderr_and_status_1(
    monkeypatch, capsys, tiny_folder, tmp_path
):
    three_bits = ["quantize", tiny_folder, "--bpw", 3, "--output", tmp_path / "o"]
    for arguments, message in (
        (["quantize", tiny_folder, "--bpw", 1, "--output", tmp_path / "o"], "below the floor"),
        (["quantize", tmp_path / "gone", "--bpw", 3, "--output", tmp_path / "o"], "gone"),
        (
            [
                "quantize",
                tiny_folder,
                "--bpw",
                3,
                "--transform",
                "twist",
                "--output",
                tmp_path / "o",
            ],
            "unknown transform 'twist'",
        ),
        ([*three_bits, "--max-decode-us", 9], "max_decode_us=9.0 needs decode_times"),
        ([*three_bits, "--decode-times", tmp_path / "gone.json"], "gone.json"),
        ([*three_bits, "--unclipped-qk", 2], "unclipped_qk=2.0 must be in [0, 1]"),
        ([*three_bits, "--pair-terms", -1], "pair_terms=-1 must be at least 0"),
        (["inspect", tiny_folder], "manifest"),
        (["evaluate", tiny_folder, "--text", tmp_path / "gone.txt"], "gone.txt"),
        (["tasks", tiny_folder, "--lambada", tmp_path / "gone.jsonl"], "gone.jsonl"),
        (["tasks", tiny_folder, "--no-passkey"], "no task"),
        (["tasks", tiny_folder, "--passkey-lengths", "99,x"], "99,x"),
        (["plan", tmp_path / "gone.json", "--bpw", 3, "--output", tmp_path / "p"], "gone.json"),
        (["sweep", tiny_folder, "--bpw", "3,x", "--output", tmp_path / "s"], "3,x"),
        (["push", tiny_folder, "user/name"], "manifest"),
    ):
        status, shown, error = run(monkeypatch, capsys, *arguments)
        assert status == 1 and shown == "", arguments
        last = error.splitlines()[-1]
        assert last.startswith("lwquant: ") and message in last and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_a_usage_error(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "quantize", "--no-such-option")[0] == 2


def test_the_installed_command_and_the_package_agree():
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['lwquant', '--help'];from lwquant.cli import main; main()",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for command in (
        "quantize",
        "sensitivity",
        "plan",
        "evaluate",
        "tasks",
        "sweep",
        "inspect",
        "push",
    ):
        assert command in shown


def test_a_calibration_given_again_shares_the_windows(
    monkeypatch, capsys, tiny_folder, recipe, tmp_path
):
    text, report = recipe.parent / "text.txt", tmp_path / "report.json"
    options = ("--output", report, "--recipe", recipe, "--metric", "outlier_count")
    sources = ("--calibration", "self", "--calibration", text)
    status, _, progress = run(monkeypatch, capsys, "sensitivity", tiny_folder, *options, *sources)
    assert status == 0 and "sample" in progress
    assert json.loads(report.read_text())["calibration"]["source"] == f"self + {text}"
