"""Tables of decode times: what they predict, and what is said where they cannot."""

import json
from pathlib import Path

import pytest

import lwquant
from lwquant import tables
from lwquant.allocators.plan import read_plan, write_plan
from lwquant.decode_times import BENCHMARK, DecodeTimes, read_decode_times, write_decode_times
from lwquant.errors import BudgetError, LwquantError, PlanError
from lwquant.inspection import inspect_folder
from lwquant.recipe import Recipe
from lwquant.scheme import QuantScheme
from lwquant.sensitivity.report import read_report
from lwquant.types import LinearSpec

SMALL = Recipe(n_samples=6, seq_len=64, held_out=2, sensitivity_samples=4, group_size=32)
SCHEMES = SMALL.schemes()
SHAPES = ((96, 96), (48, 96), (224, 96), (96, 224))  # of the tiny model
MACHINE = {"cpu": "Abacus", "isa": "wood", "threads": 1, "commit": "abc"}
QUIET = {"progress": lambda *_: None}


def make_times(shapes=SHAPES, schemes=SCHEMES):
    """Microseconds that count the bits, with five bits the slowest of all."""
    return {
        shape: {s.label: shape[0] * (20.0 if s.bits == 5 else s.bits) / 48 for s in schemes}
        for shape in shapes
    }


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "times.json"
    write_decode_times(path, make_times(), MACHINE)
    return path


def test_a_table_is_read_as_it_was_written_and_looked_up_by_shape_and_scheme(table):
    read = read_decode_times(table)
    assert read == DecodeTimes(str(table), MACHINE, make_times())
    linears = (LinearSpec("a", 0, 224, 96, 0), LinearSpec("b", 0, 96, 224, 1))
    wanted = [[224 * 2 / 48, 224 * 16 / 48], [4.0, 32.0]]
    assert read.of(linears, (SCHEMES[0], SCHEMES[-1])).tolist() == wanted
    assert read.of_plan({"a": SCHEMES[0], "b": SCHEMES[-1]}, linears) == 224 * 2 / 48 + 32.0
    assert read.machine_label == "Abacus, wood, threads 1, commit abc"


def test_what_a_table_lacks_is_named_with_what_measures_it(table):
    read = read_decode_times(table)
    linears = tuple(LinearSpec(str(n), 0, n, 96, 0) for n in (96, 64, 40, 64))
    with pytest.raises(PlanError, match=r"40x96,64x96; measure them: .* --shapes 40x96,64x96 "):
        read.of(linears, SCHEMES)
    with pytest.raises(PlanError, match=r"96x96 in 3b-g64, 7b-g32-s8: .*2b-g32-s8-z8, 3b-g32-s8"):
        read.of(linears[:1], (SCHEMES[0], QuantScheme(3), QuantScheme(7, 32, scale_bits=8)))
    assert (Path(__file__).parents[2] / BENCHMARK).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": 3}, "'machine' is missing"),
        ({"microseconds": {}}, "'microseconds' is missing or empty"),
        ({"microseconds": {"64": {}}}, "'64' is not of the form 1536x576"),
        ({"microseconds": {"0x64": {}}}, "'0x64' is empty"),
        ({"microseconds": {"64x64": 3}}, "64x64: is not an object"),
        ({"microseconds": {"64x64": {"3bits": 1}}}, "64x64: scheme '3bits'"),
        ({"microseconds": {"64x64": {"16b": "1"}}}, "64x64: '1' is not a number"),
        ({"microseconds": {"64x64": {"16b": 0}}}, "64x64: 0 microseconds must be"),
        ({"microseconds": {"64x64": {"16b": float("nan")}}}, "64x64: nan microseconds must be"),
        ({"format": "lwquant-plan"}, "is not a lwquant-decode-times file"),
    ],
)
def test_mistakes_in_a_table_are_named(table, change, message):
    body = json.loads(table.read_text()) | change
    table.write_text(json.dumps(body))
    with pytest.raises(PlanError, match=message):
        read_decode_times(table)


