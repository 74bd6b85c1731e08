"""Mark runs whose process was killed as crashed, from the next run on the same machine.

Prefect learns how a run ended from the run itself or from the worker that started it. If both were killed (kill -9, out of memory, power),
or if there was no worker, the run would stay Running for ever. So each run records its process in its labels, and looks for runs of this
machine whose process is gone.
"""

from __future__ import annotations

import datetime
import os
import platform
import uuid
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Crashed

MACHINE, BOOT, SPACE, PROCESS = "gptq.machine", "gptq.boot", "gptq.process_space", "gptq.process"
PROC = Path("/proc")
GRACE = datetime.timedelta(minutes=1)
"""Time that a worker has to end a run that is being cancelled."""
UNDER_WAY = [StateType.RUNNING, StateType.CANCELLING]


def mark_dead_runs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect hook for `on_running`: record the process of this run, and mark the dead runs of this machine."""
    if (PROC / "self").exists():
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {**labels(os.getpid())})
            mark(client)


def mark(client: SyncPrefectClient) -> list[FlowRun]:
    """Mark the runs of this machine whose process is gone as Crashed, or as Cancelled if they were being cancelled. Returns them."""
    here, now = labels(os.getpid()), datetime.datetime.now(datetime.UTC)
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(state={"type": {"any_": UNDER_WAY}}), sort=FlowRunSort.START_TIME_DESC)
    under_way = [(run, run.state) for run in found if run.state is not None and is_dead(run.labels, here)]
    dead = [(run, state) for run, state in under_way if state.is_running() or state.timestamp < now - GRACE]
    for run, state in dead:
        ended = Crashed if state.is_running() else Cancelled
        message = f"its process {str(run.labels[PROCESS]).split()[0]} was killed; noticed by a later run on this machine"
        client.set_flow_run_state(run.id, ended(message=message), force=True)
        for task in client.read_task_runs(
            flow_run_filter=FlowRunFilter(id={"any_": [run.id]}),
            task_run_filter=TaskRunFilter(state={"type": {"any_": [StateType.RUNNING]}}),
        ):
            client.set_task_run_state(task.id, ended(message=message), force=True)
    return [run for run, _ in dead]


def labels(pid: int) -> dict[str, str]:
    """Labels that identify a process of this machine: process ids are reused, an id together with its start time is not."""
    return {
        MACHINE: f"{platform.node()} {uuid.getnode():012x}",
        BOOT: (PROC / "sys/kernel/random/boot_id").read_text().strip(),
        SPACE: os.readlink(PROC / "self/ns/pid"),
        PROCESS: f"{pid} {_start(pid)}",
    }


def is_dead(theirs: dict[str, Any], here: dict[str, str]) -> bool:
    """Whether the process that `theirs` name is gone; False where this machine cannot know it."""
    if theirs.get(MACHINE) != here[MACHINE]:
        return False
    if theirs[BOOT] != here[BOOT]:
        return True
    pid, _, start = theirs[PROCESS].partition(" ")
    return bool(theirs[SPACE] == here[SPACE]) and _start(int(pid)) != start


def _start(pid: int) -> str:
    """Clock ticks from the boot to the start of a process; empty if it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # state and starttime, proc_pid_stat(5)
