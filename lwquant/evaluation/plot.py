"""Pictures of results: quality against bits, and where a plan spends its bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure  # used without pyplot, so nothing global is touched
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lwquant.errors import OutputError
from lwquant.export.public import mask_path
from lwquant.scheme import FLOAT_BITS, WIDTHS
from lwquant.types import BitPlan

DPI = 150
INK = "#30343b"
GRID = "#e3e5e8"
COLOURS = ("#1f6fb4", "#d9822b", "#3a9a6b", "#a04c8f", "#7a6a53")
MENU = (*WIDTHS, FLOAT_BITS)
MARKERS = "osD^v"
LOG_RANGE = 3.0  # a perplexity panel that spans more than this factor is logarithmic
MAX_WIDE_BLOCKS = 96  # up to here every block gets a column wide enough for a number


class SweepPoint(Protocol):
    """One measured model; a `MeasuredPlan` is one."""

    @property
    def series(self) -> str: ...
    @property
    def bpw(self) -> float: ...
    @property
    def perplexity(self) -> float: ...
    @property
    def reference_perplexity(self) -> float: ...
    @property
    def kl_divergence(self) -> float: ...


def plot_sweep(rows: Sequence[SweepPoint], path: Path, *, model: str = "", text: str = "") -> None:
    """Write a PNG: perplexity (the original's dashed) and KL against true bits per weight.

    Each series is a line. A point that cannot be drawn is left out of its panel: an infinite
    perplexity, or a KL of 0, which a logarithmic axis does not have.
    ValueError for no rows, OutputError where `path` cannot be written.
    """
    if not rows:
        raise ValueError("a sweep without rows cannot be drawn")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    for number, series in enumerate(dict.fromkeys(row.series for row in rows)):
        points = sorted((row for row in rows if row.series == series), key=lambda row: row.bpw)
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 1.8,
            "markersize": 6,
            "label": series,
        }
        finite = [p for p in points if np.isfinite(p.perplexity)]
        left.plot([p.bpw for p in finite], [p.perplexity for p in finite], **style)
        apart = [p for p in points if 0 < p.kl_divergence < np.inf]
        right.plot([p.bpw for p in apart], [p.kl_divergence for p in apart], **style)
    original = rows[0].reference_perplexity
    left.axhline(original, color=INK, linestyle="--", linewidth=1.2, label="original")
    if (
        max((p.perplexity for p in rows if np.isfinite(p.perplexity)), default=0)
        > LOG_RANGE * original
    ):
        _log_axis(left)
    if any(row.kl_divergence > 0 for row in rows):
        _log_axis(right)
    for axes, title, label in (
        (left, "Perplexity", "perplexity (lower is better)"),
        (right, "Divergence from the original", "KL, nats per token (lower is better)"),
    ):
        axes.set(xlabel="stored bits per weight of the linears", ylabel=label)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        _tidy(axes)
    left.legend(frameon=False)
    _save(figure, path, _title("Quality against size", model, text))


class AgreementPoint(Protocol):
    """One plan with its predicted and its measured loss; a `MeasuredPlan` is one."""

    @property
    def series(self) -> str: ...
    @property
    def bpw(self) -> float: ...
    @property
    def kl_divergence(self) -> float: ...
    @property
    def predicted_cost(self) -> float: ...


def plot_agreement(rows: Sequence[AgreementPoint], path: Path, *, model: str = "") -> None:
    """Write a PNG: each plan's measured KL against the sum of its predicted costs.

    On the dashed line both are equal. Points without a positive value on both axes are left out.
    ValueError for no rows, OutputError where `path` cannot be written.
    """
    if not rows:
        raise ValueError("a sweep without rows cannot be drawn")
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    drawn = [
        row for row in rows if 0 < row.kl_divergence < np.inf and 0 < row.predicted_cost < np.inf
    ]
    for number, series in enumerate(dict.fromkeys(row.series for row in drawn)):
        points = [row for row in drawn if row.series == series]
        axes.plot(
            [p.predicted_cost for p in points],
            [p.kl_divergence for p in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="none",
            label=series,
        )
        for p in points:
            axes.annotate(
                f"{p.bpw:.2f}",
                (p.predicted_cost, p.kl_divergence),
                xytext=(6, -3),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
    if drawn:
        axes.axline((1, 1), (2, 2), color=INK, linestyle="--", linewidth=1, label="equal")
        axes.set(xscale="log", yscale="log")
        _label_plainly(axes.xaxis)
        _label_plainly(axes.yaxis)
        axes.legend(frameon=False)
    axes.set(xlabel="predicted: sum of the plan's costs", ylabel="measured KL, nats per token")
    _tidy(axes)
    _save(figure, path, _title("Measured against predicted loss", model, ""))


class RatioPoint(Protocol):
    """One plan of two widths; a `lwquant.ratio_curves.RatioRow` is one."""

    @property
    def series(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def kl_divergence(self) -> float: ...


def plot_ratio(
    rows: Sequence[RatioPoint], path: Path, low: int, high: int, *, model: str = ""
) -> None:
    """Write a PNG: KL against the share of weights at `low` bits, the rest at `high`, per series.

    ValueError for no rows, OutputError where `path` cannot be written.
    """
    if not rows:
        raise ValueError("curves without rows cannot be drawn")
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys(row.series for row in rows)):
        points = sorted(
            (row for row in rows if row.series == series and 0 < row.kl_divergence < np.inf),
            key=lambda row: row.share,
        )
        axes.plot(
            [p.share for p in points],
            [p.kl_divergence for p in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"single {series}" if series == "linears" else f"whole {series}",
        )
    if any(row.kl_divergence > 0 for row in rows):
        _log_axis(axes)
    axes.set(
        xlabel=f"share of weights at {low} bits, the rest at {high}",
        ylabel="KL, nats per token",
    )
    _tidy(axes)
    axes.legend(frameon=False)
    _save(figure, path, _title("Loss against the share lowered", model))


def plot_bits(plan: BitPlan | Any, path: Path, *, model: str = "") -> None:
    """Write a PNG: the bits of every linear by block and role, and below it the predicted costs.

    Args:
        plan: a BitPlan, or the RunRecord of a result folder.

    The costs are the metric's predictions for the chosen bits, on a logarithmic scale (a cost of 0
    or less is a white cell); without any there is one panel.
    ValueError for a plan without linears, OutputError where `path` cannot be written.
    """
    if isinstance(plan, BitPlan):
        bits = {name: scheme.bits for name, scheme in plan.schemes.items()}
        costs = dict(plan.costs)
    else:
        bits = {name: linear.scheme.bits for name, linear in plan.linears.items()}
        costs = {n: linear.cost for n, linear in plan.linears.items() if linear.cost is not None}
        model = model or plan.base_model
    if not bits:
        raise ValueError("a plan without linears cannot be drawn")
    bits_map, labels = _by_role_and_block(bits)
    costs_map, _ = _by_role_and_block({name: costs.get(name, np.nan) for name in bits})
    drawable = bool(np.any(costs_map > 0))
    n_roles, n_blocks = bits_map.shape
    panels = 2 if drawable else 1
    size = (
        max(6.5, 2.6 + 0.34 * min(n_blocks, MAX_WIDE_BLOCKS)),
        1.0 + panels * (0.85 + 0.34 * n_roles),
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
    _draw_bits(axes[0], bits_map)
    axes[0].set_title(f"Bits per code ({plan.bpw:.3f} stored bits per weight, scales included)")
    if drawable:
        _draw_costs(axes[1], costs_map)
        axes[1].set_title("Predicted cost at those bits")
    for panel in axes:
        panel.set_title(panel.get_title(), loc="left", fontsize=10, color=INK)
        panel.set_title("", loc="center")
        panel.set_yticks(range(n_roles), labels)
        panel.tick_params(length=0, labelsize=8, colors=INK)
        panel.spines[:].set_visible(False)
    axes[-1].set_xlabel("block", color=INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(min(n_blocks, 32), integer=True))
    _save(figure, path, _title("Where the bits go", model))


def _draw_bits(axes: Axes, bits: np.ndarray) -> None:
    # The same colour for a width in every picture, and a step of its own also for 8 to 16.
    steps = np.searchsorted(MENU, bits).astype(float)
    steps[np.isnan(bits)] = np.nan
    colours = ListedColormap(colormaps["YlGnBu"](np.linspace(0.12, 0.95, len(MENU))))
    norm = BoundaryNorm(np.arange(len(MENU) + 1) - 0.5, colours.N)
    image = axes.imshow(steps, cmap=colours, norm=norm, aspect="auto")
    _white_lines(axes, bits.shape)
    bar = axes.figure.colorbar(image, ax=axes, ticks=range(len(MENU)), pad=0.01)
    bar.ax.set_yticklabels([str(width) for width in MENU])
    bar.ax.tick_params(which="both", length=0, labelsize=8, colors=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if bits.shape[1] > MAX_WIDE_BLOCKS:
        return
    for (role, block), width in np.ndenumerate(bits):
        if not np.isnan(width):
            dark = width > 5
            axes.text(
                block, role, f"{width:.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else INK,
            )  # fmt: skip


def _draw_costs(axes: Axes, costs: np.ndarray) -> None:
    positive = costs[costs > 0]
    low, high = float(positive.min()), float(positive.max())
    norm = LogNorm(low, high if high > low else low * 10)
    image = axes.imshow(np.where(costs > 0, costs, np.nan), cmap="OrRd", norm=norm, aspect="auto")
    _white_lines(axes, costs.shape)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(which="both", length=2, labelsize=8, colors=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _white_lines(axes: Axes, shape: tuple[int, ...]) -> None:
    """Lines between the cells."""
    axes.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)


def _by_role_and_block(values: Mapping[str, float]) -> tuple[np.ndarray, list[str]]:
    """Values (n_roles, n_blocks), NaN where a block has no such linear, and the roles' labels."""
    places = {name: _place(name) for name in values}
    roles = list(dict.fromkeys(role for _, role in places.values()))
    table = np.full((len(roles), 1 + max(block for block, _ in places.values())), np.nan)
    for name, (block, role) in places.items():
        table[roles.index(role), block] = values[name]
    leaves = [role.rsplit(".", 1)[-1] for role in roles]
    unique = [
        leaf if leaves.count(leaf) == 1 else role for leaf, role in zip(leaves, roles, strict=True)
    ]
    return table, unique


def _place(name: str) -> tuple[int, str]:
    """Block and path inside it.

    >>> _place("model.layers.3.mlp.up_proj"), _place("transformer.h.0.attn.c_proj")
    ((3, 'mlp.up_proj'), (0, 'attn.c_proj'))
    """
    match = re.match(r".*?\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"linear {name!r} is not in a numbered block")
    return int(match[1]), match[2]


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    _label_plainly(axes.yaxis)


def _label_plainly(axis: Axis) -> None:
    """0.1, 0.2, 0.5, 1 on a logarithmic axis, and nothing between."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(which="both", colors=INK, length=0)


def _title(what: str, model: str, text: str = "") -> str:
    """Only the last component of paths: pictures are published.

    >>> _title("Bits", "/home/ann/smol", "wiki.txt"), _title("Bits", "")
    ('Bits: smol, on wiki.txt', 'Bits')
    """
    title = f"{what}: {mask_path(model)}" if model else what
    return f"{title}, on {mask_path(text)}" if text else title


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12, color=INK)
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise OutputError(f"{path}: the picture cannot be written: {error.strerror}") from error
