"""How many cells run at a time and with what, and what they are given in common."""

import json
import os
from types import SimpleNamespace

import pytest
from report_records import run

import tasks.request.request
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.errors import OutputHeldError
from tasks.config.sweep import SweepConfig
from tasks.outcome import record as records
from tasks.outcome.job import Outcome
from tasks.outcome.parts import HookCall, MlflowLink, Registration, Screened
from tasks.outcome.record import RunRecord, beside
from tasks.request.handing import handed_on
from tasks.request.request import Request, Requests
from tasks.sweep import cells, jobs, results

GB = 10**9


@pytest.fixture
def base(tiny_llama, corpus):
    return {
        "model": {"path": str(tiny_llama), "device": "cpu"},
        "quantization": {"dataset": str(corpus), "group_size": 32},
        "calibration": {"samples": 4, "seqlen": 32},
        "evaluation": {"samples": 4, "seqlen": 32},
    }


@pytest.fixture
def sweep(base, tmp_path):
    return lambda **keys: SweepConfig(**{"base": base, "grid": {"bits": [2, 3, 4, 8]}, "dir": str(tmp_path / "s")} | keys)


@pytest.fixture
def machine(monkeypatch):
    """Eight cores, and cells of 3 GB each on a device with the given free memory."""

    def having(free):
        monkeypatch.setattr(jobs, "cores", lambda: 8)
        monkeypatch.setattr(jobs, "_free", lambda devices: free * GB)
        monkeypatch.setattr(cells, "fits", lambda config, found: ())
        monkeypatch.setattr(Request, "foreseen", SimpleNamespace(estimate=SimpleNamespace(host_bytes=3 * GB, device_bytes=3 * GB)))

    return having


def done(cell, **found):
    """found: its record, or what screening found."""
    return cells.State(cell, "done", opened=Requests().of(cell.config), **found)


def placed(config):
    found = jobs.places(config, cells.examine(config))
    return len(found.devices), found.slots, found.at_once, found.threads


@pytest.mark.parametrize(
    ("free", "keys", "expected"),
    [
        (100, {}, (1, 4, 4, 2)),  # a core or more for each of the four cells
        (7, {}, (1, 2, 2, 4)),  # two fit in memory
        (1, {}, (1, 1, 1, 8)),  # none fits: one is tried, its own plan has had the last word
        (100, {"max_parallel": 3}, (1, 3, 3, 2)),
        (100, {"threads": 5}, (1, 4, 4, 5)),
        (7, {"devices": ["0", "1", "2"]}, (3, 2, 4, 2)),  # two fit on each of three GPUs, and there are four cells
        (7, {"devices": ["0", "1", "2"], "max_parallel": 2}, (2, 1, 2, 4)),
    ],
)
def test_as_many_at_a_time_as_devices_cores_memory_and_the_config_allow(sweep, machine, free, keys, expected):
    machine(free)
    assert placed(sweep(**keys)) == expected


def test_jobs_carry_the_limits_and_what_was_done_once(sweep):
    config = sweep(limits={"memory_gb": 2.5})
    missing = cells.examine(config)
    [(key, job)] = jobs.original_jobs(config, missing, 1)[0].items()
    found = jobs.jobs(config, missing, 7, {key: job.file})
    assert [job.config.quantization.bits for job in found.values()] == [2, 3, 4, 8]
    for name, each in found.items():
        assert (each.threads, each.memory_gb, each.original) == (7, 2.5, job.file)
        assert each.texts.calibration.file.startswith(str(beside(config.folder / name, ".work")))
        assert any(str(config.expanded()[0].config.model.path) in stamp for stamp in each.known_sha256)


def test_cells_share_the_model_and_the_texts(sweep, monkeypatch):
    opened, read = [], []
    right, texts = Checkpoint.__init__, tasks.request.request.read_texts
    monkeypatch.setattr(Checkpoint, "__init__", lambda self, folder: opened.append(folder) or right(self, folder))
    monkeypatch.setattr(tasks.request.request, "read_texts", lambda *args: read.append(args) or texts(*args))
    config = sweep()
    with handed_on(Requests()):
        for _ in range(2):  # the command line looks, and then the flow
            missing = cells.examine(config)
        jobs.places(config, missing)
        jobs.original_jobs(config, missing, 1)
        jobs.jobs(config, missing, 1, {})
        for state in missing:
            assert cells.after(state, Outcome(status="failed", error="died")).status == "failed"
    assert len(missing) == 4 and len(opened) == 1 and len(read) == 1


def test_cells_of_another_text_or_model_share_no_original(sweep, base):
    config = sweep(grid={"bits": [3, 4], "evaluation.samples": [2, 4]})
    assert len(jobs.original_jobs(config, cells.examine(config), 1)[0]) == 2


