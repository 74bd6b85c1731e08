"""Seconds by stage, each stage its own: while an inner stage runs, the outer one's clock stands.

On a GPU the host runs ahead of the device, so a stage there is timed by events in the stream; they are read when the seconds are
asked for, and that is the only moment that waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stages:
    """The stages of one run. One thread enters them; work of other threads comes in through `add`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._mark: torch.cuda.Event | None = None  # on a GPU, in the place of _since
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

    @contextmanager
    def shared(self, parts: list[Stages]) -> Iterator[None]:
        """While other threads work and this one waits for them: the time that passes is theirs, by the shares of their stages."""
        self._charge()
        started = time.perf_counter()
        yield
        passed = time.perf_counter() - started
        spent: dict[str, float] = defaultdict(float)
        for part in parts:
            for stage, seconds in part.seconds.items():
                spent[stage] += seconds
        for stage, seconds in spent.items():
            self.add(stage, seconds * passed / sum(spent.values()))
        self._since = time.perf_counter()

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
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
            if self._open and self._mark is not None:
                self._events.append((self._open[-1], self._mark, mark))
            self._mark = mark
        else:
            now = time.perf_counter()
            if self._open:
                self.add(self._open[-1], now - self._since)
            self._since = now
