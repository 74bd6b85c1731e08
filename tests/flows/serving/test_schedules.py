"""Deployments on a real local Prefect server: run by a real worker and by `serve`, by hand and by schedule, refused, cancelled."""

import contextlib
import datetime
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from flows.serving import dead_runs
from tasks.config.run import RunConfig, load
from tasks.config.sweep import SweepConfig, load_sweep

pytestmark = [pytest.mark.services, pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes through /proc")]

START = 180  # seconds until a process of Prefect's answers, on a machine that is busy
RUN = 180


class Prefect:
    """A server of its own, the processes that use it, and its REST API."""

    def __init__(self, home: Path, root: Path) -> None:
        self.home, self.root, self.processes = home, root, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "GPTQ_"))}
        self.env = kept | {
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
        }
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
        self.wait("the server answers", self.answers, START)

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return False

    def start(self, name: str, module: str, *args: str) -> subprocess.Popen:
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def command(self, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *args],
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self) -> None:
        for process in reversed(self.processes):  # each with what it has started; the server last
            for sign in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, sign)
                    process.wait(20)

    def wait(self, what: str, probe, seconds: float = RUN):
        """What `probe` returns once it is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = probe()
            if found:
                return found
            if any(process.poll() is not None for process in self.processes):
                break  # a server or a worker has ended, which none should
            time.sleep(0.2)
        tails = [f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]) for log in self.home.glob("*.log")]
        pytest.fail(f"not within {seconds} s, or a process ended before: {what}\n" + "\n".join(tails))

    def answer(self, method: str, path: str, body=None) -> httpx.Response:
        """As Prefect's own client does: 503 is a database that is busy, and the request is made again."""
        for _ in range(20):
            answer = self.http.request(method, path, json=body)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        return answer

    def get(self, path: str) -> dict:
        return self.answer("GET", path).raise_for_status().json()

    def post(self, path: str, body) -> dict | list:
        return self.answer("POST", path, body).raise_for_status().json()

    def deployment(self, name: str, flow: str = "quantize") -> dict:
        return self.get(f"/deployments/name/{flow}/{name}")

    def ask(self, deployment: dict, config: dict) -> str:
        """A run by hand; its id."""
        return self.post(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"config": config}})["id"]

    def state(self, run: str) -> dict:
        return self.get(f"/flow_runs/{run}")["state"]

    def until(self, run: str, *types: str) -> dict:
        """The state of a run once it is one of these; another end is a failure at once."""

        def probe():
            state = self.state(run)
            ended = state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            assert state["type"] in types or not ended, f"{state['name']}: {state['message']}\n" + self.log("worker").read_text()[-3000:]
            return state if state["type"] in types else None

        return self.wait(f"{run} is {' or '.join(types)}", probe)

    def told(self, run: str) -> str:
        rows = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(row["message"] for row in rows)

    def under_way(self, run: str) -> str:
        """What a run has told so far; its end is a failure at once."""
        self.until(run, "SCHEDULED", "PENDING", "RUNNING")
        return self.told(run)

    def runs(self, deployment: dict, **wanted) -> list[dict]:
        return self.post("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}, "flow_runs": wanted})


@pytest.fixture(scope="module")
def prefect(tmp_path_factory, request):
    server = None
    try:
        server = Prefect(tmp_path_factory.mktemp("schedules"), request.config.rootpath)
        server.command("prefect", "work-pool", "create", "gptq", "--type", "process")
        server.start("worker", "prefect", "worker", "start", "--pool", "gptq", "--type", "process")
        server.command("prefect", "--no-prompt", "deploy", "--all")
        yield server
    finally:
        if server:
            server.stop()


@pytest.fixture(scope="module")
def nightly(prefect):
    return prefect.deployment("nightly-quantize")


@pytest.fixture(scope="module")
def quick(prefect, tiny_llama, corpus):
    """A run of seconds."""
    return {
        "model": {"path": str(tiny_llama), "device": "cpu"},
        "quantization": {"bits": 4, "group_size": 32, "dataset": str(corpus)},
        "calibration": {"samples": 8, "seqlen": 64},
        "evaluation": {"samples": 4, "seqlen": 64},
        "output": {"dir": str(prefect.home / "quick")},
        "tracking": {"uri": f"sqlite:///{prefect.home}/mlflow.db"},
    }


@pytest.fixture(scope="module")
def slow(quick, prefect):
    """A run with some seconds a block, of the embedded model; its paths are those of the checkout."""
    texts = "flows/embedded/train.parquet"
    return quick | {
        "model": {"path": "flows/embedded/model", "device": "cpu"},
        "output": {"dir": str(prefect.home / "slow")},
        "quantization": {"bits": 4, "dataset": texts, "recipe": "max"},
        "calibration": {"samples": 48, "seqlen": 256},
    }


@pytest.fixture(scope="module")
def first(prefect, nightly, quick):
    """A first run by hand, after the server has been told of three runs whose process it cannot know."""
    ended = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    gone = dead_runs.labels(ended.pid)
    ended.kill()
    ended.wait()
    runs = {"dead": gone, "alive": dead_runs.labels(os.getpid()), "elsewhere": gone | {dead_runs.MACHINE: "another 000000000000"}}
    running = {"flow_id": nightly["flow_id"], "state": {"type": "RUNNING"}}
    ids = {name: prefect.post("/flow_runs/", running | {"name": name, "labels": labels})["id"] for name, labels in runs.items()}
    run = prefect.ask(nightly, quick)
    return run, prefect.until(run, "COMPLETED"), {name: prefect.state(found) for name, found in ids.items()}


def children(parent: int, sign: str) -> list[int]:
    """Processes that `parent` has started and whose command line holds `sign`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent and sign in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


def free(out: Path) -> bool:
    """Nobody holds the lock of an output."""
    with open(f"{out}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_the_deployment_is_the_demo_every_night_and_nothing_of_this_machine_is_in_the_file(request):
    text = (request.config.rootpath / "prefect.yaml").read_text()
    deployments = {row["name"]: row for row in yaml.safe_load(text)["deployments"]}
    config = RunConfig.model_validate(deployments["nightly-quantize"]["parameters"]["config"])
    demo = load(request.config.rootpath / "configs" / "demo.yaml")
    assert config.model_copy(update={"output": demo.output}) == demo
    assert str(request.config.rootpath) not in text and str(Path.home()) + "/" not in text


def test_the_form_has_the_keys_of_a_run_and_a_wrong_value_is_refused(prefect, nightly, quick):
    schema = nightly["parameter_openapi_schema"]["definitions"]
    assert schema["QuantizeConfig"]["properties"]["bits"]["enum"] == [2, 3, 4, 8]
    assert set(RunConfig.model_fields) == set(schema["RunConfig"]["properties"])
    assert nightly["parameters"]["config"]["output"] == {"dir": "runs/nightly-{key}"}
    [schedule] = nightly["schedules"]
    assert schedule["active"] and schedule["schedule"] == {"cron": "0 2 * * *", "timezone": "UTC", "day_or": True}
    assert nightly["global_concurrency_limit"]["limit"] == 1 and nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    wrong = quick | {"quantization": quick["quantization"] | {"bits": 5}}
    answer = prefect.answer("POST", f"/deployments/{nightly['id']}/create_flow_run", {"parameters": {"config": wrong}})
    assert answer.status_code == 409 and "config.quantization.bits" in answer.text and "5 is not one of" in answer.text


def test_the_sweep_is_the_one_of_configs_every_week(prefect, request):
    weekly, ours = prefect.deployment("weekly-sweep", "sweep"), load_sweep(request.config.rootpath / "configs" / "sweep.yaml", {}, {})
    config = SweepConfig.model_validate(weekly["parameters"]["config"])
    assert config.grid == ours.grid and [cell.name for cell in config.expanded()] == [cell.name for cell in ours.expanded()]
    assert weekly["schedules"][0]["schedule"] == {"cron": "0 4 * * sun", "timezone": "UTC", "day_or": True}
    assert weekly["global_concurrency_limit"]["limit"] == 1 and weekly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert set(SweepConfig.model_fields) == set(weekly["parameter_openapi_schema"]["definitions"]["SweepConfig"]["properties"])


def test_a_run_by_hand(prefect, first, quick):
    run, state, _ = first
    assert state["name"] == "Completed" and (Path(quick["output"]["dir"]) / "manifest.jsonl").is_file()
    assert "block 2/2" in prefect.told(run)


def test_a_run_marks_the_dead_runs_of_its_machine_and_no_other(first):
    _, _, states = first
    assert states["dead"]["type"] == "CRASHED" and "was killed" in states["dead"]["message"]
    assert states["alive"]["type"] == states["elsewhere"]["type"] == "RUNNING"


def test_a_run_by_schedule_with_nothing_new_ends_at_once_and_says_so(prefect, first, nightly, quick):
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    [added] = prefect.post(
        f"/deployments/{nightly['id']}/schedules",
        [{"schedule": {"interval": 10, "anchor_date": soon.isoformat(), "timezone": "UTC"}, "parameters": {"config": quick}}],
    )
    mine = {"state": {"type": {"any_": ["PENDING", "RUNNING", "COMPLETED", "FAILED", "CRASHED"]}}}
    try:
        run = prefect.wait(
            "a scheduled run begins", lambda: next((run for run in prefect.runs(nightly, **mine) if run["auto_scheduled"]), None)
        )["id"]
    finally:
        prefect.answer("DELETE", f"/deployments/{nightly['id']}/schedules/{added['id']}").raise_for_status()
    state = prefect.until(run, "COMPLETED")
    assert state["name"] == "Unchanged" and state["message"].startswith(f"unchanged: {quick['output']['dir']} is of this model")
    told = prefect.told(run)
    assert "unchanged, nothing to do" in told and "block 1/" not in told


def test_overlap_is_refused_and_a_cancelled_run_frees_its_device_and_is_resumed(prefect, first, nightly, slow):
    out = Path(slow["output"]["dir"])
    run = prefect.ask(nightly, slow)
    prefect.wait("the first block is done", lambda: "block 1/4" in prefect.under_way(run))
    pid = int(prefect.get(f"/flow_runs/{run}")["labels"][dead_runs.PROCESS].split()[0])
    refused = prefect.until(prefect.ask(nightly, slow), "CANCELLED")
    assert "concurrency limit reached" in refused["message"]
    assert not free(out) and prefect.state(run)["type"] == "RUNNING"
    prefect.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    prefect.until(run, "CANCELLED")
    prefect.wait("the process of the cancelled run is gone", lambda: not Path(f"/proc/{pid}").exists(), 60)
    assert free(out)
    again = prefect.ask(nightly, slow)
    prefect.wait("the block is taken from disk", lambda: "s, from disk" in prefect.under_way(again))
    prefect.post(f"/flow_runs/{again}/set_state", {"state": {"type": "CANCELLING"}})


def test_a_cancelled_sweep_leaves_no_worker(prefect, first, slow):
    folder = prefect.home / "sweep"
    config = {"base": {section: slow[section] for section in slow if section != "output"}, "grid": {"bits": [3, 4]}, "dir": str(folder)}
    run = prefect.ask(prefect.deployment("weekly-sweep", "sweep"), config)
    prefect.wait("a cell's first block is done", lambda: "block 1/4" in prefect.under_way(run))
    workers = children(int(prefect.get(f"/flow_runs/{run}")["labels"][dead_runs.PROCESS].split()[0]), "tasks.sweep.worker")
    prefect.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    prefect.until(run, "CANCELLED")
    assert workers
    prefect.wait("the workers are gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60)
    assert free(folder / "bits=3") and free(folder / "bits=4")


def test_serve_runs_the_same_file_without_a_worker(prefect, first, quick, request):
    text = yaml.safe_load((request.config.rootpath / "prefect.yaml").read_text())
    served = next(row for row in text["deployments"] if row["name"] == "nightly-quantize") | {"name": "served"}
    file = prefect.home / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [served]}))
    process = prefect.start("serve", "flows", "serve", "--file", str(file), "--name", "served")
    prefect.wait("the deployment is served", lambda: prefect.answer("GET", "/deployments/name/quantize/served").status_code == 200)
    deployment = prefect.deployment("served")
    assert deployment["work_pool_name"] is None and not deployment["paused"]
    assert deployment["schedules"][0]["schedule"]["timezone"] == "UTC" and deployment["parameters"] == served["parameters"]
    runs = [prefect.ask(deployment, quick) for _ in range(2)]
    states = [prefect.until(run, "COMPLETED", "CANCELLED") for run in runs]
    assert sorted(state["name"] for state in states) == ["Cancelled", "Unchanged"]
    process.send_signal(signal.SIGINT)
    process.wait(START)
    assert prefect.deployment("served")["paused"], "what nobody runs is not scheduled"
