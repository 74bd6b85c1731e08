"""How a stage of a run reports its progress."""

from __future__ import annotations

from typing import Protocol


class Advance(Protocol):
    """Called with the steps that are done, and with what was done last."""

    def __call__(self, done: int, text: str = "") -> None: ...
