"""A killed run leaves no server behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import subprocess, sys, time
from flows.serving.orphans import end_server_with_us
end_server_with_us()
end_server_with_us()
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
print(*(subprocess.Popen([*sleeper, name], stdout=subprocess.DEVNULL).pid for name in ("prefect.server.api.server:create_app", "other")),
      flush=True)
time.sleep(60)
"""


BOUND = """
import subprocess, sys, time
from flows.serving.orphans import ends_with_parent
sleeper = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]
print(subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, start_new_session=True, preexec_fn=ends_with_parent()).pid, flush=True)
time.sleep(60)
"""


def running(pid: int) -> bool:
    try:  # an orphan that ended may stay as a zombie where nobody collects it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only where there is /proc")
def test_the_server_of_a_killed_process_ends_and_nothing_else_does(request):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=request.config.rootpath, stdout=subprocess.PIPE, text=True)
    server, other = map(int, process.stdout.readline().split())
    try:
        assert running(server) and running(other)
        process.kill()
        process.communicate()
        until = time.monotonic() + 20
        while running(server) and time.monotonic() < until:
            time.sleep(0.05)
        assert not running(server) and running(other)
    finally:
        for pid in filter(running, (server, other)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a child to its parent")
def test_a_bound_child_ends_with_its_killed_parent(request):
    process = subprocess.Popen([sys.executable, "-c", BOUND], cwd=request.config.rootpath, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert running(child)
        process.kill()
        process.communicate()
        until = time.monotonic() + 20
        while running(child) and time.monotonic() < until:
            time.sleep(0.05)
        assert not running(child)
    finally:
        if running(child):
            os.kill(child, signal.SIGKILL)
