"""What a Prefect task is given of an open run."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Opaque(Generic[T]):
    """Holds a value that Prefect passes on without a look inside: it walks collections, dataclasses and pydantic models only."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value
