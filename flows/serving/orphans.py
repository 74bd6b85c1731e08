"""End servers with the process that started them, however that process ends.

Prefect stops its server when Python exits; a process that is killed runs no exit code, and every orphan takes a port and some hundred MB.
A server that this project starts is bound to its parent by the kernel. For the server that Prefect starts, a small watcher reads from a
pipe whose other end this process holds: end of file means that this process is gone. The watcher finds the server by an environment
variable, which child processes inherit, so it needs none of Prefect's internals.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable

MARK = "GPTQ_SERVER_OF"

WATCHER = """
import os, signal, sys
sys.stdin.buffer.read()
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            if sys.argv[1].encode() in environ.read().split(b"\\0") and b"prefect.server.api.server" in cmdline.read():
                os.kill(int(pid), signal.SIGTERM)
    except OSError:  # ended meanwhile, or another person's
        pass
"""

_watchers: list[subprocess.Popen[bytes]] = []  # kept: a collected object would close the pipe


def end_server_with_us() -> None:
    """Start the watcher, before Prefect starts its server. Once a process; only where /proc exists."""
    if _watchers or not os.path.isdir("/proc/self"):
        return
    mark = uuid.uuid4().hex
    # a session of its own: signals from the terminal or to this process group must not reach the watcher
    _watchers.append(
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCHER, f"{MARK}={mark}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    os.environ[MARK] = mark


def ends_with_parent() -> Callable[[], None] | None:
    """A function for Popen(preexec_fn=...), from the main thread: the kernel kills the child when this one ends. None except on Linux."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # looked up now: nothing may be loaded between fork and exec

    def bind() -> None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)

    return bind
