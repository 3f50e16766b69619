"""How a method, a function or a partial of one, is written into JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def describe(method: Callable[..., Any] | None) -> dict[str, object]:
    """
    >>> describe(partial(sorted, reverse=True))
    {'name': 'sorted', 'reverse': True}
    """
    if method is None:
        return {"name": "none"}
    if isinstance(method, partial):
        settings = {k: v for k, v in method.keywords.items() if isinstance(v, str | int | float)}
        return {**describe(method.func), **settings}
    return {"name": method.__name__}
