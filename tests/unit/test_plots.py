"""The pictures: that they are made, hold what they should, and touch nothing global."""

import struct
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from lwquant.errors import OutputError
from lwquant.evaluation import plot
from lwquant.evaluation.plot import plot_agreement, plot_bits, plot_sweep
from lwquant.export.record import LinearRecord
from lwquant.scheme import QuantScheme
from lwquant.types import BitPlan

GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass
class Row:
    series: str
    bpw: float
    perplexity: float
    kl_divergence: float
    reference_perplexity: float = 30.0
    predicted_cost: float = 0.0


@dataclass
class Record:
    """As much of a result folder's record as the picture needs."""

    linears: dict
    bpw: float
    base_model: str


ROWS = [
    Row("mixed", 3.0, 40.0, 0.3),
    Row("mixed", 2.5, 200.0, 2.0),
    Row("uniform", 3.3, 45.0, 0.4),
    Row("uniform", 2.3, float("inf"), 9.0),
    Row("uniform", 16.0, 30.0, 0.0),
]


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every figure that is saved."""
    saved = []
    save = plot._save
    monkeypatch.setattr(
        plot, "_save", lambda figure, *rest: (saved.append(figure), save(figure, *rest))
    )
    return saved


def plan_of(blocks: int, roles=GPT2, costs: bool = True) -> BitPlan:
    names = [f"transformer.h.{block}.{role}" for block in range(blocks) for role in roles]
    schemes = {name: QuantScheme((2, 3, 4, 8, 16)[i % 5]) for i, name in enumerate(names)}
    return BitPlan(schemes, 3.5, {name: 0.001 * i for i, name in enumerate(names)} if costs else {})


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_a_sweep_shows_every_series_in_order_of_bits_and_the_original(tmp_path, figures):
    plot_sweep(ROWS, tmp_path / "sweep.png", model="/home/ann/smol", text="/data/wiki.txt")
    left, right = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert drawn["mixed"] == [[2.5, 200.0], [3.0, 40.0]]
    assert drawn["uniform"] == [[3.3, 45.0], [16.0, 30.0]]  # infinity is in no panel
    assert {y for _, y in drawn["original"]} == {30.0}
    apart = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert apart["uniform"] == [[2.3, 9.0], [3.3, 0.4]]  # and 0 on no logarithmic axis
    assert (left.get_yscale(), right.get_yscale()) == ("log", "log")


def test_titles_name_model_and_text_without_the_paths_of_this_machine(tmp_path, figures):
    plot_sweep(ROWS, tmp_path / "sweep.png", model="/home/ann/smol", text="/data/wiki.txt")
    assert figures[0].get_suptitle() == "Quality against size: smol, on wiki.txt"


def test_a_narrow_range_of_perplexities_is_drawn_on_a_linear_axis(tmp_path, figures):
    plot_sweep([Row("mixed", 4.0, 31.0, 0.1)], tmp_path / "sweep.png")
    assert figures[0].axes[0].get_yscale() == "linear"


def test_agreement_shows_each_plan_with_its_bits_and_the_line_of_equals(tmp_path, figures):
    rows = [
        Row("mixed", 3.0, 40.0, 0.3, predicted_cost=0.25),
        Row("mixed", 4.0, 35.0, 0.1, predicted_cost=0.11),
        Row("uniform", 3.3, 45.0, 0.4, predicted_cost=0.5),
        Row("uniform", 2.3, 90.0, float("inf"), predicted_cost=3.0),
        Row("uniform", 16.0, 30.0, 0.0),
    ]
    plot_agreement(rows, tmp_path / "agreement.png", model="/home/ann/smol")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert drawn["mixed"].get_xydata().tolist() == [[0.25, 0.3], [0.11, 0.1]]
    assert drawn["uniform"].get_xydata().tolist() == [[0.5, 0.4]]
    assert "equal" in drawn and (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert sorted(text.get_text() for text in axes.texts) == ["3.00", "3.30", "4.00"]
    assert figures[0].get_suptitle() == "Measured against predicted loss: smol"
    assert png_size(tmp_path / "agreement.png")[0] > 500
    plot_agreement(rows[-1:], tmp_path / "empty.png")  # nothing above zero: still a picture
    with pytest.raises(ValueError, match="without rows"):
        plot_agreement([], tmp_path / "a.png")


def test_every_cell_of_a_plan_holds_its_bits_and_the_costs_stand_below(tmp_path, figures):
    plan = plan_of(3)
    plot_bits(plan, tmp_path / "bits.png", model="user/name")
    bits, costs = figures[0].axes[:2]
    shown = {
        (text.get_position()[0], text.get_position()[1]): int(text.get_text())
        for text in bits.texts
    }
    expected = {
        (block, row): plan.schemes[f"transformer.h.{block}.{role}"].bits
        for block in range(3)
        for row, role in enumerate(GPT2)
    }
    assert shown == expected
    labels = [label.get_text() for label in bits.get_yticklabels()]
    assert labels == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]  # two are called c_proj
    drawn = costs.get_images()[0].get_array()
    assert np.ma.getmaskarray(np.ma.masked_invalid(drawn))[0, 0]  # a cost of 0 has no logarithm
    assert drawn[3, 2] == pytest.approx(0.011)


def test_a_plan_without_costs_has_one_panel_and_is_lower(tmp_path, figures):
    plot_bits(plan_of(3), tmp_path / "both.png")
    plot_bits(plan_of(3, costs=False), tmp_path / "one.png")
    assert [len(figure.axes) for figure in figures] == [4, 2]  # each panel has a colour bar
    assert png_size(tmp_path / "one.png")[1] < png_size(tmp_path / "both.png")[1]


def test_blocks_of_different_kinds_leave_cells_empty(tmp_path, figures):
    schemes = {"m.0.q": QuantScheme(4), "m.1.q": QuantScheme(3), "m.1.extra": QuantScheme(2)}
    plot_bits(BitPlan(schemes, 3.0), tmp_path / "bits.png")
    assert sorted(int(text.get_text()) for text in figures[0].axes[0].texts) == [2, 3, 4]


def test_a_folders_record_is_drawn_like_the_plan_it_came_from(tmp_path, figures):
    linears = {
        "m.0.q": LinearRecord(QuantScheme(4), 0.1),
        "m.1.q": LinearRecord(QuantScheme(16)),
    }
    plot_bits(Record(linears, 4.3, "/home/ann/smol"), tmp_path / "bits.png")
    assert figures[0].get_suptitle() == "Where the bits go: smol"
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["4", "16"]


def test_drawing_does_not_import_pyplot(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "matplotlib.pyplot"]:
        monkeypatch.delitem(sys.modules, name)  # of some other test
    plot_sweep(ROWS, tmp_path / "sweep.png")
    plot_bits(plan_of(2), tmp_path / "bits.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_nothing_to_draw_and_nowhere_to_write_are_errors(tmp_path):
    with pytest.raises(ValueError, match="without rows"):
        plot_sweep([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="without linears"):
        plot_bits(BitPlan({}, 3.0), tmp_path / "a.png")
    with pytest.raises(ValueError, match="'lm_head' is not in a numbered block"):
        plot_bits(BitPlan({"lm_head": QuantScheme(4)}, 3.0), tmp_path / "a.png")
    with pytest.raises(OutputError, match="No such file"):
        plot_sweep(ROWS, tmp_path / "missing" / "a.png")
