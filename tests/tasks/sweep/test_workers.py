"""Workers that die, hang or refuse, and the leases that hand them out: with a stub in place of the process that computes."""

import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.config.sweep import LimitsConfig
from tasks.outcome.job import OriginalJob
from tasks.sweep import workers
from tasks.sweep.workers import Leases, Worker, supervise

STUB = (sys.executable, str(Path(__file__).parent / "stub_worker.py"))


def limits(minutes=None, retries=0):
    return LimitsConfig(minutes=minutes, retries=retries)


def job(do, **more):
    """A job with keys for the stub."""
    return OriginalJob(threads=1, model="m", revision=None, device="cpu", windows="w", file="f", do=do, **more)


FINISH = job("finish")


@pytest.fixture
def worker(tmp_path):
    found = Worker("cpu", tmp_path / "worker.log", command=STUB)
    yield found
    found.retire()


def silent(_text):
    pass


def test_the_process_is_the_worker_of_the_sweep_unless_another_is_named(tmp_path):
    assert Worker("cpu", tmp_path / "log").command == workers.COMMAND == (sys.executable, "-m", "tasks.sweep.worker")


def test_one_worker_takes_one_job_after_another(worker):
    notes = []
    first, again = (supervise(worker, FINISH, limits(), notes.append) for _ in range(2))
    assert (first.status, again.status) == ("done", "done") and notes == ["block 1/1"] * 2
    assert first.pid == again.pid == worker._process.pid


@pytest.mark.parametrize("status", ["invalid", "memory", "held", "failed"])
def test_what_the_worker_refuses_is_not_tried_again_and_spoils_no_later_job(worker, status):
    outcome = supervise(worker, job("refuse", status=status), limits(retries=3), silent)
    assert (outcome.status, outcome.attempts, outcome.error) == (status, 1, "InputError: the stub refuses")
    assert worker._process is None
    assert supervise(worker, FINISH, limits(), silent).status == "done"


def test_a_job_that_takes_too_long_is_ended(worker):
    outcome = supervise(worker, job("hang"), limits(minutes=0.001), silent)
    assert outcome.status == "time" and "0.001" in outcome.error and worker._process is None


def test_a_killed_worker_is_begun_again_as_often_as_allowed(worker):
    notes = []
    outcome = supervise(worker, job("killed"), limits(retries=1), notes.append)
    assert (outcome.status, outcome.attempts) == ("failed", 2) and "SIGKILL" in outcome.error and "begun again" in notes[0]
    assert supervise(worker, FINISH, limits(), silent).status == "done"


def test_a_bug_ends_the_worker_and_its_last_words_are_told(worker):
    outcome = supervise(worker, job("bug"), limits(), silent)
    assert outcome.status == "failed" and "the stub has a bug" in outcome.error and str(worker.log) in outcome.error


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


def test_retired_leases_end_what_runs_and_begin_nothing(tmp_path):
    leases = Leases(["cpu"], 1, 1, tmp_path)
    [worker] = leases.workers
    worker.command = STUB
    found = []
    thread = threading.Thread(target=lambda: found.append(supervise(worker, job("hang"), limits(retries=5), silent)))
    thread.start()
    while worker._process is None:
        time.sleep(0.01)
    leases.retire()
    thread.join(30)
    assert found[0].status == "ended" and supervise(worker, FINISH, limits(), silent).status == "ended"
