"""Allocators: which scheme each linear gets within a budget of stored bits.

An allocator is a function (problem, budget, *, settings) -> list[int], the chosen column of each
row. It keeps the budget and the problem's limit on decode time, respects forbidden (infinite)
costs, and raises BudgetError naming floor and ceiling, or the fastest plan, where none of its plans
does. tests/contract/test_allocators.py holds every entry below to this.
"""

from collections.abc import Callable

from lwquant.allocators.exact import exact
from lwquant.allocators.problem import Problem
from lwquant.allocators.ranked import ranked
from lwquant.allocators.spikes import spikes
from lwquant.allocators.uniform import uniform

Allocator = Callable[[Problem, int], list[int]]

ALLOCATORS = {"uniform": uniform, "ranked": ranked, "spikes": spikes, "exact": exact}

__all__ = ["ALLOCATORS", "Allocator", "Problem", "exact", "ranked", "spikes", "uniform"]
