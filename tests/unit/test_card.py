"""The run record, what is masked of it in public, and the model card made from it."""

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lwquant.errors import OutputError
from lwquant.export.card import license_of, model_card
from lwquant.export.folder import MANIFEST, write_manifest
from lwquant.export.public import mask, mask_path, public_files, public_manifest
from lwquant.export.record import (
    CalibrationRecord,
    EvaluationRecord,
    LinearRecord,
    RunRecord,
    read_evaluation,
    read_run,
)
from lwquant.scheme import QuantScheme

BITS = {"layers.0.q_proj": 3, "layers.0.up_proj": 4, "layers.1.q_proj": 3, "layers.1.up_proj": 16}
RECORD = RunRecord(
    lwquant="0.1.0",
    base_model="ann/base",
    command="lwquant quantize ann/base --bpw 3.5 --output out",
    seed=7,
    calibration=CalibrationRecord("wikitext", 64, 512, "ab" * 32),
    metric={"name": "kl", "samples": 8},
    allocator={"name": "exact"},
    quantizer={"name": "gptq", "damping": 0.01},
    budget={"bpw": 3.5},
    bpw=3.497,
    size_bytes=80_000_000,
    original_size_bytes=270_000_000,
    linears={
        name: LinearRecord(QuantScheme(bits, scale_bits=8), 0.5) for name, bits in BITS.items()
    },
    notes=("damping raised | once",),
)
EVALUATION = EvaluationRecord(
    text="test.txt",
    perplexity=21.5,
    tokens=6132,
    bpw=3.497,
    size_bytes=80_000_000,
    reference_perplexity=18.25,
    kl_divergence=0.1234,
    top1_agreement=0.875,
    seq_len=512,
    windows=12,
)
FILES = {"config.json": 700, "model.safetensors": 80_000_000}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def row(card: str, begins: str) -> list[str]:
    """Cells of the only table row whose first cell begins so."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {begins}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("record", [RECORD, EVALUATION], ids=["run", "evaluation"])
def test_a_record_comes_back_from_its_json_unchanged(record):
    assert type(record).from_json(record.to_json()) == record


def test_the_json_has_the_keys_of_the_contract():
    keys = json.loads(RECORD.to_json())
    assert keys["calibration"]["sha256"] == "ab" * 32
    assert keys["linears"]["layers.0.up_proj"] == {
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "scale_bits": 8,
        "codebook": "",
        "fine_zeros": False,
        "outliers": 0,
        "cost": 0.5,
        "activation_bits": None,
        "int8_weights": None,
    }
    wanted = "lwquant base_model command seed calibration metric allocator quantizer correction"
    assert set(f"{wanted} budget bpw size_bytes original_size_bytes linears notes".split()) <= set(
        keys
    )


def test_optional_fields_may_be_absent_and_unknown_ones_present():
    values = json.loads(RECORD.to_json())
    for key in ("correction", "uniform_bpw", "original_bpw", "notes"):
        del values[key]
    del values["linears"]["layers.0.q_proj"]["cost"]
    record = RunRecord.from_json(json.dumps(values | {"later": 1}))
    assert record.notes == () and record.correction is None
    assert record.linears["layers.0.q_proj"].cost is None


@pytest.mark.parametrize(
    "path, value, told",
    [
        (["bpw"], "3.5", "'bpw' is '3.5', not a finite number"),
        (["bpw"], True, "not a finite number"),
        (["bpw"], float("nan"), "not a finite number"),
        (["seed"], 1.5, "not a whole number"),
        (["notes"], "all well", "not a list of strings"),
        (["calibration"], [], "'calibration' is \\[\\], not an object"),
        (["calibration", "sha256"], None, "'calibration': 'sha256' is None, not a string"),
        (["linears", "layers.1.q_proj"], 3, "'layers.1.q_proj': is not a JSON object"),
        (["linears", "layers.1.q_proj", "symmetric"], 0, "symmetric is 0, not of type bool"),
    ],
)
def test_a_malformed_value_is_named(path, value, told):
    values = json.loads(RECORD.to_json())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(OutputError, match=f"^here: .*{told}"):
        RunRecord.from_json(json.dumps(values), "here")


@pytest.mark.parametrize("key", ["command", "linears", "calibration"])
def test_a_missing_key_is_named(key):
    values = json.loads(RECORD.to_json())
    del values[key]
    with pytest.raises(OutputError, match=f"lacks '{key}'"):
        RunRecord.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_json_object_is_refused(text):
    with pytest.raises(OutputError, match="JSON"):
        EvaluationRecord.from_json(text)


def test_numbers_that_json_cannot_hold_are_not_written():
    with pytest.raises(OutputError, match=r"evaluation.json: holds NaN or infinity"):
        replace(EVALUATION, perplexity=float("inf")).to_json()


def test_a_folder_without_evaluation_has_none_but_must_have_a_run(tmp_path):
    assert read_evaluation(tmp_path) is None
    with pytest.raises(OutputError, match=r"lwquant.json: cannot be read"):
        read_run(tmp_path)


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize(
    "text, public",
    [
        ("/home/ann/venv/bin/lwquant sweep /data/m --bpw 3", "lwquant sweep m --bpw 3"),
        ("lwquant.quantize('/home/ann lee/m', bpw=3)", "lwquant.quantize('m', bpw=3)"),
        ("quantize /home/ann\\ lee/m --bpw 3", "quantize m --bpw 3"),
        ("--plan=~/plans/p.json --text ../acme/t.txt", "--plan=p.json --text t.txt"),
        ("read C:\\Users\\ann\\t.txt (see file:///tmp/ann/x)", "read t.txt (see x)"),
        ("text:/home/ann/t.txt, \\\\server\\ann\\u.txt", "text:t.txt, u.txt"),
        ("user/name q/k/v ./a/b 3 tokens / s", "user/name q/k/v ./a/b 3 tokens / s"),
        ("https://huggingface.co/user/name", "https://huggingface.co/user/name"),
    ],
)
def test_only_the_last_component_of_a_private_path_stays(text, public):
    assert mask(text) == public
    assert mask(public) == public


@given(
    st.lists(st.text("aé0-_.", min_size=3), min_size=2), st.sampled_from(["", "--x=", "(", "src:"])
)
def test_no_folder_of_an_absolute_path_survives(parts, before):
    parts = [f"{part}{i}x" for i, part in enumerate(parts)]
    assert mask(f"a {before}/{'/'.join(parts)} b") == f"a {before}{parts[-1]} b"


def test_a_string_that_is_a_path_may_hold_blanks():
    assert mask_path("/home/ann lee, jr/my model") == "my model"


def test_our_records_are_published_without_paths_and_the_manifest_fits(tmp_path):
    private = "/home/ann lee/secret"
    run = replace(
        RECORD,
        base_model=f"{private}/base",
        command=f"lwquant quantize '{private}/base'",
        calibration=replace(RECORD.calibration, source=f"{private}/cal.txt"),
        notes=("read ~/secret/cal.txt",),
    )
    (tmp_path / "lwquant.json").write_text(run.to_json())
    evaluation = replace(EVALUATION, text=f"{private}/eval.txt")
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    (tmp_path / "plan.json").write_text(json.dumps({"notes": [[f"'{private}/x'"]], "bpw": 3}))
    (tmp_path / "sensitivity.json").write_text(json.dumps({"model": f"{private}/base"}))
    config = {"_name_or_path": f"{private}/base", "quantization_config": {"bits": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    template = {"chat_template": "{{ a }} /home/x/y", "name_or_path": f"{private}/base"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/usr/bin": 1}}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path)

    files = public_files(tmp_path)
    text = b"".join(content for content in files.values() if isinstance(content, bytes)).decode()
    assert "secret" not in text and "ann" not in text
    assert json.loads(files["lwquant.json"])["base_model"] == "base"
    assert json.loads(files["config.json"])["quantization_config"] == {"bits": 3}
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ a }} /home/x/y"
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()

    manifest = public_manifest(tmp_path, files)
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path)
    assert manifest == (tmp_path / MANIFEST).read_bytes()


def test_a_record_without_private_paths_is_published_byte_for_byte(tmp_path):
    text = RECORD.to_json().replace("  ", " ")
    (tmp_path / "lwquant.json").write_text(text)
    write_manifest(tmp_path)
    assert public_files(tmp_path) == {"lwquant.json": text.encode()}


def test_a_file_that_changed_since_the_manifest_is_not_published(tmp_path):
    (tmp_path / "lwquant.json").write_text("{}")
    write_manifest(tmp_path)
    (tmp_path / "lwquant.json").write_text("[]")
    with pytest.raises(OutputError, match=r"lwquant.json: was changed"):
        public_files(tmp_path)


# ---------------------------------------------------------------- card


def test_the_metadata_is_what_the_hub_reads():
    assert front_matter(model_card(RECORD, None, FILES)) == {
        "base_model": "ann/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lwquant", "quantized", "mixed-precision"],
    }


def test_the_license_is_the_one_of_the_base_model():
    stated = license_of({"license": "other", "license_name": 'a "b": c', "tags": ["x"]})
    found = front_matter(model_card(RECORD, None, FILES, license=stated))
    assert (found["license"], found["license_name"]) == ("other", 'a "b": c')
    assert "license_link" not in found and found["tags"][0] == "lwquant"
    assert license_of(None) == license_of({"license_name": "x"}) == {}


def test_the_table_sets_the_original_beside_the_quantized():
    card = model_card(replace(RECORD, original_bpw=32), EVALUATION, FILES)
    assert row(card, "bits per weight")[1:] == ["32.000", "3.497"]
    assert row(card, "size of all")[1:] == ["270.0", "80.0"]
    assert row(card, "perplexity")[1:] == ["18.250", "21.500"]
    assert row(card, "mean KL")[1:] == ["0", "0.1234"]
    assert row(card, "top-1")[1:] == ["100 %", "87.50 %"]
    assert "6,132 tokens of `test.txt`, 12 windows of 512" in card


def test_what_was_not_evaluated_is_said():
    card = model_card(RECORD, None, FILES)
    assert row(card, "perplexity")[1:] == ["not evaluated"] * 2
    assert row(card, "mean KL")[2] == row(card, "top-1")[2] == "not evaluated"
    assert row(card, "bits per weight")[1] == "not recorded"
    alone = replace(EVALUATION, reference_perplexity=None, kl_divergence=None)
    card = model_card(RECORD, alone, FILES)
    assert row(card, "perplexity")[1:] == ["not evaluated", "21.500"]
    assert row(card, "mean KL")[2] == "not evaluated"


def test_the_bits_are_counted_by_role_and_by_width():
    card = model_card(RECORD, None, FILES)
    assert row(card, "`q_proj`") == ["`q_proj`", "2", "3.00", "2 × 3"]
    assert row(card, "`up_proj`") == ["`up_proj`", "2", "10.00", "1 × 4, 1 × 16"]
    bars = [line.split() for line in card.splitlines() if "█" in line]
    assert [(bar[0], len(bar[-2]), bar[-1]) for bar in bars] == [
        ("3", 40, "2"),
        ("4", 20, "1"),
        ("16", 20, "1"),
    ]


def test_the_card_says_how_to_load_and_how_it_was_made():
    card = model_card(RECORD, None, FILES, repo_id="bob/small")
    assert "import lwquant  # lets" in card and 'from_pretrained("bob/small")' in card
    assert f"```sh\n{RECORD.command}\n```" in card
    assert row(card, "calibration")[1] == "`wikitext`"
    assert row(card, "sha256")[1] == f"`{'ab' * 32}`" and row(card, "seed")[1] == "7"
    assert row(card, "quantizer")[1] == "`gptq`, damping = 0.01"
    assert "- damping raised | once" in card
    assert row(card, "`model.safetensors`")[1] == "80,000,000"


def test_nothing_in_the_record_breaks_the_markdown():
    wild = replace(
        RECORD,
        command="lwquant quantize ```x",
        calibration=replace(RECORD.calibration, source="a|b\nc"),
        notes=("one\n# two",),
    )
    card = model_card(wild, None, FILES)
    assert "````sh\nlwquant quantize ```x\n````" in card
    assert "| calibration | `a\\|b c` |" in card and "- one # two" in card


def test_a_card_shows_no_path_of_this_machine():
    home = "/home/ann/secret"
    local = replace(
        RECORD,
        base_model=f"{home}/base",
        command=f"lwquant quantize {home}/base --plan ~/secret/plan.json",
        calibration=replace(RECORD.calibration, source=f"{home}/cal text.txt"),
        metric={"name": "kl", "cache": f"{home}/cache"},
        notes=(f"see {home}/log",),
    )
    card = model_card(local, replace(EVALUATION, text=f"{home}/eval.txt"), FILES)
    assert "secret" not in card and "ann" not in card
    assert "`base` with its linear layers" in card and "quantize base --plan plan.json" in card
    # A folder's name is no Hub id: the Hub would link to somebody else's model, or refuse.
    assert "base_model" not in front_matter(card)


def test_a_record_without_linears_makes_no_card():
    with pytest.raises(OutputError, match="names no linear"):
        model_card(replace(RECORD, linears={}), None, FILES)


def test_a_card_says_whether_the_model_was_transformed_first():
    plain = model_card(RECORD, None, FILES)
    assert "Embeddings, norms and head are unchanged." in plain
    assert row(plain, "transform") == ["transform", "none"]
    turned = model_card(replace(RECORD, transform={"name": "rotate", "seed": 2}), None, FILES)
    assert "Embeddings, norms and head are unchanged." not in turned
    assert row(turned, "transform") == ["transform", "`rotate`, seed = 2"]
