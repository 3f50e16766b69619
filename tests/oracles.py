"""Slow and obviously right versions of what the package computes, written from the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def proxy_loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) in float64."""
    difference = (rounded - weight).double()
    return torch.einsum("oi,ij,oj->", difference, hessian.double(), difference).item()


def obs_codes(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    max_code: int,
    order: list[int],
    values: Sequence[float] | None = None,
) -> Tensor:
    """Optimal brain surgeon, column by column in `order`: round a column, then move the columns
    not yet rounded to the least-squares optimum given all that is rounded so far.

    Args:
        scales, zeros: (out_features, in_features), already expanded to columns.
        values: what the codes stand for in units of the scale; None means code − zero.

    Returns codes (out_features, in_features).
    """
    target, hessian = weight.double(), hessian.double()
    result = target.clone()
    codes = torch.empty_like(target)
    done: list[int] = []
    for column in order:
        scale, zero = scales[:, column].double(), zeros[:, column].double()
        if values is None:
            codes[:, column] = (result[:, column] / scale + zero).round().clamp(0, max_code)
            result[:, column] = (codes[:, column] - zero) * scale
        else:
            codes[:, column] = nearest_values(result[:, column] / scale, values).double()
            result[:, column] = torch.tensor(values).double()[codes[:, column].long()] * scale
        done.append(column)
        rest = [c for c in order if c not in done]
        if rest:
            # minimize (R − T) H (R − T)ᵀ over R[:, rest] with R[:, done] fixed
            moved = (result[:, done] - target[:, done]) @ hessian[done][:, rest]
            result[:, rest] = (
                target[:, rest] - torch.linalg.solve(hessian[rest][:, rest], moved.T).T
            )
    return codes


def nearest_values(targets: Tensor, values: Sequence[float]) -> Tensor:
    """The position in `values` of the one nearest to each target, by trying all; in float64."""
    return (targets.double()[..., None] - torch.tensor(values).double()).abs().argmin(-1)


def best_plan(
    costs: Tensor,
    sizes: Tensor,
    budget: int,
    times: Tensor | None = None,
    limit: float = float("inf"),
) -> float:
    """Least total cost over every combination of schemes that fits; inf if none does."""
    n_rows, n_schemes = costs.shape
    best = float("inf")
    for choice in itertools.product(range(n_schemes), repeat=n_rows):
        size = sum(int(sizes[row, column]) for row, column in enumerate(choice))
        time = 0.0 if times is None else sum(float(times[row, c]) for row, c in enumerate(choice))
        if size <= budget and time <= limit:
            best = min(best, sum(float(costs[row, c]) for row, c in enumerate(choice)))
    return best


def kl_per_token(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference ‖ model) of logits (n_tokens, vocab) in float64, from the definition."""
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean().item()