def test_a_run_keeps_the_limit_and_says_what_it_predicts(
    tiny_folder, heldout_text, table, tmp_path, capsys
):
    def run(name, **settings):
        return lwquant.quantize(
            tiny_folder,
            output=tmp_path / name,
            recipe=SMALL,
            calibration=[heldout_text[:6000]],
            correction="none",
            quantizer="rtn",
            metric="output_error",
            **settings,
            **QUIET,
        )

    free = run("free", bpw=5.4, decode_times=str(table))
    limit = 0.85 * free.plan.decode_us
    known = read_decode_times(table)
    made = run("made", bpw=5.4, decode_times=known, max_decode_us=limit)
    linears = read_report(made.folder / "sensitivity.json").linears
    assert made.plan.decode_us == pytest.approx(known.of_plan(made.plan.schemes, linears))
    assert 0.9 * limit < made.plan.decode_us <= limit < free.plan.decode_us
    assert made.bpw <= 5.4

    def allocator_and_time(path):
        body = json.loads(path.read_text())
        return body["allocator"], body["decode_us"], body["decode_bytes"]

    stored = made.plan.bpw * sum(spec.n_weights for spec in linears) / 8
    how = {"name": "exact", "max_decode_us": limit, "decode_times": known.machine_label}
    for file in ("plan.json", "lwquant.json"):
        recorded = allocator_and_time(made.folder / file)
        assert recorded == (how, made.plan.decode_us, pytest.approx(stored))
    assert json.loads((made.folder / "lwquant.json").read_text())["budget"] == {
        "bpw": 5.4,
        "max_decode_us": limit,
    }
    tables.print_inspection(inspect_folder(made.folder))
    assert f"{made.plan.decode_us:.1f} µs per decoded token" in capsys.readouterr().out

    report = made.folder / "sensitivity.json"
    planned = lwquant.plan(report, bpw=5.4, decode_times=table, max_decode_us=limit, recipe=SMALL)
    assert planned.schemes == made.plan.schemes
    write_plan(planned, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json", linears)
    assert again.decode_us is None and again.decode_bytes == planned.decode_bytes > 0
    # A given plan's time is predicted anew, if it can be.
    timed = run("timed", plan=tmp_path / "plan.json", decode_times=str(table))
    assert timed.plan.decode_us == pytest.approx(made.plan.decode_us)
    untimed = run("untimed", plan=tmp_path / "plan.json")
    assert untimed.plan.decode_us is None
    tables.print_inspection(inspect_folder(untimed.folder))
    assert "MB per decoded token" in capsys.readouterr().out

    # Moves and compared plans keep the limit too.
    for more in ({"local_search": 4}, {"remeasure": 1}):
        found = run(next(iter(more)), bpw=5.4, decode_times=known, max_decode_us=limit, **more)
        assert found.plan.decode_us <= limit


def test_limits_that_cannot_be_kept_are_refused_before_anything_is_measured(
    tiny_folder, heldout_text, table, tmp_path
):
    def refused(kind, message, **settings):
        def untouched(stage, *_):
            raise AssertionError(f"{stage} has begun")

        with pytest.raises(kind, match=message):
            lwquant.quantize(
                tiny_folder,
                output=tmp_path / "out",
                recipe=SMALL,
                calibration=[heldout_text[:6000]],
                progress=untouched,
                **settings,
            )

    refused(LwquantError, "max_decode_us=9 needs decode_times.*--write", bpw=3.5, max_decode_us=9)
    limit = {"decode_times": str(table), "max_decode_us": 9}
    refused(BudgetError, "fastest plan of this menu takes", bpw=3.5, **limit)
    refused(LwquantError, "max_decode_us=9 needs a budget in bpw", max_kl=0.1, **limit)
    refused(LwquantError, r"max_decode_us=-1 must be above 0", bpw=3.5, max_decode_us=-1)
    write_decode_times(table, make_times(SHAPES[:2]), MACHINE)
    refused(PlanError, "96x224,224x96", bpw=3.5, decode_times=str(table))
    refused(PlanError, "96x224,224x96", max_kl=0.1, decode_times=str(table))
    refused(PlanError, "gone.json", bpw=3.5, decode_times=str(tmp_path / "gone.json"))
    write_decode_times(table, make_times(), MACHINE)
    for curve in (lwquant.sweep, lwquant.ratio_curves):
        with pytest.raises(LwquantError, match="max_decode_us=9 is for one budget"):
            budget = {"bpw": [3]} if curve is lwquant.sweep else {}
            curve(tiny_folder, output=tmp_path / "out", recipe=SMALL, **limit, **budget)
