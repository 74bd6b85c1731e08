"""The server that Prefect starts for a run: nobody else gets in, and no proxy is asked for it."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from flows.serving.own_server import guard_own_server, keep_loopback_from_proxies, server_is_configured

VARIABLES = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """An environment in which nothing of Prefect is set, and which is as it was afterwards."""
    for name in (*VARIABLES, "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # remembered, so that what is set below goes again
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path


def test_every_process_has_a_password_of_its_own(clean, monkeypatch):
    guard_own_server()
    first = os.environ["PREFECT_SERVER_API_AUTH_STRING"]
    assert os.environ["PREFECT_API_AUTH_STRING"] == first and len(first) > 30
    assert "*" not in os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING")
    guard_own_server()
    assert os.environ["PREFECT_SERVER_API_AUTH_STRING"] != first


def test_a_password_that_is_set_stays(clean, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:mine")
    guard_own_server()
    assert os.environ["PREFECT_SERVER_API_AUTH_STRING"] == os.environ["PREFECT_API_AUTH_STRING"] == "me:mine"


@pytest.mark.parametrize("where", ["environment", "profile", "named profile"])
def test_a_server_of_the_persons_own_gets_no_password_of_ours(where, clean, monkeypatch):
    if where == "environment":
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    else:
        (clean / "profiles.toml").write_text(
            'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:4200/api"\n[profiles.other]\n'
        )
        if where == "named profile":
            monkeypatch.setenv("PREFECT_PROFILE", "other")
    assert server_is_configured() == (where != "named profile")
    guard_own_server()
    assert ("PREFECT_API_AUTH_STRING" in os.environ) == (where == "named profile")


def test_no_proxy_is_asked_for_this_machine_and_what_was_set_stays(clean, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet.example, localhost")
    keep_loopback_from_proxies()
    keep_loopback_from_proxies()
    assert os.environ["NO_PROXY"] == "intranet.example,localhost,127.0.0.1,::1"
    assert os.environ["no_proxy"] == "127.0.0.1,localhost,::1"


def port_of_the_server(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            listening = [each.laddr.port for each in child.net_connections() if each.status == "LISTEN"]
            if listening and "prefect.server" in " ".join(child.cmdline()):
                return listening[0]
        except psutil.Error:  # ended meanwhile
            continue
    return None


@pytest.mark.services
def test_strangers_and_pages_of_other_origins_are_kept_out_of_a_runs_server(clean, request, tiny_llama, corpus):
    """With a proxy in the environment that answers nothing, too."""
    arguments = ["--model", tiny_llama, "--dataset", corpus, "--bits", "4", "--group-size", "32", "--samples", "4", "--seqlen", "32"]
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", "quantize", *map(str, arguments), "--out", str(clean / "out")],
        env=os.environ | proxy | {"PYTHONPATH": str(request.config.rootpath)},
        cwd=clean,
        stderr=subprocess.PIPE,
        text=True,
    )
    until, port = time.monotonic() + 120, None
    while port is None and process.poll() is None and time.monotonic() < until:
        port = port_of_the_server(process)
        time.sleep(0.1)
    assert port, process.communicate()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path, body in (("admin/settings", None), ("block_documents/filter", b"{}"), ("deployments/filter", b"{}")):
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/api/{path}", body, {"Origin": "http://evil.example"})
        asked.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            opener.open(asked, timeout=10)
        assert refused.value.code == 401
        assert refused.value.headers.get("access-control-allow-origin") is None
    assert process.wait(240) == 0, process.stderr.read()
