"""The process that computes a cell: what its failures are called, and that it ends with its parent."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptq_core.data.windows import Windows
from gptq_core.errors import GPTQError, InputError, OutputHeldError
from tasks.config.sweep import LimitsConfig
from tasks.outcome.job import OriginalJob, Outcome
from tasks.sweep import worker
from tasks.sweep.workers import Worker, supervise


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    """A job of some seconds at most: the log-probabilities of a tiny model."""
    folder = tmp_path_factory.mktemp("job")
    Windows(torch.arange(64).view(2, 32), "test", 2).save(folder / "windows.safetensors")
    return OriginalJob(
        threads=1,
        model=str(tiny_llama),
        revision=None,
        device="cpu",
        windows=str(folder / "windows.safetensors"),
        file=str(folder / "original.npy"),
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutputHeldError("another run"), "held"),
        (InputError("no such model"), "invalid"),
        (MemoryError("malloc"), "memory"),
        (torch.OutOfMemoryError("CUDA"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
        (GPTQError("layer q_proj"), "failed"),
        (OSError("disk full"), "failed"),
    ],
)
def test_each_failure_has_its_kind_and_one_line(error, status, monkeypatch):
    def fail(_job, _events):
        raise error

    monkeypatch.setattr(worker, "carry_out", fail)
    assert worker._outcome(None, None) == Outcome(status=status, error=f"{type(error).__name__}: {error}")


def test_a_bug_is_no_outcome(monkeypatch):
    def fail(_job, _events):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(worker, "carry_out", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        worker._outcome(None, None)


def test_what_the_engine_refuses_is_invalid_and_an_unknown_kind_a_bug(original, one_thread):
    outcome = worker._outcome(original.model_copy(update={"model": "/nowhere"}), None)
    assert outcome.status == "invalid" and "/nowhere" in outcome.error
    for change, said in (({"kind": "nothing"}, "tag 'nothing' found using 'kind'"), ({"schema_version": 3}, "should be 2")):
        with pytest.raises(ValueError, match=said):
            worker._job(json.dumps(original.model_dump() | change))


@pytest.mark.slow
def test_the_real_process_takes_one_job_after_another_and_reports_too_little_memory(tmp_path, original):
    process, limits = Worker("cpu", tmp_path / "worker.log"), LimitsConfig(minutes=None, retries=3)
    first = supervise(process, original, limits, print)
    pid = process._process.pid
    again = supervise(process, original.model_copy(update={"file": original.file + "2.npy"}), limits, print)
    assert (first.status, again.status, process._process.pid) == ("done", "done", pid)
    assert Path(original.file).read_bytes() == Path(original.file + "2.npy").read_bytes()
    outcome = supervise(process, original.model_copy(update={"memory_gb": 0.000001}), limits, print)
    assert (outcome.status, outcome.attempts) == ("memory", 1)


def test_a_worker_ends_with_the_one_who_feeds_it(request):
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
