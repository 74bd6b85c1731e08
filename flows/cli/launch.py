"""What every command does around its work: checks before Prefect starts, one line for an error that a person can mend, an exit code.

Exit codes: 0 done; 1 failed; 2 wrong usage or config; 75 the output is held by another run; 130 interrupted.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from flows.serving.own_server import guard_own_server, keep_loopback_from_proxies, server_is_configured

DONE, FAILED, WRONG, HELD, INTERRUPTED = 0, 1, 2, 75, 130


class PrefectAwayError(Exception):
    """Prefect's server does not answer."""


def run(config: Any) -> None:
    """Check the request, start Prefect and the flow, and show the result."""
    from tasks.outcome import record as records
    from tasks.request.handing import handed_on
    from tasks.request.request import Requests

    requests = Requests()
    config = requests.placed(config)
    with requests.of(config) as request:
        request.check()  # before Prefect starts; the flow reports the notes
        quiet()
        from flows.cli.display import show_run
        from flows.quantize import quantize as flow
        from tasks.outcome.gate import GateFailedError, demand

        before = records.read(config.out)
        try:
            with watched(), handed_on(requests):
                record = flow(config)
        except GateFailedError:
            record = records.read(config.out)
        except PrefectAwayError:
            record = records.read(config.out)
            if record is None or record == before or record.mlflow is None:
                raise
            typer.echo("computed, not recorded in Prefect: its server went away during the run", err=True)
    assert record is not None  # written before the gate is judged
    show_run(config, record)
    demand(config, record)


def run_sweep(config: Any, as_json: bool) -> None:
    """Look at every cell, start Prefect and the flow where something is missing, and show the result."""
    quiet()  # what is imported from here on imports Prefect
    from tasks.outcome import record as records
    from tasks.request.handing import handed_on
    from tasks.request.request import Requests
    from tasks.sweep import results

    with handed_on(Requests()):
        found, error = _swept(config)
    if as_json:
        typer.echo(records.text_of(found))
    else:
        from flows.cli.display import show_sweep

        show_sweep(found)
    if reason := error or results.failure(found):
        fail(FAILED, reason)


def _swept(config: Any) -> tuple[Any, Exception | None]:
    """The SweepRecord after the sweep, and what the flow failed with."""
    started = time.perf_counter()
    from flows import progress
    from tasks.outcome import record as records
    from tasks.report.writing import written
    from tasks.sweep import cells, results

    states = cells.examine(config)
    for state in states:
        if state.status not in ("done", "missing"):
            typer.echo(f"note: {state.cell.name}: {state.error}", err=True)
    if found := results.finished(config, states):
        typer.echo(f"{config.folder}: unchanged, nothing to do", err=True)
        return found, None
    from flows.sweep import SweepFailedError
    from flows.sweep import sweep as flow

    try:
        with watched():
            return flow(config), None
    except SweepFailedError as reason:
        return records.read_sweep(config.folder), reason
    except PrefectAwayError:
        states = cells.examine(config)
        if any(state.status == "missing" for state in states):
            raise
        found = results.result(config, states, [], started)
        records.write_sweep(config.folder, found)
        written(found, progress.Lines(lambda text: typer.echo(text, err=True)))
        typer.echo("computed, not recorded in Prefect: its server went away during the sweep", err=True)
        return found, None


@contextmanager
def outcome() -> Iterator[None]:
    """Exceptions that a person can do something about, as one line and an exit code. A bug keeps its traceback."""
    from gptq_core.errors import GPTQError, InputError, OutputHeldError

    try:
        yield
    except InputError as error:
        fail(WRONG, error)
    except OutputHeldError as error:
        fail(HELD, error)
    except (GPTQError, PrefectAwayError) as error:
        fail(FAILED, error)
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted: the same command resumes where it stopped")


def fail(code: int, message: object) -> None:
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


def quiet() -> None:
    """Defaults for Prefect and MLflow where the person set none; before either is imported."""
    import logging

    defaults = {
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
        "PREFECT_CLIENT_MAX_RETRIES": "3",  # a call to a server that is gone then costs 14 seconds and not a minute
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a fresh home and a busy machine need more than its 20
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    guard_own_server()
    keep_loopback_from_proxies()
    # one line of ours reports what these loggers would: migrations, retries of a server that is away, events that it misses
    levels = {
        "alembic": logging.WARNING,
        "urllib3.connectionpool": logging.ERROR,
        "prefect.events.clients": logging.ERROR,
        "prefect._internal.concurrency": logging.CRITICAL,
    }
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)

    from transformers.utils.logging import disable_progress_bar

    from flows.serving.orphans import end_server_with_us
    from gptq_core.errors import GPTQError

    if not server_is_configured():  # else Prefect starts none
        end_server_with_us()
    disable_progress_bar()  # two bars on one line, and noise in a file

    def ours(entry: logging.LogRecord) -> bool:
        signs = ("aborted by an interrupt signal", "failed with state", "Finished in state Failed")
        reported = any(sign in entry.getMessage() for sign in signs)
        return reported or bool(entry.exc_info and isinstance(entry.exc_info[1], GPTQError))

    # these end as one line of ours: Prefect's traceback on top would bury it
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(lambda entry: not ours(entry))


@contextmanager
def watched(remedy: str = "check PREFECT_API_URL, or unset it to run without a server; the same command resumes") -> Iterator[None]:
    """Run a flow: its progress on stderr as bars or as lines, a server that does not answer as a PrefectAwayError."""
    import httpx
    from rich.console import Console

    from flows import progress

    console = Console(stderr=True)
    watcher = progress.Bars(console) if console.is_terminal else progress.Lines(lambda text: typer.echo(text, err=True))
    try:
        with progress.watched_by(watcher):
            yield
    except (RuntimeError, httpx.HTTPError) as error:
        # at the start of a flow Prefect says it by a bare RuntimeError
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("Failed to reach API", "ephemeral Prefect API")):
            raise
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            remedy = "its server asks for a password: set PREFECT_API_AUTH_STRING to its user:password, as `python -m flows ui` prints it"
        raise PrefectAwayError(f"Prefect does not answer ({error}): {remedy}") from error
