"""Handing on what was checked and opened before Prefect started.

Prefect stores the parameters of a flow, so a flow takes a config, and finds what was opened for it through a context variable. A flow
that a deployment starts finds nothing there and opens its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_handed: ContextVar[Any] = ContextVar("handed", default=None)


@contextmanager
def handed_on(value: Any) -> Iterator[None]:
    """Have flows that run inside find `value`."""
    token = _handed.set(value)
    try:
        yield
    finally:
        _handed.reset(token)


def handed(kind: type[T]) -> T | None:
    """What was handed on, where it is of this kind."""
    value = _handed.get()
    return value if isinstance(value, kind) else None
