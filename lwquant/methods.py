"""Methods: functions, or partials of them; what is inside, and how they are written into JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lwquant.errors import LwquantError

# A listed name, {"name": ..., settings}, or a function with the family's signature.
Method = str | Mapping[str, Any] | Callable[..., Any]


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


def look_up(family: str, listed: Mapping[str, Any], method: Method) -> Callable[..., Any]:
    """The listed function of the family that `method` names, with its settings bound to it.

    LwquantError for a name that is not listed.
    """
    if callable(method):
        return method
    settings: dict[str, Any] = {"name": method} if isinstance(method, str) else dict(method)
    name = str(settings.pop("name", None))
    if name not in listed:
        raise LwquantError(f"unknown {family} {name!r}; there are {', '.join(sorted(listed))}")
    return partial(listed[name], **settings) if settings else listed[name]
