"""Workers that die, hang, refuse or run out of memory, and the parent that goes away."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptq_core.data.windows import Windows
from tasks.sweep.workers import Leases, Worker, supervise

LIMITS = {"minutes": None, "retries": 0}


@pytest.fixture
def worker(tmp_path):
    found = Worker("cpu", tmp_path / "worker.log")
    yield found
    found.retire()


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    """A job of some seconds at most: the log-probabilities of a tiny model."""
    import torch

    folder = tmp_path_factory.mktemp("job")
    Windows(torch.arange(64).view(2, 32), "test", 2).save(folder / "windows.safetensors")
    return {
        "kind": "original",
        "threads": 1,
        "model": str(tiny_llama),
        "revision": None,
        "device": "cpu",
        "windows": str(folder / "windows.safetensors"),
        "file": str(folder / "original.npy"),
    }


def silent(_text):
    pass


def test_one_worker_takes_one_job_after_another(worker, original):
    first = supervise(worker, original, LIMITS, silent)
    pid = worker._process.pid
    again = supervise(worker, original | {"file": original["file"] + "2.npy"}, LIMITS, silent)
    assert (first["status"], again["status"], worker._process.pid) == ("done", "done", pid)
    assert Path(first["result"]["file"]).read_bytes() == Path(again["result"]["file"]).read_bytes()


def test_what_the_engine_refuses_is_not_tried_again_and_spoils_no_later_job(worker, original):
    outcome = supervise(worker, original | {"model": "/nowhere"}, LIMITS | {"retries": 3}, silent)
    assert (outcome["status"], outcome["attempts"]) == ("invalid", 1) and "/nowhere" in outcome["error"]
    assert supervise(worker, original, LIMITS, silent)["status"] == "done"


def test_too_little_memory_is_reported_as_that(worker, original, tiny_llama):
    outcome = supervise(worker, original | {"memory_gb": 0.000001}, LIMITS | {"retries": 3}, silent)
    assert (outcome["status"], outcome["attempts"]) == ("memory", 1)


def test_a_job_that_takes_too_long_is_ended(worker, original):
    outcome = supervise(worker, original, LIMITS | {"minutes": 0.001}, silent)
    assert outcome["status"] == "time" and "0.001" in outcome["error"] and worker._process is None


def test_a_killed_worker_is_begun_again_as_often_as_allowed(worker, original):
    killed = []

    def kill():
        while len(killed) < 2:
            process = worker._process
            if process and process.poll() is None and process.pid not in killed:
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    notes = []
    outcome = supervise(worker, original, LIMITS | {"retries": 1}, notes.append)
    assert (outcome["status"], outcome["attempts"]) == ("failed", 2) and "SIGKILL" in outcome["error"] and "begun again" in notes[0]
    thread.join()
    assert supervise(worker, original, LIMITS, silent)["status"] == "done"


def test_a_bug_ends_the_worker_and_its_last_words_are_told(worker, original):
    outcome = supervise(worker, original | {"kind": "nothing"}, LIMITS, silent)
    assert outcome["status"] == "failed" and "kind 'nothing'" in outcome["error"] and str(worker.log) in outcome["error"]


def test_a_worker_ends_with_the_one_who_feeds_it(request, original):
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-m', 'tasks.sweep.worker'], stdin=subprocess.PIPE, start_new_session=True)\n"
            "print(child.pid, flush=True); time.sleep(600)",
        ],
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(parent.stdout.readline())
    assert json.loads(parent.stdout.readline()) == {"event": "ready", "pid": pid}
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_leases_give_every_device_its_slots_and_no_more_than_all(tmp_path):
    leases = Leases(["0", "1"], 2, 1, tmp_path)
    assert [worker.device for worker in leases.workers] == ["0", "1", "0", "1"]
    held = [leases.lease() for _ in range(4)]
    devices = [lease.__enter__().device for lease in held]
    assert sorted(devices) == ["0", "0", "1", "1"]
    waiting = threading.Thread(target=lambda: leases.lease().__enter__(), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    held[0].__exit__(None, None, None)
    waiting.join(10)
    assert not waiting.is_alive()


def test_retired_leases_end_what_runs_and_begin_nothing(tmp_path, original):
    leases = Leases(["cpu"], 1, 1, tmp_path)
    [worker] = leases.workers
    found = []
    thread = threading.Thread(target=lambda: found.append(supervise(worker, original, LIMITS | {"retries": 5}, silent)))
    thread.start()
    while worker._process is None:
        time.sleep(0.01)
    leases.retire()
    thread.join(30)
    assert found[0]["status"] == "ended" and supervise(worker, original, LIMITS, silent)["status"] == "ended"
