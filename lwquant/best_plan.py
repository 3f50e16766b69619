"""Which of several plans makes the model closest to the original on held-out windows."""

from __future__ import annotations

from collections.abc import Mapping

from lwquant.held_out import measure_on
from lwquant.prepare import OpenModel, Windows
from lwquant.progress import Progress
from lwquant.rounding import Rounding
from lwquant.scheme import QuantScheme
from lwquant.types import BitPlan


def best_plan(
    opened: OpenModel,
    candidates: Mapping[str, BitPlan],
    rounding: Rounding,
    windows: Windows,
    progress: Progress,
) -> tuple[str, str]:
    """The name of the plan whose model, really quantized, has the least KL, and a note of all."""
    kl: dict[str, float] = {}
    measured: dict[tuple[QuantScheme, ...], float] = {}  # equal plans are measured once
    for name, plan in candidates.items():
        key = tuple(plan.schemes.values())
        if key not in measured:
            quality = measure_on(opened, plan, rounding, windows, progress)
            measured[key] = quality.kl_divergence
        kl[name] = measured[key]
    best = min(kl, key=kl.__getitem__)
    others = ", ".join(f"{name} {value:.4f}" for name, value in kl.items() if name != best)
    return best, f"held-out KL of candidate plans: {best} {kl[best]:.4f} (taken), {others}"
