"""Methods: functions, or partials of them; what is inside, and how they are written into JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def base_of(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a method's settings, if any, are bound to."""
    return method.func if isinstance(method, partial) else method


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
