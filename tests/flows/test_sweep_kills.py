"""kill -9 of everything that a sweep consists of. Nothing that was finished is lost, and the same command completes it.

Some minutes, so not part of the suite: `python -m pytest -m kills`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tasks.outcome import record as records

pytestmark = [pytest.mark.kills, pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds its victims in /proc")]
WAIT = 300


class Command:
    """The sweep of four cells on the embedded model as a process of its own, and what it says."""

    def __init__(self, root, home, *more):
        args = [
            sys.executable,
            "-m",
            "flows",
            "sweep",
            "configs/demo.yaml",
            "--grid",
            "bits=3,4",
            "--grid",
            "group_size=32,128",
            "--out",
            str(home / "s"),
            "--json",
            *more,
        ]
        settings = {"calibration.samples": 32, "evaluation.samples": 16, "max_parallel": 2, "choose.max_perplexity_increase": 9}
        for key, value in ({"tracking.uri": f"sqlite:///{home}/mlflow.db"} | settings).items():
            args += [] if any(key in each for each in more) else ["--set", f"{key}={value}"]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        self.process = subprocess.Popen(
            args,
            cwd=root,
            env=environ | {"PREFECT_HOME": str(home / "prefect"), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines, self.out = [], []
        self.readers = [
            threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")), daemon=True),
            threading.Thread(target=lambda: self.out.append(self.process.stdout.read()), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def wait_for(self, *signs):
        """Until a line holds all of `signs`."""
        until = time.monotonic() + WAIT
        while not any(all(sign in line for sign in signs) for line in list(self.lines)):
            assert time.monotonic() < until and self.process.poll() is None, "".join(self.lines[-20:])
            time.sleep(0.05)

    def children(self, sign):
        """Process ids of our descendants whose command line holds `sign`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and sign in (path / "cmdline").read_text():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def end(self, code=0):
        """The JSON that it printed."""
        assert self.process.wait(WAIT) == code, "".join(self.lines[-20:])
        for reader in self.readers:
            reader.join(10)
        return json.loads(self.out[0]) if code in (0, 1) else None


@pytest.fixture
def start(request, tmp_path):
    started = []

    def command(*more):
        started.append(Command(request.config.rootpath, tmp_path, *more))
        return started[-1]

    yield command
    for each in started:
        each.process.kill()


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("model-*.safetensors")}


def published(folder):
    return {path.parent.name for path in folder.glob("*/manifest.jsonl") if path.parent.suffix != ".partial"}


def running(pid):
    try:  # one that ended may stay as a zombie where nobody collects it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids):
    until = time.monotonic() + 30
    while any(map(running, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def all_done(found):
    return [row["status"] for row in found["cells"]] == ["done"] * 4


def test_a_killed_worker_is_replaced_and_its_cell_goes_on(start):
    sweep = start()
    sweep.wait_for("block 1/4")
    victims = sweep.children("tasks.sweep.worker")
    os.kill(victims[0], signal.SIGKILL)
    assert all_done(sweep.end())
    assert any("SIGKILL" in line and "begun again" in line for line in sweep.lines)


def test_after_a_killed_parent_no_worker_is_left_and_the_same_command_does_the_rest(start, tmp_path):
    sweep = start()
    sweep.wait_for("perplexity")
    workers = sweep.children("tasks.sweep.worker")
    sweep.process.kill()
    assert workers and gone(workers)
    before, finished = stamps(tmp_path / "s"), published(tmp_path / "s")
    found = start().end()
    assert finished and all_done(found) and not finished & set(found["computed"])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.parent.name in finished)
    assert found["mlflow"]["error"] is None


def test_a_killed_prefect_server_costs_no_finished_cell(start, tmp_path):
    sweep = start()
    sweep.wait_for("perplexity")
    [server] = sweep.children("uvicorn")
    os.kill(server, signal.SIGKILL)
    sweep.process.wait(WAIT)
    finished = published(tmp_path / "s")
    before = stamps(tmp_path / "s")
    found = start().end()
    assert finished and all_done(found) and not finished & set(found["computed"])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.parent.name in finished)


def test_a_killed_mlflow_server_costs_only_its_copy_which_the_next_run_writes(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def mlflow():
        args = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{tmp_path}/server.db",
            "--artifacts-destination",
            str(tmp_path / "artifacts"),
        ]
        with (tmp_path / "server.log").open("a") as log:
            found = subprocess.Popen(
                args, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            )
        until = time.monotonic() + WAIT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                return found
            except OSError:
                assert time.monotonic() < until and found.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    uri, server = ("--set", f"tracking.uri=http://127.0.0.1:{port}"), mlflow()
    try:
        sweep = start(*uri)
        sweep.wait_for("perplexity")
        os.killpg(server.pid, signal.SIGKILL)
        found = sweep.end()
        assert all_done(found) and found["mlflow"]["error"]
        before = stamps(tmp_path / "s")
        server = mlflow()
        again = start(*uri).end()
        assert again["computed"] == [] and again["mlflow"]["error"] is None and stamps(tmp_path / "s") == before
        for row in again["cells"]:
            assert records.read(row["out"]).mlflow.error is None and row["mlflow_run_id"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