def test_an_original_is_stored_for_several_cells_and_only_below_the_limit(sweep, monkeypatch):
    config = sweep()
    missing = cells.examine(config)
    assert jobs.original_jobs(config, missing[:1], 1) == ({}, {})
    assert len(jobs.original_jobs(config, missing, 1)[0]) == 1
    monkeypatch.setattr(jobs, "STORED_ORIGINAL", 1000)
    assert jobs.original_jobs(config, missing, 1) == ({}, {})


def test_a_gate_judges_screened_cells_too(sweep, base):
    config = sweep(base=base | {"gate": {"max_kl": 0.1}}, mode="screening")
    figures = {
        "original_perplexity": 10.0,
        "quantized_perplexity": 11.0,
        "top1_agreement": 0.9,
        "bytes": 100,
        "bits_per_weight": 4.1,
        "seconds": 1.0,
        "set_aside": (),
        "fallback_layers": ["a"],
        "error": None,
    }
    two = config.expanded()[:2]
    states = [done(cell, screened=Screened(**figures, kl=kl)) for cell, kl in zip(two, (0.2, 0.05), strict=True)]
    found = results.result(config, states, [], 0.0)
    assert [cell.gate for cell in found.cells] == ["failed", "passed"] and found.cells[0].fallback_layers == 1
    assert found.recommended.name == two[1].name and "gate" in found.recommended.rule


@pytest.mark.parametrize(
    ("choose", "chosen"),
    [
        ({"max_perplexity_increase": 0.05}, 1),
        ({"max_perplexity_increase": 0.5}, 0),
        ({"rule": "best_within_size", "max_gb": 1}, 2),
        ({"rule": "best_within_size", "max_gb": 1, "measure": "perplexity"}, 3),
        ({"rule": "best_within_size", "max_gb": 25e-9, "measure": "perplexity"}, 1),
    ],
)
def test_every_key_of_choose_decides(sweep, choose, chosen):
    config = sweep(choose=choose)
    #        perplexity, KL, bytes
    figures = [(14.0, 0.4, 10), (10.4, 0.3, 20), (10.3, 0.1, 30), (10.2, 0.2, 40)]
    states = []
    for cell, (perplexity, kl, size) in zip(config.expanded(), figures, strict=True):
        record = RunRecord.model_validate(run())
        numbers = {"original_perplexity": 10.0, "quantized_perplexity": perplexity, "kl": kl}
        record.evaluation = record.evaluation.model_copy(update=numbers)
        record.assembly = record.assembly.model_copy(update={"bytes": size})
        states.append(done(cell, record=record))
    assert results.result(config, states, [], 0.0).recommended.name == states[chosen].cell.name


def test_a_damaged_cell_is_told_and_stops_no_other(sweep):
    config = sweep()
    folder = config.folder / "bits=3"
    folder.mkdir(parents=True)
    (folder / "manifest.jsonl").write_text("garbage\n")
    found = {state.cell.name: state for state in cells.examine(config)}
    assert found["bits=3"].status != "done" and found["bits=3"].error
    assert [found[f"bits={bits}"].status for bits in (2, 4, 8)] == ["missing"] * 3


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("cell", MlflowLink(error="away")),
        ("cell", None),
        ("notified", {"command": HookCall(told="x", error="code 3")}),
        ("registry", Registration(error="away")),
        ("mlflow", MlflowLink(error="away")),
    ],
)
def test_what_is_not_known_everywhere_is_not_finished(sweep, part, broken):
    config, logged = sweep(grid={"bits": [3]}), MlflowLink(run_id="r")
    state = done(config.expanded()[0], record=RunRecord.model_validate(run(mlflow=logged)))
    found = results.result(config, [state], [], 0.0)
    found.mlflow = logged
    records.write_sweep(config.folder, found)
    assert results.finished(config, [state])
    if part == "cell":
        state.record.mlflow = broken
    else:
        setattr(found, part, broken)
        records.write_sweep(config.folder, found)
    assert results.finished(config, [state]) is None


def test_allocate_is_for_exact_cells(sweep, base):
    base = json.loads(json.dumps(base)) | {"quantization": base["quantization"] | {"allocate": {"bits": [2, 4], "budget_bpw": 3}}}
    [state] = cells.examine(sweep(base=base, grid={"bits": [4]}, mode="screening"))
    assert state.status == "invalid" and "mode: exact" in state.error


def test_a_cell_that_does_not_fit_is_invalid_before_it_starts(sweep, monkeypatch):
    monkeypatch.setattr("tasks.request.capacity.available_memory", lambda: 1000)
    assert {state.status for state in cells.examine(sweep())} == {"invalid"}


def test_two_sweeps_do_not_share_a_folder(sweep):
    with cells.alone(sweep()), pytest.raises(OutputHeldError, match=f"held by process {os.getpid()}"), cells.alone(sweep()):
        pass
    with cells.alone(sweep()):
        pass
