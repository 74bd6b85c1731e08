"""A real MLflow tracking server on loopback, to be killed, stopped and started again in the middle of things."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

WAIT = 120


class TrackingServer:
    """`mlflow server` with its database and artifacts in `home`; the port stays the same."""

    def __init__(self, home: Path) -> None:
        self.home, self.process = home, None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environ = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "OMP_NUM_THREADS": "1"}
        with (self.home / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mlflow",
                    "server",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--workers",
                    "1",
                    "--backend-store-uri",
                    f"sqlite:///{self.home}/server.db",
                    "--artifacts-destination",
                    str(self.home / "artifacts"),
                ],
                stdout=log,
                stderr=log,
                env=environ,
                cwd=self.home,
                start_new_session=True,
            )
        until = time.monotonic() + WAIT
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until, (self.home / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    def signal(self, number: int) -> None:
        """To all its processes: SIGSTOP leaves sockets that accept and never answer."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(30)

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
