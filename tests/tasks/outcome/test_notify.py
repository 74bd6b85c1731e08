"""Hooks: who is told, what, how often, and that none of them can cost more than a line."""

import json
import socket
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from report_records import run

from tasks.config.run import NotifyConfig
from tasks.outcome.notify import happened, notify
from tasks.outcome.record import RunRecord

CONTENT = {"name": "m-w4", "kl": 0.5}


@contextmanager
def server(status=200):
    """A local web server that keeps what it is sent; yields (its address, bodies)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", bodies
        finally:
            http.shutdown()


@pytest.mark.parametrize(
    "passed, error, said",
    [
        (None, None, ["done"]),
        (True, None, ["done", "passed"]),
        (False, None, ["done", "failed"]),
        (None, "OSError: x", ["done", "failed"]),
        (True, "OSError: x", ["done", "failed"]),
    ],
)
def test_what_happened(passed, error, said):
    gate = None if passed is None else {"passed": passed, "checks": [], "measure": "kl", "value": None}
    assert happened(RunRecord.model_validate(run(gate=gate, evaluation_error=error))) == said


@pytest.mark.parametrize("when, told", [(["done"], True), (["failed"], False), (["passed"], True), (["failed", "done"], True)])
def test_a_hook_is_told_only_what_it_asked_for(tmp_path, when, told):
    found = notify(NotifyConfig(command=f"cat > {tmp_path}/told", when=when), ["done", "passed"], CONTENT)
    assert (tmp_path / "told").exists() == told == bool(found)
    if told:
        assert json.loads((tmp_path / "told").read_text()) == CONTENT


def test_nobody_is_told_without_hooks():
    assert notify(None, ["done"], CONTENT) == {}


def test_a_webhook_gets_json_and_is_told_once(monkeypatch):
    with server() as (url, bodies):
        monkeypatch.setenv("GPTQ_TEST_HOOK", f"{url}/secret")
        hooks = NotifyConfig(webhook="env:GPTQ_TEST_HOOK")
        first = notify(hooks, ["done"], CONTENT | {"perplexity": float("inf")})
        assert first["webhook"].error is None and "secret" not in str(first)
        [(path, kind, body)] = bodies
        assert (path, kind, json.loads(body)) == ("/secret", "application/json", CONTENT | {"perplexity": "inf"})
        assert notify(hooks, ["done"], CONTENT | {"perplexity": float("inf")}, first) == first and len(bodies) == 1
        notify(hooks, ["done"], CONTENT, first)
        assert len(bodies) == 2, "another outcome is told"


def test_a_hook_that_failed_is_told_again_and_the_other_is_not(tmp_path):
    with server(503) as (url, bodies):
        hooks = NotifyConfig(webhook=url, command=f"cat >> {tmp_path}/told")
        first = notify(hooks, ["done"], CONTENT)
        assert first["webhook"].error == "notify.webhook answered 503" and first["command"].error is None
        again = notify(hooks, ["done"], CONTENT, first)
        assert len(bodies) == 2 and again == first and (tmp_path / "told").read_text() == json.dumps(CONTENT)


def test_a_webhook_that_does_not_answer_costs_its_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        found = notify(NotifyConfig(webhook=f"http://127.0.0.1:{silent.getsockname()[1]}/x", seconds=0.3), ["done"], CONTENT)
    assert found["webhook"].error == "notify.webhook does not answer: ReadTimeout" and time.monotonic() - started < 5
    gone = notify(NotifyConfig(webhook="http://127.0.0.1:9/x"), ["done"], CONTENT)
    assert gone["webhook"].error == "notify.webhook does not answer: ConnectError"


@pytest.mark.parametrize(
    "command, said",
    [
        ("echo first >&2; echo went wrong >&2; exit 3", "notify.command ended with code 3: went wrong"),
        ("no-such-command-of-ours", "notify.command ended with code 127"),
        ("exit 1", "notify.command ended with code 1: no message"),
        # also what the shell has started, which would hold it
        ("sleep 60 | sleep 60", "notify.command took longer than notify.seconds = 0.3"),
    ],
)
def test_a_command_that_fails_is_one_line(command, said):
    started = time.monotonic()
    found = notify(NotifyConfig(command=command, seconds=0.3 if "sleep" in command else 30), ["done"], CONTENT)
    assert said in found["command"].error and "\n" not in found["command"].error and time.monotonic() - started < 15


def test_a_command_need_not_read():
    assert notify(NotifyConfig(command="exit 0"), ["done"], {"long": "x" * 1_000_000})["command"].error is None


def test_a_variable_that_is_not_there_is_named():
    found = notify(NotifyConfig(webhook="env:GPTQ_TEST_NOT_SET"), ["done"], CONTENT)
    assert "env:GPTQ_TEST_NOT_SET: the environment variable GPTQ_TEST_NOT_SET is not set" in found["webhook"].error


def test_a_prefect_block_holds_the_address(prefect_server):
    from prefect.blocks.system import Secret

    with server() as (url, bodies):
        Secret(value=f"{url}/from-a-block").save("gptq-test-hook", overwrite=True)
        assert notify(NotifyConfig(webhook="block:gptq-test-hook"), ["done"], CONTENT)["webhook"].error is None
        assert bodies[0][0] == "/from-a-block"
    gone = notify(NotifyConfig(webhook="block:gptq-test-none"), ["done"], CONTENT)["webhook"].error
    assert "block:gptq-test-none cannot be loaded" in gone and "create a Secret block" in gone
