"""How many bits embedding and head get, where the budget counts them.

A budget in bits per weight is about the linears, and leaves embedding and head as they are. Within
a size every bit that these give up is one for the linears, and under a limit on the loss their
rounding may save more bytes than the linears then need to make up for it. What rounding them costs
is measured by itself, on windows of the calibration, and taken to add to what the plan is predicted
to cost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from lwquant.errors import BudgetError, UnsupportedModelError
from lwquant.held_out import compare_streams
from lwquant.model.embeddings import find_embeddings
from lwquant.prepare import OpenModel, bpw_of_size
from lwquant.progress import Progress, silent
from lwquant.recipe import Recipe
from lwquant.rounded_embeddings import head_stats, round_embeddings
from lwquant.scheme import FLOAT_BITS
from lwquant.search import where_predicted
from lwquant.sensitivity import KL_METRICS
from lwquant.stages import blank_problem, check_budget, plan_report, problem_for
from lwquant.types import SensitivityReport

KEPT = (0, FLOAT_BITS)  # embedding_bits of recipes that say nothing, or that nothing changes
NARROWER = (8, 6, 5, 4)  # than 16; 7 bits save little, and no other linear has them
STATISTICS = 8  # calibration windows that a head's rounding looks at
WINDOWS = 4  # others, where there are more, that what it costs is measured on

# Bits and the KL of rounding to them -> what is to be small; infinite where nothing is possible.
Score = Callable[[int, float], float]


def check_embeddings(opened: OpenModel, recipe: Recipe) -> None:
    """UnsupportedModelError where the recipe has embedding and head rounded, and that cannot be."""
    if recipe.embedding_bits not in KEPT:
        find_embeddings(opened.decoder.model)


def check_size(opened: OpenModel, recipe: Recipe, size: str | int) -> None:
    """BudgetError where no allowed width of embedding and head leaves the linears what they need.

    Nothing is measured for it.
    """
    problem = blank_problem(opened, recipe)
    ceiling = problem.bounds()[1] / problem.n_weights
    widest = narrowest = recipe.embedding_bits or FLOAT_BITS
    if not recipe.embedding_bits and _can_be_rounded(opened):
        narrowest = NARROWER[-1]
    outliers = recipe.outliers > 0
    most = bpw_of_size(opened, size, outliers, narrowest)
    least = 0.0
    with suppress(BudgetError):
        least = bpw_of_size(opened, size, outliers, widest)
    check_budget(opened, recipe, least if least > ceiling else min(most, ceiling))


def target_within(
    opened: OpenModel,
    report: SensitivityReport,
    recipe: Recipe,
    size: str | int,
    embedding_bits: int | None = None,
) -> float:
    """Bits per weight of the linears within `size`, never above what the menu can use.

    Args:
        embedding_bits: of embedding and head, if not those they have.

    BudgetError where nothing is left.
    """
    problem = problem_for(report, recipe)
    left = bpw_of_size(opened, size, recipe.outliers > 0, embedding_bits)
    return min(left, problem.bounds()[1] / problem.n_weights)


def with_embeddings(
    opened: OpenModel, recipe: Recipe, tokens: Tensor, progress: Progress = silent
) -> OpenModel:
    """The model with embedding and head in the bits that the recipe says, if it does.

    Args:
        tokens: calibration windows (n_samples, seq_len), of which a few are used.
    """
    if recipe.embedding_bits in KEPT:
        return opened
    hidden = opened.decoder.last_hidden(tokens[:STATISTICS], progress)
    stats = head_stats(opened.decoder, hidden)
    rounded = round_embeddings(opened.decoder, recipe.embedding_bits, stats)
    return _noted(
        replace(opened, embeddings=rounded), f"embedding and head {_in_bits(recipe.embedding_bits)}"
    )


def with_best_embeddings(
    opened: OpenModel,
    report: SensitivityReport,
    recipe: Recipe,
    tokens: Tensor,
    progress: Progress = silent,
    *,
    size: str | int | None = None,
    max_kl: float | None = None,
) -> OpenModel:
    """The model with embedding and head in the bits that serve its budget best.

    Within `size` these are the bits of least predicted KL; below `max_kl` those of the fewest bytes
    that are predicted to keep it. The choice is among its notes. Nothing changes where the budget
    is another, or the recipe says how many bits they get.

    Args:
        tokens: as for with_embeddings().
    """
    if recipe.embedding_bits or (size is None and max_kl is None):
        return opened
    problem = problem_for(report, recipe)
    floor, ceiling = (bits / problem.n_weights for bits in problem.bounds())

    def predicted_kl(bits: int, own: float) -> float:
        assert size is not None
        try:
            target = target_within(opened, report, recipe, size, bits)
            plan = plan_report(report, target, recipe=recipe)
        except BudgetError:
            return inf
        return own + sum(plan.costs.values())

    def megabytes_needed(bits: int, own: float) -> float:
        assert max_kl is not None
        if own >= max_kl:
            return inf
        bpw = where_predicted(
            lambda target: plan_report(report, target, recipe=recipe), max_kl - own, floor, ceiling
        )
        return (opened.other_bytes_with(bits) + bpw * problem.n_weights / 8) / 1e6

    if size is not None:
        return _with_best(opened, report, predicted_kl, "predicted KL {:.4g}", tokens, progress)
    return _with_best(opened, report, megabytes_needed, "predicted {:.4g} MB", tokens, progress)


def _with_best(
    opened: OpenModel,
    report: SensitivityReport,
    score_of: Score,
    shown: str,
    tokens: Tensor,
    progress: Progress,
) -> OpenModel:
    """From wide to narrow, until one is worse than the one before.

    Args:
        shown: a score in words.
    """
    decoder, first, last = opened.decoder, tokens[:STATISTICS], tokens[-WINDOWS:]
    if report.metric.get("name") not in KL_METRICS:
        return _noted(
            opened,
            "embedding and head stay as they are: what rounding them costs is a KL, which costs "
            f"by {report.metric.get('name')} cannot be compared with (or give embedding_bits)",
        )
    found = {FLOAT_BITS: score_of(FLOAT_BITS, 0.0)}
    best, chosen = FLOAT_BITS, None
    floating = decoder.last_hidden(torch.cat([first, last]), progress)
    read, floating = floating[: len(first)], floating[len(first) :]
    try:
        stats = head_stats(decoder, read)
        for bits in NARROWER:
            rounded = round_embeddings(decoder, bits, stats)
            quantized = decoder.last_hidden(last, progress, packed=True)
            own = compare_streams(decoder, quantized, floating, last).kl_divergence
            found[bits] = score_of(bits, own)
            if found[bits] < found[best]:
                best, chosen = bits, rounded
            elif found[bits] < inf:
                break
    except UnsupportedModelError as error:
        decoder.packed = {}
        return _noted(opened, f"embedding and head stay as they are: {error}")
    if found[best] == inf:  # then what comes next says why even these do not do
        best, chosen = bits, rounded
    decoder.packed = {} if chosen is None else dict(chosen.modules)
    words = {
        bits: shown.format(score) if score < inf else "impossible" for bits, score in found.items()
    }
    others = ", ".join(f"{words[bits]} {_in_bits(bits)}" for bits in found if bits != best)
    note = f"embedding and head {_in_bits(best)}: {words[best]} ({others})"
    return _noted(replace(opened, embeddings=chosen), note)


def _in_bits(bits: int) -> str:
    return "as they are" if bits == FLOAT_BITS else f"in {bits} bits"


def _can_be_rounded(opened: OpenModel) -> bool:
    try:
        find_embeddings(opened.decoder.model)
    except UnsupportedModelError:
        return False
    return True


def _noted(opened: OpenModel, note: str) -> OpenModel:
    return replace(opened, notes=(*opened.notes, note))
