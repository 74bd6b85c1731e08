"""Load of the machine during a run: its cores, memory and GPUs, sampled by a thread and kept in the run record.

The names are MLflow's own (without `system/`), so that its page of system metrics shows them. MLflow's own sampler needs the server
during the run; this one needs none, and what is logged later from the record is what would have been logged at once.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import psutil

from tasks.outcome.parts import MachineLoad

SECONDS = 1.0
"""Between two samples, at the start of a run."""
LIMIT = 120
"""Samples that a record keeps at most: where there are more, two become one and the time between them doubles."""


class Sampler:
    """Samples inside its `with`; `record()` returns the samples. If sampling fails the run continues without samples."""

    def __init__(self, seconds: float = SECONDS, limit: int = LIMIT) -> None:
        self.seconds, self.limit = seconds, limit
        self._rows: list[tuple[float, dict[str, float]]] = []
        self._end, self._change = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> Sampler:
        psutil.cpu_percent()  # the load is that since the last call
        try:
            self._thread.start()
        except RuntimeError:  # a limit on threads
            self._end.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def record(self) -> MachineLoad | None:
        """The samples so far and one of now; None: no samples."""
        self._sample()
        with self._change:
            if not self._rows:
                return None
            names = sorted({name for _, row in self._rows for name in row})
            return MachineLoad(
                interval_seconds=self.seconds,
                times_ms=[int(when) for when, _ in self._rows],
                metrics={name: [row.get(name) for _, row in self._rows] for name in names},
            )

    def _run(self) -> None:
        while not self._end.wait(self.seconds) and self._sample():
            pass

    def _sample(self) -> bool:
        """Take a sample; False if the system refuses it."""
        try:
            row = sample()
        except (psutil.Error, OSError, RuntimeError, MemoryError):
            return False
        with self._change:
            self._rows.append((time.time() * 1000, row))
            if len(self._rows) > self.limit:
                self._rows, self.seconds = (
                    [_mean(*self._rows[start : start + 2]) for start in range(0, len(self._rows), 2)],
                    2 * self.seconds,
                )
        return True


def sample() -> dict[str, float]:
    """Load and memory of the machine, and of the GPUs that this process uses, now."""
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
        **_gpus(),
    }


def _gpus() -> dict[str, float]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking first would make a context on every GPU
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):
            free, total = torch.cuda.mem_get_info(index)
            found[f"gpu_{index}_memory_usage_megabytes"] = round((total - free) / 1e6, 1)
            found[f"gpu_{index}_memory_usage_percentage"] = round((total - free) / total * 100, 1)
            try:
                found[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
            except _refusals():
                pass
    return found


def _refusals() -> tuple[type[Exception], ...]:
    """Errors of torch where the load of a GPU cannot be read: without nvidia-ml-py, and on a slice of a GPU."""
    nvml: Any = sys.modules.get("pynvml")
    return (ModuleNotFoundError, RuntimeError, *([nvml.NVMLError] if nvml else []))


def _mean(*pair: tuple[float, dict[str, float]]) -> tuple[float, dict[str, float]]:
    """Two samples as one, at the time of the later; an odd one at the end stays as it is."""
    names = {name for _, row in pair for name in row}
    seen = {name: [row[name] for _, row in pair if name in row] for name in names}
    return pair[-1][0], {name: round(sum(values) / len(values), 1) for name, values in seen.items()}
