"""Every snippet of docs/queries.md, run against a store that real logging has filled."""

import re
import shutil

import pytest
from tracked import make_config, make_record, make_sweep

from tasks.outcome.machine import machine
from tasks.tracking.mlflow_runs import log_sweep, log_to_mlflow
from tasks.tracking.registry import promote_in_mlflow


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory, migrated):
    """The variables of the page after its last snippet."""
    home = tmp_path_factory.mktemp("queries")
    shutil.copy(migrated, home / "mlflow.db")
    tracking = {"uri": f"sqlite:///{home}/mlflow.db", "experiment": "gptq", "outbox": str(home / "outbox")}

    def logged(name, kl, bits=4, place=home, sweep=None, gate=None, **changes):
        config = make_config(place, name, bits=bits, tracking=tracking, **({"gate": gate} if gate else {}))
        record = make_record(config, kl, source={"version": "1", "git": "abc"}, sweep=sweep, **changes)
        record.mlflow = log_to_mlflow(config, record)
        assert record.mlflow.error is None, record.mlflow
        return config, record

    logged("three", 0.01, bits=3, model_digest="n" * 64)
    logged(
        "elsewhere",
        0.001,
        evaluation_data=make_record(make_config(home, "x")).evaluation_data.model_copy(update={"digest": "f" * 64}),
        started="2020-01-01T00:00:00Z",
    )
    logged("failed", 0.5, gate={"max_kl": 0.4})
    for name, kl in (("first", 0.3), ("better", 0.2), ("worse", 0.25)):
        config, record = logged(name, kl, gate={"max_kl": 1, "register_as": "my-model"})
        assert promote_in_mlflow(config, record).error is None
    made = {name: make_record(make_config(home / "grid", name, tracking=tracking), kl) for name, kl in (("a=1", 0.4), ("a=2", 0.35))}
    sweep = make_sweep(home / "grid", made)
    for name, record in made.items():
        assert log_to_mlflow(make_config(home / "grid", name, tracking=tracking), record).error is None
    assert log_sweep(make_config(home, "x", tracking=tracking).tracking, sweep).error is None
    found = {"home": home}
    page = (request.config.rootpath / "docs" / "queries.md").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(snippet, "docs/queries.md", "exec"), found)  # noqa: S102 - our own page
    return found


def names(runs):
    return [run.data.tags["gptq.checkpoint"].rsplit("/", 1)[-1] for run in runs]


def test_the_best_of_a_model_and_width_on_one_text(answers):
    assert answers["text"] == "e" * 64 and names([answers["best"]]) == ["better"]
    assert answers["best"].info.run_name == "llama w4g128 tuned"
    assert len(answers["by_task"]) == 8 and answers["by_task"][0].data.metrics["measure/arc_easy/acc/quantized"] == 0.25


def test_a_sweep_and_its_cells(answers):
    assert answers["parent"].info.run_name == "llama sweep grid" and answers["recommended"] == "a=1"
    assert names(answers["cells"]) == ["a=2", "a=1"] and [cell.info.run_name for cell in answers["cells"]] == ["llama a=2", "llama a=1"]


def test_the_champion_and_its_history(answers):
    assert answers["where"].endswith("/better") and answers["champion"].version == answers["history"][-1][1]
    assert [float(kl) for _, _, kl in answers["history"]] == [0.3, 0.2], "the one that was worse never held it"
    assert names([answers["origin"]]) == ["better"]


def test_gates_digests_blocks_and_records(answers):
    assert names(answers["outside"]) == ["failed"] and "0.5 is above 0.4" in answers["reasons"]["llama w4g128 tuned"]
    assert len(answers["same_model"]) == 7 and "three" not in names(answers["same_model"])
    assert len(answers["same_text"]) == 7 and "elsewhere" not in names(answers["same_text"])
    assert len(answers["same_code"]) == 6 and answers["worst_block"] == 1
    assert answers["again"].info.run_id == answers["best"].info.run_id and answers["prefect_run"] == "p"


def test_every_name_that_is_logged_is_on_the_page(answers, request):
    page = (request.config.rootpath / "docs" / "queries.md").read_text()
    shown = set(re.findall(r"`([^`\n]+)`", page))
    runs = answers["client"].search_runs(answers["experiments"])
    tags = {tag for run in runs for tag in run.data.tags if tag.startswith(("gptq.", "prefect.", "mlflow.source", "mlflow.parent"))}
    assert tags - shown == {"gptq.sweep_id"}, "the id of a sweep is that of gptq.sweep"
    assert answers["best"].data.tags["gptq.host"] == machine().host
