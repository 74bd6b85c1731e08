"""What MLflow did not take, wherever it was cut off, is there after a replay as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tracked import dump, make_config, make_record, make_sweep
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.outcome import record as records
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import log, log_sweep, log_to_mlflow
from tasks.tracking.registry import promote
from tasks.tracking.replay import replay

GATE = {"max_kl": 1, "register_as": "m"}


@pytest.fixture
def store(tmp_path, migrated, monkeypatch):
    """store(name): an empty store, which from then on is the one that configs name; its address."""

    def use(name):
        (tmp_path / name).mkdir()
        shutil.copy(migrated, tmp_path / name / "mlflow.db")
        monkeypatch.setenv("GPTQ_STORE", f"sqlite:///{tmp_path}/{name}/mlflow.db")
        return f"sqlite:///{tmp_path}/{name}/mlflow.db"

    return use


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """The figures of equal records are equal; drawing them takes most of the time."""

    class Drawn:
        def savefig(self, path, dpi):
            Path(path).write_text("a figure")

    monkeypatch.setattr("tasks.tracking.mlflow_runs.relative_errors", lambda blocks: Drawn())
    monkeypatch.setattr("tasks.tracking.mlflow_runs.front_figure", lambda sweep: Drawn())


CALLS = (
    "get_experiment_by_name",
    "search_experiments",
    "create_experiment",
    "search_runs",
    "create_run",
    "log_batch",
    "log_inputs",
    "log_artifact",
    "log_text",
    "log_dict",
    "set_terminated",
    "set_tag",
    "delete_run",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "get_model_version_by_alias",
    "search_model_versions",
    "set_model_version_tag",
)


class Cut:
    """MlflowClient's calls fail from the `after`th on. answer_lost: the store gets that one, and only its answer is lost."""

    def __init__(self, monkeypatch, after, answer_lost=False):
        self.calls, self.inside = [], False
        for name in CALLS:
            monkeypatch.setattr(MlflowClient, name, self._call(name, getattr(MlflowClient, name), after, answer_lost))

    def _call(self, name, right, after, answer_lost):
        def call(client, *args, **kwargs):
            if self.inside:  # one call of MLflow's makes another
                return right(client, *args, **kwargs)
            self.calls.append(name)
            if len(self.calls) > after and not (answer_lost and len(self.calls) == after + 1):
                raise ConnectionError(f"gone at {name}")
            self.inside = True
            try:
                found = right(client, *args, **kwargs)
            finally:
                self.inside = False
            if len(self.calls) > after:
                raise ConnectionError(f"gone at {name}")
            return found

        return call


def done(config, record):
    """The end of a run: logged, and registered where it passed its gate."""
    record = record.model_copy()
    record.mlflow = log.fn(config, record)
    if record.gate and record.gate.passed:
        record.registry = promote.fn(config, record)


def folder_of(config):
    return Path(config.tracking.outbox)


def test_a_run_cut_off_at_any_call_is_as_one_that_was_not(tmp_path, store, monkeypatch):
    config = make_config(tmp_path, gate=GATE)
    record = make_record(config)
    right = store("right")
    with monkeypatch.context() as patch:
        cut = Cut(patch, after=1000)
        done(config, record)
    expected, calls = dump(right), cut.calls
    assert outbox.files(folder_of(config)) == [] and len(calls) > 12 and len(expected) == 2
    assert expected["m 1"][0] == record.id and expected["m 1"][3] == ["champion"]
    for after, name in enumerate(calls):
        for answer_lost in (False, True) if name.startswith(("create", "log_batch", "set")) else (False,):
            address = store(f"cut-{after}-{answer_lost}")
            with monkeypatch.context() as patch:
                cut = Cut(patch, after, answer_lost)
                done(config, record)
            [entry] = [outbox.read(file) for file in outbox.files(folder_of(config))]
            assert "gone at" in entry.why and len(cut.calls) <= after + 1, "the first call that fails is the last that is made"
            [told] = replay(folder_of(config))
            assert told.why is None and records.read(config.out).mlflow.run_id == told.run_id
            assert records.read(config.out).registry.champion
            assert dump(address) == expected, (after, answer_lost)
            assert outbox.files(folder_of(config)) == [] and replay(folder_of(config)) == []


