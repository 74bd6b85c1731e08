"""Seconds by stage, each stage its own: while an inner stage runs, the outer one's clock stands.

On a GPU the host runs ahead of the device, so a stage there is timed by events in the stream; they are read when the seconds are
asked for, and that is the only moment that waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Timed = Callable[[str], AbstractContextManager[None]]
"""A stage's name to what measures it."""


def untimed(_stage: str) -> AbstractContextManager[None]:
    """For callers that do not measure."""
    return nullcontext()


class Stages:
    """The stages of one run. Entered by one thread; what others do beside it is told by `add`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since: float | torch.cuda.Event = 0.0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def add(self, stage: str, seconds: float) -> None:
        """Work of another thread: it ran beside other stages, so that all of them may sum up to more than the time that passed."""
        with self._lock:
            self._seconds[stage] += seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, in the order in which stages were first left."""
        if self._events:
            self._events[-1][2].synchronize()
            for stage, start, end in self._events:
                self.add(stage, start.elapsed_time(end) / 1000)
            self._events.clear()
        return dict(self._seconds)

    def _charge(self) -> None:
        """Charge what has passed since the last call to the innermost stage."""
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
            if self._open:
                self._events.append((self._open[-1], self._since, now))
        else:
            now = time.perf_counter()
            if self._open:
                self.add(self._open[-1], now - self._since)
        self._since = now
