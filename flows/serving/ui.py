"""Serve Prefect's and MLflow's pages to this machine alone, for as long as the command runs: `python -m flows ui`.

Both are processes of flows.serving.guard, which explains what they refuse and why both require a password. The password is made once and
kept beside Prefect's database in a file of mode 600, so that a browser and a shell can keep it after a restart.
The sockets are opened here, so that a taken port is an error before anything starts, and port 0 finds a free one. Runs may write to
MLflow's database directly meanwhile, as they do by default; Prefect's page also shows runs that were made without PREFECT_API_URL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import typer

from flows.serving.guard import ARTIFACTS, AUTH, STORE
from flows.serving.orphans import ends_with_parent
from gptq_core.errors import GPTQError, InputError
from tasks.config.run import TrackingConfig, without_password

START, END = 180, 10
"""Seconds until both answer, on a busy machine with fresh databases; seconds for an orderly shutdown."""
LINES = 20
"""Last lines of its log that are shown for a server that ended by itself."""


class ServerEndedError(GPTQError):
    """One of the servers ended by itself, or does not answer."""


class Child:
    """A process that ends when this one is killed, in a group of its own, so that Ctrl-C at the terminal reaches only this process."""

    def __init__(
        self, name: str, arguments: list[str], environ: dict[str, str], log: int | None = None, passed: tuple[int, ...] = ()
    ) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=passed,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )

    def close(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """Send `sign` to it and whatever it has started, and SIGKILL after END seconds."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, sign)
            self.process.wait(END)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Server(Child):
    """A server of flows.serving.guard on an open socket; its log is an unnamed file."""

    def __init__(self, name: str, listening: socket.socket, environ: dict[str, str], health: str) -> None:
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.health = self.address + health
        self.log = tempfile.TemporaryFile()
        arguments = ["flows.serving.guard", name.lower(), str(listening.fileno())]
        super().__init__(name, arguments, environ, self.log.fileno(), (listening.fileno(),))

    def answers(self, auth: tuple[str, str] | None) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.health, auth=auth, timeout=2, trust_env=False).is_success
        return False

    def last_words(self) -> str:
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-LINES:])


def ui(prefect_port: int, mlflow_port: int, store: str, fill: list[str] | None = None, guarded: bool = True) -> None:
    """Serve both until a signal ends it. fill: arguments of `python -m flows` for a command that puts something on the pages.

    guarded: require a password; without, every user of this machine may use both.
    """
    uri = database(store)
    auth, place = password() if guarded else ("", "")
    with stop_signals() as stop, ExitStack() as stack:
        sockets = [
            stack.enter_context(listen(port, option)) for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port"))
        ]
        servers = []
        for name, listening, health in zip(("Prefect", "MLflow"), sockets, ("/api/health", "/health"), strict=True):
            servers.append(Server(name, listening, environ(listening, uri, auth), health))
            stack.callback(servers[-1].close)
            listening.close()  # the server has its own copy: once it ends, clients are refused instead of waiting
        typer.echo("starting Prefect and MLflow; the first time takes a minute", err=True)
        name, _, word = auth.partition(":")
        user = (name, word) if auth else None
        until = time.monotonic() + START
        while not stop and not all(server.answers(user) for server in servers):
            look(servers)
            if time.monotonic() > until:
                raise ServerEndedError(f"{' and '.join(server.address for server in servers)} do not both answer within {START} s")
            time.sleep(0.2)
        if not stop:
            announce(servers, uri, auth, place)
            filling = fill and stack.enter_context(filled(fill, servers[0], auth))
            while not stop:
                look(servers)
                if filling and filling.process.poll() is not None:
                    code, filling = filling.process.returncode, None
                    result = "is on both pages" if code == 0 else f"ended with exit code {code}; the pages stay"
                    typer.echo(f"the demo {result}", err=True)
                time.sleep(0.2)
        typer.echo("stopping", err=True)


