"""Names, params, tags and metrics of a record, without MLflow."""

import pytest
from tracked import DAY, make_config, make_record, make_sweep

from tasks.config.run import from_dict
from tasks.outcome.machine import machine
from tasks.outcome.record import RunRecord
from tasks.tracking import mlflow_fields

LEAST = {"model": {"path": "org/llama-8b"}, "quantization": {"bits": 4, "dataset": "t.txt"}}


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "llama-8b w4g128 tuned"),
        ({"quantization.group_size": -1, "quantization.recipe": "best"}, "llama-8b w4grow best"),
        ({"quantization.sym": False, "quantization.format": "gptq_v2"}, "llama-8b w4g128 tuned asym gptq_v2"),
        ({"quantization.allocate": {"bits": [2, 4], "budget_bpw": 3.5}}, "llama-8b w3.5g128 tuned"),
        ({"model.path": "models/tiny/"}, "tiny w4g128 tuned"),
    ],
)
def test_the_name_of_a_run_tells_model_width_and_recipe(changes, name):
    assert mlflow_fields.run_name(from_dict(LEAST, changes)) == name


def test_cells_and_sweeps_are_named_by_theirs(tmp_path):
    record = make_record(config := make_config(tmp_path))
    sweep = make_sweep(tmp_path / "grid", {"bits=3_group_size=32": record})
    assert (
        mlflow_fields.run_name(config, record.sweep.cell) == "llama bits=3_group_size=32"
        and mlflow_fields.sweep_name(sweep.name) == "llama sweep grid"
    )


def test_parameters_are_flat_and_whole():
    config = from_dict(
        LEAST,
        {
            "quantization.allocate": {"bits": [2, 4], "budget_bpw": 3.5},
            "quantization.dynamic": {"-:.*down": {}},
            "quantization.dataset": ["a text", "another"],
            "gate.max_kl": 0.5,
        },
    )
    params = mlflow_fields.params(config)
    assert params["quantization.allocate.bits"] == "[2, 4]" and params["quantization.allocate.budget_bpw"] == "3.5"
    assert params["quantization.dynamic"] == '{"-:.*down": {}}' and params["quantization.dataset"] == "2 given in the config"
    assert params["gate.max_kl"] == "0.5" and params["model.path"] == "org/llama-8b" and not any("notify" in key for key in params)


def test_sections_in_lists_have_a_key_each():
    from tasks.config.run import _flatten

    rows = {}
    _flatten("evaluation.measures", [{"name": "arc", "seeds": [1, 2]}, {"name": "ptb", "dataset": ["x", "y"]}], rows)
    assert rows == {
        "evaluation.measures.0.name": "arc",
        "evaluation.measures.0.seeds": "[1, 2]",
        "evaluation.measures.1.name": "ptb",
        "evaluation.measures.1.dataset": "2 given in the config",
    }


def test_every_number_has_its_name_step_and_time(tmp_path):
    rows = mlflow_fields.metrics(make_record(make_config(tmp_path)))
    assert len({(key, step) for key, _, _, step in rows}) == len(rows), "no number is told twice"
    told = {(key, step): (value, when) for key, value, when, step in rows}
    single = {key: value for (key, step), (value, _) in told.items() if step == 0}
    assert single["flips"] == 0.125 and single["overlap_share"] == 0.5 and single["kl"] == 0.25 and single["perplexity_increase"] == 0.25
    place = "measure/arc_easy/acc/"
    assert {key.removeprefix(place): value for key, value in single.items() if key.startswith(place)} == {
        "original": 0.5,
        "quantized": 0.25,
        "recovery": 0.5,
        "recovery_low": 0.375,
        "recovery_high": 0.625,
        "lost": 3,
        "gained": 1,
        "count": 8,
    }
    assert single["measure/wikitext2/perplexity/recovery"] == 0.8 and "measure/wikitext2/perplexity/recovery_low" not in single
    assert "top1_agreement" not in single and "relative_error/mlp.up" not in single, "what was not measured is not told"
    assert told["relative_error/attn.q", 1] == (1.1, DAY) == told["block/worst_relative_error", 1] and told["tokens/mlp.up", 1] == (65, DAY)
    assert told["system/system_memory_usage_megabytes", 1] == (2.0, DAY - 1000) and ("system/cpu_utilization_percentage", 1) not in told


def test_a_record_of_before_is_told_as_far_as_it_goes(tmp_path):
    found = make_record(config := make_config(tmp_path)).model_dump()
    for key in ("schema_version", "system", "source", "model_digest", "device", "kernels", "sweep", "prefect_flow_run_url"):
        del found[key]
    found["machine"] = {"gpu": None}
    numbers = {"original_perplexity": 2.0, "quantized_perplexity": 2.5, "kl": None, "top1_agreement": 0.5}
    record = RunRecord.model_validate(found | {"evaluation": numbers | {"digest": "e" * 64}})
    told = {key for key, *_ in mlflow_fields.metrics(record)}
    assert "quantized_perplexity" in told and not any(key.startswith(("measure/", "system/", "flips")) for key in told)
    assert mlflow_fields.tags(config, record)["gptq.host"] == ""


def test_rows_of_one_name_and_metric_are_kept_apart(tmp_path):
    record = make_record(make_config(tmp_path))
    record.evaluation = record.evaluation.model_copy(update={"measures": record.evaluation.measures * 2})
    told = {key: value for key, value, *_ in mlflow_fields.metrics(record)}
    assert told["measure/wikitext2/perplexity/original"] == told["measure/wikitext2/perplexity_2/original"] == 4.0


def test_tags_are_what_people_filter_by(tmp_path):
    config = make_config(tmp_path, gate={"max_kl": 0.1}, model={"path": "models/llama", "revision": "main"})
    record = make_record(
        config, machine=machine().model_copy(update={"gpu": "H200"}), source={"version": "1", "git": "abc-dirty"}, device="cuda"
    )
    tags = mlflow_fields.tags(config, record)
    assert {
        "gptq.kind": "run",
        "gptq.model": "llama",
        "gptq.model_revision": "main",
        "gptq.model_digest": "m" * 64,
        "gptq.bits": "4",
        "gptq.group_size": "128",
        "gptq.recipe": "tuned",
        "gptq.device": "H200",
        "gptq.kernels": "c",
        "gptq.code_version": "1",
        "mlflow.source.git.commit": "abc-dirty",
        "gptq.evaluation": "e" * 64,
        "gptq.calibration": "d" * 64,
        "gptq.gate": "failed",
        "prefect.flow_run_id": "p",
        "gptq.host": record.machine.host,
    }.items() <= tags.items()
    assert "0.25 is above 0.1" in tags["gptq.gate.failed"] and all(isinstance(value, str) for value in tags.values())
    assert mlflow_fields.tags(config, record.model_copy(update={"device": "cpu"}))["gptq.device"] == "cpu"
    mixed = make_config(tmp_path, quantization={"bits": 4, "dataset": "t", "allocate": {"bits": [2, 4], "budget_bpw": 3.5}})
    assert mlflow_fields.tags(mixed, record)["gptq.bits"] == "mixed"


@pytest.mark.parametrize("name, said", [("acc,none [x]: a-b.c_d", "acc_none _x__ a-b.c_d"), ("a/../b", "a_.._b")])
def test_names_that_mlflow_refuses_are_rewritten(name, said):
    assert mlflow_fields.safe(name) == said
