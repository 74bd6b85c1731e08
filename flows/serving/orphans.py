"""Servers end with the process that started them, however that one ends.

Prefect stops its server at the exit of Python; a process that is killed has no such exit, and every server left over takes a port
and some hundred MB. A server that we start ourselves is bound to us by the system. For the one that Prefect starts, a watcher of a few
lines holds the reading end of a pipe: its end is our end. It knows the server by a variable of the environment, which a child inherits,
so nothing of Prefect's inside is touched.
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

_watchers: list[subprocess.Popen[bytes]] = []  # kept: an object that goes away would close the pipe


def end_server_with_us() -> None:
    """Before Prefect starts its server. Once a process; only where there is /proc."""
    if _watchers or not os.path.isdir("/proc/self"):
        return
    mark = uuid.uuid4().hex
    # a session of its own: an interrupt or a hang-up of the terminal, and the killing of our group, are not for the watcher
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
    """For Popen(preexec_fn=...), from the main thread: the system kills the child when this process is gone. None: not on Linux."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # found now: between fork and exec there is no loading

    def bind() -> None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # gone before it was asked
            os._exit(1)

    return bind
