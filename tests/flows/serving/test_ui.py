"""`python -m flows ui`: what it refuses to begin with; with real servers and a real browser, what it shows, to whom, and how it ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from flows.demo import ROOT, demo_sweep
from flows.serving.ui import password
from tasks.config.sweep import load_sweep, parse_axis

START = 240
"""Seconds until servers answer on a machine that is busy, and until a tiny sweep is done."""
HAS_PROC = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes through /proc")


def call(*args):
    return CliRunner().invoke(app, ["ui", *map(str, args)])


# -- before anything is started -------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    return tmp_path


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_taken_port_is_told_with_the_remedy(home, option):
    other = {"--prefect-port": "--mlflow-port", "--mlflow-port": "--prefect-port"}[option]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = call(option, port, other, 0)
    assert result.exit_code == 2
    assert result.stderr == f"error: port {port} is taken: end what listens there, or give another: {option} 0 finds a free one\n"


@pytest.mark.parametrize(
    "store, said",
    [
        ("mlruns", "--store mlruns: must be sqlite:///FILE.db"),
        ("http://127.0.0.1:5000", "is a server already; give the database"),
        ("sqlite:///gone/mlflow.db", "gone is no folder; make it"),
        ("env:GONE_STORE", "the environment variable GONE_STORE is not set"),
        ("postgres://me:hidden@host", "--store postgres://me:***@host: must be"),
    ],
)
def test_a_store_that_is_none_is_one_line_and_exit_2(home, store, said):
    result = call("--store", store)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert "hidden" not in result.output


def test_the_password_is_made_once_for_its_owner_alone(home):
    made, place = password()
    file = home / "prefect" / "flows-ui.auth"
    assert password() == (made, place) == (made, f"$(cat {file})") and len(made.partition(":")[2]) >= 20
    assert file.stat().st_mode & 0o777 == 0o600 and os.listdir(file.parent) == [file.name]
    file.chmod(0o644)
    assert "others may read it: delete it" in call().stderr
    file.unlink()
    assert password()[0] != made


def test_a_password_of_ones_own(home, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:mine")
    assert password() == ("me:mine", "$PREFECT_SERVER_API_AUTH_STRING") and not (home / "prefect").exists()
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "mine")
    assert call().stderr == (
        "error: PREFECT_SERVER_API_AUTH_STRING must be user:password, both not empty; set it so, or unset it and one is made\n"
    )


def test_the_demo_is_the_sweep_of_its_yaml_from_anywhere(home, monkeypatch):
    words = demo_sweep("sqlite:///other.db")
    settings = dict(word.removeprefix("--set=").split("=", 1) for word in words if word.startswith("--set="))
    axes = dict(parse_axis(word.removeprefix("--grid=")) for word in words if word.startswith("--grid="))
    found = load_sweep(words[1], axes, settings | {"dir": words[-1]})
    assert found.base["tracking"]["uri"] == "sqlite:///other.db" and Path(found.base["model"]["path"]).is_dir()
    monkeypatch.chdir(ROOT)
    wanted = load_sweep("configs/sweep.yaml", {}, {})
    assert [cell.name for cell in found.expanded()] == [cell.name for cell in wanted.expanded()]
    assert found.choose == wanted.choose and found.dir == wanted.dir
    assert not [word for word in demo_sweep("sqlite:///other.db") if "path" in word], "in the checkout, the paths of the YAML"


# -- real servers ---------------------------------------------------------------------------------------------------------

FILLED = (
    "import sys; from flows.cli.launch import outcome; from flows.serving.ui import ui\nwith outcome(): ui(0, 0, sys.argv[1], sys.argv[2:])"
)


def heeds_signals():
    """Under nohup or in the background some are ignored, and a child would go on ignoring them."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_DFL)


