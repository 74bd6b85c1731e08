"""Workers and their leases: cells run beside each other, each in a process that may die without taking anything with it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from gptq_core.errors import one_line
from tasks.config.sweep import LimitsConfig
from tasks.outcome.job import Event, Job, Outcome

INHERITED = "inherited"
"""A device that the surroundings have chosen already, as Ray does by CUDA_VISIBLE_DEVICES."""
COMMAND = (sys.executable, "-m", "tasks.sweep.worker")
DIED, ENDED = Outcome(status="died"), Outcome(status="ended", error="the sweep ended before")


class Worker:
    """A process of tasks.sweep.worker on one device. Started with its first job, and again after a job that failed."""

    def __init__(self, device: str, log: Path, threads: int = 1, folder: str | None = None, command: Sequence[str] = COMMAND) -> None:
        """folder: the working directory, to which the paths of jobs are relative; None: that of this process."""
        self.device, self.log, self.threads, self.folder, self.command = device, log, threads, folder, command
        self._process: subprocess.Popen[str] | None = None
        self._retired = False
        self._events: queue.Queue[Event | None] = queue.Queue()

    def run(self, job: Job, minutes: float | None, note: Callable[[str], None]) -> Outcome:
        """One attempt at a job. The process is gone after anything but "done"."""
        until = None if minutes is None else time.monotonic() + 60 * minutes
        try:
            if self._retired:
                return ENDED
            if self._process is None:
                self._start()
            if self._retired:  # while it was started
                self.close()
                return ENDED
            assert self._process and self._process.stdin
            self._process.stdin.write(job.model_dump_json() + "\n")
            self._process.stdin.flush()
            outcome = self._wait(until, note)
        except BrokenPipeError:
            outcome = DIED
        except BaseException:  # an interrupt or a cancelled task: the cell ends with the one who asked for it
            self.close()
            raise
        if outcome.status == "died":
            outcome = ENDED if self._retired else Outcome(status="died", error=self._last_words())
        elif outcome.status == "time":
            outcome = Outcome(status="time", error=f"took longer than limits.minutes = {minutes:g}")
        if not outcome.done:
            self.close()
        return outcome

    def close(self) -> None:
        """End the process; what it has committed stays."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin
                process.stdin.close()

    def retire(self) -> None:
        """End the process for good: a job that is under way ends as "ended", from whatever thread it is waited for."""
        self._retired = True
        process = self._process
        if process is not None:
            process.kill()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # a worker sees its device alone; a thread of OpenMP that waits would spin on the core of another worker
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
        environ = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        if self.device != INHERITED:
            environ["CUDA_VISIBLE_DEVICES"] = "" if self.device == "cpu" else self.device
        with self.log.open("a") as log:
            self._begin = log.tell()
            # a session of its own: Ctrl-C at the terminal is for the parent, which ends the worker
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
                cwd=self.folder,
                start_new_session=True,
            )
        self._events = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._events), daemon=True).start()

    def _wait(self, until: float | None, note: Callable[[str], None]) -> Outcome:
        while True:
            try:
                event = self._events.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return Outcome(status="time")
            if event is None:
                return DIED
            if event.outcome is not None:
                return event.outcome
            if event.event == "progress":
                note(event.text)

    def _last_words(self) -> str:
        assert self._process
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:  # it said something that is no event, and lives
            self._process.kill()
            code = self._process.wait()
        with self.log.open("rb") as log:
            log.seek(self._begin)
            lines = log.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            how = f"its process was ended by {signal.Signals(-code).name}"
            return how + (" (out of memory, if the system did it)" if code == -signal.SIGKILL else "")
        return f"its process ended with code {code}: {one_line(lines[-1]) if lines else 'no message'} (see {self.log})"


def _read(stream: IO[str], events: queue.Queue[Event | None]) -> None:
    with contextlib.suppress(ValueError):  # a line cut short by a kill
        for line in stream:
            events.put(Event.model_validate_json(line))
    events.put(None)


class Leases:
    """The workers of a sweep; a cell takes one and gives it back."""

    def __init__(self, devices: list[str], per_device: int, threads: int, logs: Path) -> None:
        self.workers = [Worker(device, logs / f"worker-{device}-{slot}.log", threads) for slot in range(per_device) for device in devices]
        self._free: queue.Queue[Worker] = queue.Queue()
        for worker in self.workers:
            self._free.put(worker)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Worker]:
        worker = self._free.get()
        try:
            yield worker
        finally:
            self._free.put(worker)

    def retire(self) -> None:
        for worker in self.workers:
            worker.retire()


def supervise(worker: Worker, job: Job, limits: LimitsConfig, note: Callable[[str], None]) -> Outcome:
    """Run a job to its end, again at most limits.retries times if its process died: what the engine refuses would be refused again."""
    started, attempts = time.perf_counter(), 0
    while True:
        attempts += 1
        outcome = worker.run(job, limits.minutes, note)
        if outcome.status != "died" or attempts > limits.retries:
            break
        note(f"{outcome.error}; begun again")
    status = "failed" if outcome.status == "died" else outcome.status
    return outcome.model_copy(update={"status": status, "attempts": attempts, "seconds": time.perf_counter() - started})
