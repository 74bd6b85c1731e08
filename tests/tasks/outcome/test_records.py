"""Records of version 1, as today's files are, give the same page, gate, notification and MLflow fields; and what reading refuses."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from gptq_core.errors import InputError
from tasks.config.run import GateConfig, from_dict
from tasks.outcome import notify
from tasks.outcome import record as records
from tasks.outcome.gate import judge
from tasks.report import run as runs
from tasks.report import sweep as sweeps
from tasks.sweep import results
from tasks.tracking import mlflow_fields

GOLDEN = Path(__file__).parents[2] / "golden"
"""By hand as in report_records.py and tracked.py when version 1 was current, and what its code made of them; `real` and `swept` are
of a run and a sweep of the embedded model."""
GATE = GateConfig(max_perplexity_increase=0.2, max_kl=0.06, min_recovery=0.4, max_gb=1, max_fallback_layers=1)
RUNS, SWEEPS = ("by_hand", "old", "tracked", "cell", "real"), ("by_hand_sweep", "screening", "tracked_sweep", "swept")


def stored(name, suffix):
    return json.loads((GOLDEN / f"{name}.{suffix}.json").read_text())


@pytest.fixture
def place(tmp_path):
    """place(content): a run record or a sweep.json with this content, as it is read."""

    def put(content, kind="run"):
        if kind == "run":
            (tmp_path / "x.run.json").write_text(content if isinstance(content, str) else json.dumps(content))
            return records.read(tmp_path / "x")
        (tmp_path / "sweep.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return records.read_sweep(tmp_path)

    return put


def as_json(page):
    """A page without its plots, whose numbers are those of the tables."""

    def part(found):
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "plot"}
        if "table" in fields:
            fields["table"] = part(fields["table"])
        if "marked" in fields:
            fields["marked"] = sorted(fields["marked"])
        return fields

    sections = [{"key": one.key, "title": one.title, "parts": [part(each) for each in one.parts]} for one in page.sections]
    return {"title": page.title, "kicker": page.kicker, "label": page.label, "sections": sections}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_1_gives_the_same_page_gate_notification_and_fields(place, name):
    record, expected = place(stored(name, "run")), stored(name, "expected")
    config = from_dict(record.config)
    found = {
        "page": as_json(runs.page(record)),
        "judged": judge(GATE, record.evaluation, record.assembly).model_dump(),
        "failures": record.gate and record.gate.failures,
        "events": notify.happened(record),
        "name": mlflow_fields.run_name(config, record.sweep and record.sweep.cell),
        "metrics": sorted(mlflow_fields.metrics(record)),
        "tags": mlflow_fields.tags(config, record),
        "notification": notify.notification(config, record),
    }
    expected["metrics"].sort()
    found["notification"]["checkpoint"] = os.path.basename(found["notification"]["checkpoint"])
    assert json.loads(json.dumps(found)) == {**found_without(found, expected), **expected}


def found_without(found, expected):
    """What version 1 could not make of a record that lacks its keys."""
    return json.loads(json.dumps({key: value for key, value in found.items() if key not in expected}))


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_of_version_1_gives_the_same_page_notification_and_fields(place, name):
    sweep, expected = place(stored(name, "sweep"), "sweep"), stored(name, "expected")
    found = {
        "page": as_json(sweeps.page(sweep)),
        "failure": results.failure(sweep),
        "notification": results.notification(sweep),
        "name": mlflow_fields.sweep_name(sweep.name),
        "tags": mlflow_fields.sweep_tags(sweep),
        "metrics": mlflow_fields.sweep_metrics(sweep),
    }
    for before, now in zip(expected["notification"]["cells"], found["notification"]["cells"], strict=True):
        assert before.items() <= now.items(), "a cell may have got keys, and none has changed"
    found["notification"]["cells"] = expected["notification"]["cells"]
    assert json.loads(json.dumps(found)) == {**found_without(found, expected), **expected}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_lost_when_a_run_of_version_1_is_written_again(place, name):
    old = stored(name, "run")
    new = json.loads(records.text_of(place(old)))
    assert new["schema_version"] == records.VERSION and place(new) == place(old)

    def contains(now, before, where=""):
        if isinstance(before, dict):
            for key, value in before.items():
                contains(now[key], value, f"{where}.{key}")
        elif isinstance(before, list):
            assert len(now) == len(before), where
            for index, value in enumerate(before):
                contains(now[index], value, f"{where}.{index}")
        else:
            assert now == before, where

    contains(new, old)


def test_unknown_keys_are_kept_and_later_versions_refused(place, tmp_path):
    old = stored("by_hand", "run")
    old["extra"], old["blocks"][0]["layers"][0]["more"] = {"a": 1}, 2
    new = json.loads(records.text_of(place(old)))
    assert new["extra"] == {"a": 1} and new["blocks"][0]["layers"][0]["more"] == 2
    with pytest.raises(
        InputError, match=rf"run record {tmp_path}/x.run.json: schema_version = 3: this code reads 1 and 2; .*mend it or rem"
    ):
        place(old | {"schema_version": 3})


def test_what_overflowed_is_read_and_written_as_it_is(place):
    old = stored("by_hand", "run")
    old["evaluation"] |= {"quantized_perplexity": float("inf"), "kl": float("nan")}
    assert '"quantized_perplexity": Infinity' in records.text_of(place(old)) and '"kl": NaN' in records.text_of(place(old))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"blocks": [{"block": 0, "seconds": 1, "layers": [{"name": 3}]}]}, r"blocks.0.layers.0.name: Input should be a valid string"),
        ({"assembly": None}, r"assembly: Input should be"),
        ({"config": None, "id": 4}, r"id: .*, and 1 more"),
    ],
)
def test_a_damaged_record_is_one_line_with_file_key_and_remedy(place, tmp_path, changes, said):
    with pytest.raises(InputError, match=rf"^run record {tmp_path}/x.run.json is damaged \({said}.*\): mend it or remove it$"):
        place(stored("by_hand", "run") | changes)


@pytest.mark.parametrize("text, said", [("{", "cannot be read"), ("[]", "must hold a JSON object"), ("{}", "is damaged")])
def test_what_is_no_record_is_refused(place, text, said):
    for kind, remedy in (("run", "mend it or remove it"), ("sweep", "the same sweep command writes it again")):
        with pytest.raises(InputError, match=f"{said}.*{remedy}"):
            place(text, kind)


def test_a_record_of_a_large_model_is_read_quickly(place):
    old = stored("real", "run")
    layers = [
        layer | {"name": f"model.layers.0.mlp.experts.{each}.up_proj"} for layer in old["blocks"][0]["layers"][:1] for each in range(64)
    ]
    old["blocks"] = [{"block": block, "resumed": False, "seconds": 1.0, "layers": layers} for block in range(200)]
    text = json.dumps(old)
    started = time.process_time()
    assert len(place(text).blocks) == 200
    assert time.process_time() - started < 5, "12,800 layers"