def test_a_run_that_is_done_again_and_logged_clears_its_entry(tmp_path, store, monkeypatch):
    config = make_config(tmp_path)
    record = make_record(config)
    expected = (store("right"), done(config, record))[0]
    expected, address = dump(expected), store("cut")
    with monkeypatch.context() as patch:
        Cut(patch, 5)
        done(config, record)
    [file] = outbox.files(folder_of(config))
    kept = file.read_text()
    # the same command again, by now with a gate: what was logged of the config before it was cut off stays
    judged = make_config(tmp_path, gate={"max_kl": 0.1})
    done(judged, make_record(judged).model_copy(update={"id": record.id, "gate": None}))
    assert outbox.files(folder_of(config)) == [] and dump(address)[record.id]["metrics"] == expected[record.id]["metrics"]
    # what is replayed although MLflow has it changes nothing
    before = dump(address)
    file.write_text(kept)
    assert [each.why for each in replay(folder_of(config))] == [None] and dump(address) == before


@pytest.fixture
def swept(tmp_path):
    """A sweep of two cells as it lies on disk, both not logged; its config, sweep.json and records."""
    configs = {
        name: make_config(tmp_path / "grid", name, tracking={"outbox": str(tmp_path / "outbox")}, gate=GATE) for name in ("a=1", "a=2")
    }
    made = {name: make_record(config, kl) for (name, config), kl in zip(configs.items(), (0.25, 0.5), strict=True)}
    return configs, make_sweep(tmp_path / "grid", made), made


def sweep_ends(configs, sweep, made):
    """As flows.sweep ends, with a store that answers or not."""
    sweep, made = sweep.model_copy(), {name: record.model_copy() for name, record in made.items()}
    for name, config in configs.items():
        made[name].mlflow = log.fn(config, made[name])
    chosen, tracking = sweep.recommended.name, configs["a=1"].tracking
    sweep.registry = promote.fn(configs[chosen], made[chosen])
    sweep.cells = [cell.model_copy(update={"mlflow_run_id": made[cell.name].mlflow.run_id}) for cell in sweep.cells]
    path = records.write_sweep(sweep.folder, sweep)
    sweep.mlflow = outbox.update(tracking, "sweep", path, log_sweep(tracking, sweep))
    records.write_sweep(sweep.folder, sweep)


def test_a_sweep_is_logged_with_its_cells_as_children_and_its_choice_registered(tmp_path, store, monkeypatch, swept):
    configs, sweep, made = swept
    right = store("right")
    sweep_ends(*swept)
    expected = dump(right)
    parent, cells = expected[sweep.id], [expected[record.id] for record in made.values()]
    assert parent["name"] == "llama sweep grid" and [cell["tags"]["mlflow.parentRunId"] for cell in cells] == [sweep.id] * 2
    assert (parent["start"], parent["end"]) == (sweep.started_ms, 1_700_000_000_000) and parent["metrics"]["cells"][0][2] == 2
    assert expected["m 1"][0] == made["a=1"].id
    for after in (0, 3, 20):
        address = store(f"cut-{after}")
        with monkeypatch.context() as patch:
            Cut(patch, after)
            sweep_ends(*swept)
        waiting = outbox.files(tmp_path / "outbox")
        assert len(waiting) >= 2
        found = replay(tmp_path / "outbox")
        assert [each.kind for each in found] == ["run"] * (len(waiting) - 1) + ["sweep"] and not any(each.why for each in found)
        assert dump(address) == expected
        told = records.read_sweep(tmp_path / "grid")
        assert told.mlflow.error is None and told.registry.version == "1"
        assert [cell.mlflow_run_id for cell in told.cells] == [records.read(each.out).mlflow.run_id for each in configs.values()]


def test_two_runs_of_one_record_become_one(tmp_path, store):
    config = make_config(tmp_path)
    record, address = make_record(config), store("twice")
    log_to_mlflow(config, make_record(make_config(tmp_path, "other")))  # so that there is an experiment
    client = MlflowClient(tracking_uri=address)
    for _ in range(2):  # as a call that MLflow tried again after a timeout
        client.create_run(client.get_experiment_by_name("e").experiment_id, tags={"gptq.run": record.id})
    assert log_to_mlflow(config, record).error is None
    assert dump(address)[record.id]["status"] == "FINISHED"


def call(*args):
    return CliRunner().invoke(app, ["track-pending", *(str(arg) for arg in args)])