def database(store: str) -> str:
    """Address of MLflow's database, with a full path, or the value of env:NAME."""
    from pydantic import ValidationError

    try:
        uri = TrackingConfig(uri=store).address
    except ValidationError as error:
        raise InputError(f"--store {without_password(store)}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    if uri.startswith("http"):
        raise InputError(f"--store {without_password(store)}: is a server already; give the database, such as sqlite:///mlflow.db")
    if not uri.startswith("sqlite:///"):
        return uri
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    if not path.parent.is_dir():
        raise InputError(f"--store {store}: {path.parent} is no folder; make it, or run this where the runs wrote mlflow.db")
    return f"sqlite:///{path}"


def password() -> tuple[str, str]:
    """user:password of both servers, and a shell expression for it: a variable that is set, or a file that is made the first time."""
    if AUTH in os.environ:
        if not all(os.environ[AUTH].partition(":")):
            raise InputError(f"{AUTH} must be user:password, both not empty; set it so, or unset it and one is made")
        return os.environ[AUTH], f"${AUTH}"
    file = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "flows-ui.auth"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as made:  # mode 600
            made.write(f"gptq:{secrets.token_urlsafe(18)}\n")
            made.flush()
            with contextlib.suppress(FileExistsError):  # another `ui` was first
                os.link(made.name, file)
    if file.stat().st_mode & 0o077:
        raise InputError(f"{file} holds the password and others may read it: delete it, and the next start makes a new one")
    found = file.read_text().strip()
    if not all(found.partition(":")):
        raise InputError(f"{file} does not hold user:password: delete it, and the next start makes a new one")
    return found, f"$(cat {shlex.quote(str(file))})"


def listen(port: int, option: str) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port with connections in TIME_WAIT is free
    try:
        found.bind(("127.0.0.1", port))
        found.listen(128)  # already now, so that no other program can take the port
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken: end what listens there, or give another: {option} 0 finds a free one") from error
        if error.errno == errno.EACCES:
            raise InputError(f"port {port} is for the system's own services: give one from 1024 on; {option} 0 finds a free one") from error
        raise
    return found


def environ(listening: socket.socket, uri: str, auth: str) -> dict[str, str]:
    """Environment of either server: the password, no telemetry, no further processes."""
    port = listening.getsockname()[1]
    # where runs of this shell go must influence neither the server nor the requests of its page
    kept = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", AUTH)}
    kept |= {AUTH: auth} if auth else {}
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path.cwd()
    return kept | {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_UI_API_URL": "/api",
        # the newer of Prefect's two pages calls an analytics service at every step, which the guard blocks; a link on the page opens it
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        STORE: uri,
        ARTIFACTS: str(folder / "mlartifacts"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def announce(servers: list[Server], uri: str, auth: str, place: str) -> None:
    prefect, mlflow = servers
    if not auth:
        typer.echo(
            f"Prefect  {prefect.address}\nMLflow   {mlflow.address}\nwithout a password: every user of this machine may use both\n\n"
            f"runs of another terminal appear there after\n  export PREFECT_API_URL={prefect.address}/api\n"
            f"  tracking.uri: {without_password(uri)}\nCtrl-C stops both"
        )
        sys.stdout.flush()
        return
    known = auth if sys.stdout.isatty() and not place.startswith(f"${AUTH}") else f'"{place}"'  # no password in a file
    user = auth.partition(":")[0]
    typer.echo(
        f"Prefect  {prefect.address}   enter once on its page: {known}\n"
        f"MLflow   {mlflow.address}   user {user}, the password is what follows the colon\n\n"
        "runs of another terminal appear there after\n"
        f"  export PREFECT_API_URL={prefect.address}/api\n"
        f'  export PREFECT_API_AUTH_STRING="{place}"\n'
        f"  tracking.uri: {without_password(uri)}\n"
        f"or, to reach MLflow over HTTP, {mlflow.address} with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n"
        "Ctrl-C stops both"
    )
    sys.stdout.flush()


@contextmanager
def filled(arguments: list[str], prefect: Server, auth: str) -> Iterator[Child]:
    """Run the command that fills the pages, with its progress on this terminal; it ends with this process, and its finished work stays."""
    there = {"PREFECT_API_URL": f"{prefect.address}/api"} | ({"PREFECT_API_AUTH_STRING": auth} if auth else {})
    child = Child("the demo", ["flows", *arguments], os.environ | there)
    try:
        yield child
    finally:
        child.close(signal.SIGINT)


def look(servers: list[Server]) -> None:
    """Raises ServerEndedError if a server has ended, with the last lines of its log on stderr."""
    for server in servers:
        code = server.process.poll()
        if code is not None:
            typer.echo(server.last_words(), err=True)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ServerEndedError(f"{server.name}'s server {how}; the last lines of its log are above, and the other one is stopped")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that collects SIGINT, SIGTERM and SIGHUP; a signal that was ignored before (nohup) stays ignored."""
    received: list[int] = []
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for sign, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(sign, lambda number, _frame: received.append(number))
    try:
        yield received
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
