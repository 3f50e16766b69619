"""What issue 5 asks of the times, and whether they meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gpu_runs.products import Row

WIDE = 8192  # inputs of the shapes whose tiles alone are to fill the memory's bandwidth
FEW_TOKENS, OF_BANDWIDTH = 8, 0.8
MARLIN_BITS, MARLIN_TOKENS, MARLIN_SPEEDUP = 4, 16, 3.87
MANY_TOKENS, OF_BF16 = 256, 0.9


def verdicts(rows: Sequence[Row], widths: Sequence[int]) -> Iterator[str]:
    """A line for every target, and every width that it is for."""
    for bits in widths:
        yield _verdict(
            f"{bits} bits, up to {FEW_TOKENS} tokens, {WIDE} inputs: of copy bandwidth",
            [r for r in rows if r.bits == bits and r.tokens <= FEW_TOKENS and _is_wide(r)],
            lambda row: row.of_copy_bandwidth,
            OF_BANDWIDTH,
        )
    if MARLIN_BITS in widths:
        yield _verdict(
            f"{MARLIN_BITS} bits, up to {MARLIN_TOKENS} tokens: speed-up over bf16",
            [r for r in rows if r.bits == MARLIN_BITS and r.tokens <= MARLIN_TOKENS],
            lambda row: row.speedup,
            MARLIN_SPEEDUP,
        )
    for bits in widths:
        yield _verdict(
            f"{bits} bits, from {MANY_TOKENS} tokens: speed-up over bf16",
            [r for r in rows if r.bits == bits and r.tokens >= MANY_TOKENS],
            lambda row: row.speedup,
            OF_BF16,
        )


def _is_wide(row: Row) -> bool:
    return row.in_features == WIDE


def _verdict(what: str, rows: Sequence[Row], value: Callable[[Row], float], least: float) -> str:
    if not rows:
        return f"not measured: {what}"
    worst, best = min(rows, key=value), max(rows, key=value)
    met = "met" if value(worst) >= least else "not met"
    n_met = sum(value(row) >= least for row in rows)
    return (
        f"{met}: {what} {value(worst):.2f} to {value(best):.2f}, wanted {least};"
        f" {n_met} of {len(rows)} rows; worst {worst.out_features} x {worst.in_features},"
        f" {worst.tokens} tokens"
    )