def test_what_cannot_be_logged_is_told_and_stops_no_other(tmp_path, store, monkeypatch):
    store("store")
    good, gone, damaged, foreign = (make_config(tmp_path, name) for name in ("good", "gone", "damaged", "foreign"))
    with monkeypatch.context() as patch:
        Cut(patch, 0)
        for config in (good, gone, damaged, foreign):
            done(config, make_record(config))
    records.record_path(gone.out).unlink()
    records.record_path(damaged.out).write_text('{"id":')
    records.record_path(foreign.out).write_text('{"id": "x"}')
    (folder_of(good) / "broken.json").write_text("{")
    assert records.read(good.out).mlflow.run_id is None
    result = call("--outbox", folder_of(good), "--json")
    found = {Path(each["path"] or each["entry"]).name: each for each in json.loads(result.stdout)}
    assert result.exit_code == 1 and result.stderr.startswith("error: 4 of 5 stay in ") and result.stderr.count("\n") == 1
    assert found["good.run.json"]["why"] is None and records.read(good.out).mlflow.run_id == found["good.run.json"]["run_id"]
    assert "the record is gone" in found["gone.run.json"]["why"] and "cannot be read" in found["damaged.run.json"]["why"]
    assert "is damaged" in found["foreign.run.json"]["why"] and "outbox entry" in found["broken.json"]["why"]
    assert len(outbox.files(folder_of(good))) == 4
    for file in outbox.files(folder_of(good)):
        file.unlink()
    result = call("--outbox", folder_of(good))
    assert result.exit_code == 0 and "nothing is pending" in result.stdout
    assert call("--outbox", tmp_path / "never").exit_code == 0


def test_a_store_that_is_still_away_is_asked_once(tmp_path, store, monkeypatch):
    address = store("store")
    configs = [make_config(tmp_path, name) for name in ("one", "two", "three")]
    with monkeypatch.context() as patch:
        Cut(patch, 0)
        for config in configs:
            done(config, make_record(config))
        cut = Cut(patch, 0)
        found = replay(folder_of(configs[0]))
    assert len([name for name in cut.calls]) == 2 and ["gone at" in each.why for each in found] == [True] * 3
    result = call("--outbox", folder_of(configs[0]))
    assert result.exit_code == 0 and result.stdout.count("logged as run") == 3 and len(dump(address)) == 3


def test_relative_paths_start_where_the_run_was_started(tmp_path, migrated, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(Path("runs"), uri="sqlite:///mlflow.db", tracking={"outbox": "runs/outbox"})
    with monkeypatch.context() as patch:
        Cut(patch, 0)
        done(config, make_record(config))
    shutil.copy(migrated, "mlflow.db")
    monkeypatch.chdir(tmp_path / "there")
    assert [each.why for each in replay(tmp_path / "here" / "runs" / "outbox")] == [None]
    assert list((tmp_path / "there").iterdir()) == [] and len(dump(f"sqlite:///{tmp_path}/here/mlflow.db")) == 1


def test_an_address_with_a_password_is_given_again(tmp_path, store, monkeypatch):
    config = make_config(tmp_path, uri="postgresql://me:s3cret@127.0.0.1/db")
    with monkeypatch.context() as patch:
        Cut(patch, 0)
        done(config, make_record(config))
    assert "s3cret" not in "".join(file.read_text() for file in [*outbox.files(folder_of(config)), records.record_path(config.out)])
    [told] = replay(folder_of(config))
    assert "no file keeps: give the address by --uri" in told.why
    address = store("store")
    assert call("--outbox", folder_of(config), "--uri", "env:GPTQ_STORE").exit_code == 0
    [run] = dump(address).values()
    assert run["params"]["tracking.uri"] == "postgresql://me:***@127.0.0.1/db", "as it would have been told at once"


def test_a_secret_address_is_in_no_message(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    monkeypatch.setenv("GPTQ_STORE", "http://127.0.0.1:9/s3cret-path")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done(config, make_record(config))
    [file] = outbox.files(folder_of(config))
    assert "127.0.0.1:9/s3cret" not in file.read_text() + records.record_path(config.out).read_text()


def test_two_replays_do_not_run_beside_each_other(tmp_path, store, monkeypatch):
    import fcntl

    store("store")
    config = make_config(tmp_path)
    with monkeypatch.context() as patch:
        Cut(patch, 0)
        done(config, make_record(config))
    with (folder_of(config) / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = call("--outbox", folder_of(config))
    assert result.exit_code == 75 and "by another process" in result.stderr