class Pages:
    """A `flows ui` of its own home, on free ports."""

    def __init__(self, home: Path, *args: str) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "GPTQ_"))}
        self.env = kept | {"PREFECT_HOME": str(home / "prefect"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(home / "out.txt", "w") as out, open(home / "err.txt", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *args], cwd=home, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=heeds_signals
            )

    @property
    def told(self) -> str:
        return (self.home / "out.txt").read_text()

    @property
    def noted(self) -> str:
        return (self.home / "err.txt").read_text()

    def wait(self, what: str, probe, ends: bool = False):
        until = time.monotonic() + START
        while time.monotonic() < until:
            if found := probe():
                return found
            assert ends or self.process.poll() is None, f"it ended with {self.process.returncode}: {self.noted}"
            time.sleep(0.1)
        pytest.fail(f"not within {START} s: {what}\n{self.told}{self.noted}")

    def ready(self) -> "Pages":
        self.wait("the addresses", lambda: "Ctrl-C" in self.told)
        self.prefect, self.mlflow = re.findall(r"^(?:Prefect|MLflow) +(http://127\.0\.0\.1:\d+)", self.told, re.MULTILINE)
        self.auth = tuple((self.home / "prefect" / "flows-ui.auth").read_text().strip().split(":"))
        return self

    def command(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        """`flows` in a shell that has read what was told."""
        exports = "\n".join(line for line in self.told.splitlines() if line.startswith("  export "))
        assert exports.count("export") == 2
        return subprocess.run(
            ["bash", "-c", exports + '\nexec "$@"', "-", sys.executable, "-m", "flows", *args],
            cwd=self.home,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=START,
        )

    def family(self) -> list[int]:
        """The processes that it has started, and those that they have."""
        return descendants(self.process.pid)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(30)
        self.process.kill()
        self.process.wait()


def stat(pid: int) -> list[str]:
    try:  # state, parent, ...; proc_pid_stat(5)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]


def descendants(root: int) -> list[int]:
    parents = {int(name): int(fields[1]) for name in os.listdir("/proc") if name.isdecimal() and len(fields := stat(int(name))) > 1}
    children = [pid for pid, parent in parents.items() if parent == root]
    return children + [pid for child in children for pid in descendants(child)]


def gone(pids: list[int]) -> bool:
    return all(stat(pid)[0] in "XZ" for pid in pids)


def listeners(pids: list[int]) -> set[str]:
    """Local addresses, as /proc writes them, of the sockets of these processes that listen."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(file))
    rows = [line.split() for kind in ("tcp", "tcp6", "udp", "udp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    # 0A: TCP that listens; 07: UDP that is bound
    return {row[1] for row in rows if row[3] in ("0A", "07") and f"socket:[{row[9]}]" in inodes}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_llama, corpus):
    home = tmp_path_factory.mktemp("ui")
    (home / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"dataset": str(corpus), "group_size": 32},
                "calibration": {"samples": 8, "seqlen": 64},
                "evaluation": {"samples": 8, "seqlen": 64},
            }
        )
    )
    started = Pages(
        home,
        "-c",
        FILLED,
        "sqlite:///mlflow.db",
        "sweep",
        "run.yaml",
        "--grid",
        "bits=3,4",
        "--out",
        "tiny-sweep",
        "--set",
        "choose.max_perplexity_increase=9",
    )
    try:
        started.ready()
        started.wait("the sweep is done", lambda: "the demo is on both pages" in started.noted)
        yield started
    finally:
        started.stop()


class Heard:
    """What a page says in the console, and whom it asks."""

    def __init__(self, page, address: str) -> None:
        self.errors, self.failed, self.foreign = [], set(), []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        # a failed request is in the console without its reason; it is counted as what it is, below
        page.on(
            "console",
            lambda said: said.type == "error" and not said.text.startswith("Failed to load resource") and self.errors.append(said.text),
        )
        page.on("response", lambda got: got.status >= 400 and self.failed.add(f"{got.status} {got.url.removeprefix(address)}"))
        page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or self.foreign.append(asked.url))


@pytest.mark.services
@HAS_PROC
def test_prefects_page_asks_once_and_lists_the_sweep(pages, browser):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.goto(f"{pages.prefect}/runs")
    page.locator("input[type=password]").fill(":".join(pages.auth))
    page.keyboard.press("Enter")
    page.get_by_text("sweep-tiny-sweep").first.wait_for()
    page = context.new_page()
    heard = Heard(page, pages.prefect)
    page.goto(f"{pages.prefect}/runs")
    page.get_by_text("sweep-tiny-sweep").first.wait_for()
    page.get_by_text("Completed").first.wait_for()
    page.screenshot(path=pages.home / "prefect-runs.png")
    page.get_by_text("sweep-tiny-sweep").first.click()
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_text("bits=3").first.wait_for()
    page.screenshot(path=pages.home / "prefect-sweep.png")
    assert (heard.errors, heard.foreign) == ([], [])
    assert {row for row in heard.failed if "favicon" not in row and not row.endswith(".svg")} == set()
    context.close()


@pytest.mark.services
@HAS_PROC
def test_the_newer_page_of_prefect_tells_nobody_either(pages, browser):
    context = browser.new_context()
    page = context.new_page()
    heard = Heard(page, pages.prefect)
    answered = []
    page.on("requestfinished", lambda done: answered.append(done.url))
    page.goto(f"{pages.prefect}/v2/login")
    page.locator("input").first.fill(":".join(pages.auth))
    page.keyboard.press("Enter")
    page.get_by_text("Dashboard").first.wait_for()
    page.goto(f"{pages.prefect}/v2/runs")
    page.get_by_text("sweep-tiny-sweep").first.wait_for()
    assert [url for url in answered if not url.startswith((pages.prefect, "data:", "blob:"))] == []
    assert heard.foreign == [], "refused before it is sent"
    context.close()


@pytest.mark.services
@HAS_PROC
def test_mlflows_page_lists_the_sweep(pages, browser):
    context = browser.new_context(
        viewport={"width": 1400, "height": 900}, http_credentials=dict(zip(("username", "password"), pages.auth, strict=True))
    )
    page = context.new_page()
    heard = Heard(page, pages.mlflow)
    experiment = httpx.post(
        f"{pages.mlflow}/api/2.0/mlflow/experiments/search",
        json={"max_results": 9, "filter": "name = 'gptq'"},
        auth=pages.auth,
        trust_env=False,
    ).json()["experiments"][0]["experiment_id"]
    page.goto(f"{pages.mlflow}/#/experiments/{experiment}/runs")
    page.get_by_role("link", name="tiny-sweep").first.wait_for()
    page.screenshot(path=pages.home / "mlflow-runs.png")
    page.get_by_role("link", name="tiny-sweep").first.click()
    page.get_by_text("recommended/kl").first.wait_for()
    page.screenshot(path=pages.home / "mlflow-sweep.png")
    assert (heard.errors, heard.foreign) == ([], [])
    # asked of servers with a database of users, which this is not
    assert {row for row in heard.failed if "users/current" not in row} == set()
    context.close()


@pytest.mark.services
@HAS_PROC
def test_both_servers_refuse_foreign_hosts_origins_and_those_without_the_password(pages):
    for address, path, body in (
        (pages.prefect, "/api/flow_runs/filter", {}),
        (pages.prefect, "/", None),
        (pages.prefect, "/api/health", None),
        (pages.mlflow, "/api/2.0/mlflow/experiments/search", {"max_results": 1}),
        (pages.mlflow, "/", None),
        (pages.mlflow, "/health", None),
        (pages.mlflow, "/graphql", {"query": '{ test(inputString: "a") { output } }'}),
    ):

        def ask(headers, auth=pages.auth, method="GET" if body is None else "POST", url=address + path, body=body):
            return httpx.request(method, url, json=body, headers=headers, auth=auth, trust_env=False, timeout=30)

        assert ask({}).status_code == ask({"Origin": address}).status_code == 200, path
        for headers in (
            {"Host": "evil.test"},
            {"Host": "evil.test:5000"},
            {"Origin": "http://evil.test"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
        ):
            for method in ("GET" if body is None else "POST", "OPTIONS"):
                refused = ask(headers, method=method)
                assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers, (path, headers, method)
        assert "access-control-allow-origin" not in ask({}).headers
        if body is not None:
            assert ask({}, auth=None).status_code == ask({}, auth=("gptq", "wrong")).status_code == 401, path
    for address, path in ((pages.prefect, "/api/events/out"), (pages.mlflow, "/")):
        handshake = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Origin": "http://evil.test",
        }
        assert httpx.get(address + path, headers=handshake, auth=pages.auth, trust_env=False).status_code == 403


@pytest.mark.services
@HAS_PROC
def test_nothing_listens_beyond_loopback_and_no_process_knows_a_way_to_tell(pages):
    family = pages.family()
    assert len(family) == 2, "each server is one process"
    ports = {f"{int(address.rpartition(':')[2]):04X}" for address in (pages.prefect, pages.mlflow)}
    assert listeners([pages.process.pid, *family]) == {f"0100007F:{port}" for port in ports}
    for pid in family:
        environ = dict(row.partition("=")[::2] for row in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        assert environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and environ["DO_NOT_TRACK"] == "true"
        assert environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        assert pages.auth[1] not in Path(f"/proc/{pid}/cmdline").read_text(), "everybody may read the command line of a process"
    assert pages.auth[1] not in pages.told + pages.noted, "nor a file of output"


@pytest.mark.services
@HAS_PROC
def test_a_run_as_it_is_told_shows_on_both_and_one_without_the_password_says_so(pages):
    user, secret = pages.auth
    done = pages.command(
        "quantize",
        "run.yaml",
        "--bits",
        "4",
        "--out",
        "single",
        "--set",
        f"tracking.uri={pages.mlflow}",
        MLFLOW_TRACKING_USERNAME=user,
        MLFLOW_TRACKING_PASSWORD=secret,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((pages.home / "single.run.json").read_text())
    assert record["mlflow"]["error"] is None
    with httpx.Client(auth=pages.auth, trust_env=False, timeout=30) as ask:
        run = ask.get(f"{pages.prefect}/api/flow_runs/{record['prefect_flow_run_id']}").json()
        assert run["state"]["type"] == "COMPLETED"
        found = ask.get(f"{pages.mlflow}/api/2.0/mlflow/runs/get", params={"run_id": record["mlflow"]["run_id"]}).json()["run"]
        assert found["info"]["run_name"] == "tiny-llama w4g32 tuned" and found["info"]["status"] == "FINISHED"
        file = ask.get(f"{pages.mlflow}/get-artifact", params={"run_uuid": record["mlflow"]["run_id"], "path": "config.yaml"})
        assert file.status_code == 200 and "group_size: 32" in file.text
    stranger = subprocess.run(
        [sys.executable, "-m", "flows", "quantize", "run.yaml", "--bits", "2", "--out", "stranger"],
        cwd=pages.home,
        env=pages.env | {"PREFECT_API_URL": f"{pages.prefect}/api"},
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert stranger.returncode == 1 and "set PREFECT_API_AUTH_STRING to its user:password" in stranger.stderr
    assert not (pages.home / "stranger").exists()


@pytest.mark.services
@HAS_PROC
def test_two_at_once_and_where_one_server_dies_the_other_is_stopped(pages, tmp_path):
    other = Pages(tmp_path, "-m", "flows", "ui", "--prefect-port", "0", "--mlflow-port", "0").ready()
    try:
        assert {other.prefect, other.mlflow}.isdisjoint({pages.prefect, pages.mlflow}) and other.auth != pages.auth
        assert httpx.get(f"{pages.mlflow}/", auth=other.auth, trust_env=False).status_code == 401
        family = other.family()
        assert len(family) == 2
        os.kill(family[1], signal.SIGKILL)
        assert other.process.wait(60) == 1 and gone(family)
        assert "server was ended by SIGKILL" in other.noted
        # its ports are free again at once
        for address in (other.prefect, other.mlflow):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(address.rpartition(":")[2])))
    finally:
        other.stop()


@pytest.mark.services
@HAS_PROC
def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database, but a file of this name" * 99)
    started = Pages(tmp_path, "-m", "flows", "ui", "--prefect-port", "0", "--mlflow-port", "0")
    try:
        started.wait("its end", lambda: started.process.poll() is not None, ends=True)
        assert started.process.returncode == 1 and started.told == ""
        assert "file is not a database" in started.noted and "error: MLflow's server ended with exit code 1" in started.noted
    finally:
        started.stop()


@pytest.mark.services
@HAS_PROC
@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_is_left_of_one_that_is_ended_while_it_starts(tmp_path, sign, code):
    started = Pages(tmp_path, "-m", "flows", "ui", "--prefect-port", "0", "--mlflow-port", "0")
    try:
        family = started.wait(
            "both servers are begun", lambda: len(started.family()) == 2 and "starting" in started.noted and started.family()
        )
        started.process.send_signal(sign)
        assert started.process.wait(60) == code, started.noted
        started.wait("both servers are gone", lambda: gone(family), ends=True)
    finally:
        started.stop()


@pytest.mark.services
@HAS_PROC
def test_ctrl_c_leaves_no_process(pages):
    family = pages.family()
    with socket.create_connection(("127.0.0.1", int(pages.prefect.rpartition(":")[2]))):  # as a browser keeps one open
        pages.process.send_signal(signal.SIGINT)
        assert pages.process.wait(60) == 0
    assert gone(family) and pages.noted.endswith("stopping\n") and "Traceback" not in pages.noted


@pytest.mark.services
def test_without_a_password_the_guard_stays(tmp_path):
    pages = Pages(tmp_path, "-m", "flows", "ui", "--prefect-port", "0", "--mlflow-port", "0", "--no-password")
    try:
        pages.wait("the addresses", lambda: "Ctrl-C" in pages.told)
        addresses = re.findall(r"http://127\.0\.0\.1:\d+$", pages.told, re.MULTILINE)
        assert len(addresses) == 2 and not (tmp_path / "prefect" / "flows-ui.auth").exists()
        for address, path in zip(
            addresses, ("/api/admin/version", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"), strict=True
        ):
            assert httpx.get(address + path, trust_env=False).status_code == 200
            for foreign in ({"Host": "example.com"}, {"Origin": "http://example.com"}):
                assert httpx.get(address + path, headers=foreign, trust_env=False).status_code == 403
        pages.process.send_signal(signal.SIGINT)
        assert pages.process.wait(60) == 0
    finally:
        pages.process.kill()
