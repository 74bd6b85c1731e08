"""How many cells run at a time and with what, and what they are given in common."""

import json
from types import SimpleNamespace

import pytest

import tasks.cells as at
from tasks.record import beside
from tasks.sweep import SweepConfig

GB = 10**9


@pytest.fixture
def base(tiny_llama, corpus):
    return {"model": {"path": str(tiny_llama), "device": "cpu"}, "quantization": {"dataset": str(corpus), "group_size": 32},
            "calibration": {"samples": 4, "seqlen": 32}, "evaluation": {"samples": 4, "seqlen": 32}}  # fmt: skip


@pytest.fixture
def sweep(base, tmp_path):
    return lambda **keys: SweepConfig(**{"base": base, "grid": {"bits": [2, 3, 4, 8]}, "dir": str(tmp_path / "s")} | keys)


@pytest.fixture
def machine(monkeypatch):
    """Eight cores, and cells of 3 GB each on a device with the given free memory."""

    def having(free):
        monkeypatch.setattr(at, "cores", lambda: 8)
        monkeypatch.setattr(at, "_free", lambda devices: free * GB)
        monkeypatch.setattr(at, "foresee", lambda config: SimpleNamespace(estimate=SimpleNamespace(host_bytes=3 * GB, device_bytes=3 * GB)))

    return having


def placed(config):
    found = at.places(config, at.examine(config))
    return len(found.devices), found.slots, found.at_once, found.threads


@pytest.mark.parametrize(("free", "keys", "expected"), [
    (100, {}, (1, 4, 4, 2)),  # a core or more for each of the four cells
    (7, {}, (1, 2, 2, 4)),  # two fit in memory
    (1, {}, (1, 1, 1, 8)),  # none fits: one is tried, the run's own check has the last word
    (100, {"max_parallel": 3}, (1, 3, 3, 2)),
    (100, {"threads": 5}, (1, 4, 4, 5)),
    (7, {"devices": ["0", "1", "2"]}, (3, 2, 4, 2)),  # two fit on each of three GPUs, and there are four cells
    (7, {"devices": ["0", "1", "2"], "max_parallel": 2}, (2, 1, 2, 4)),
])  # fmt: skip
def test_as_many_at_a_time_as_devices_cores_memory_and_the_config_allow(sweep, machine, free, keys, expected):
    machine(free)
    assert placed(sweep(**keys)) == expected


def test_jobs_carry_the_limits_and_what_was_done_once(sweep):
    config = sweep(limits={"memory_gb": 2.5})
    missing = at.examine(config)
    [(key, job)] = at.original_jobs(config, missing, 1)[0].items()
    found = at.jobs(config, missing, 7, {key: job["file"]})
    assert [job["config"]["quantization"]["bits"] for job in found.values()] == [2, 3, 4, 8]
    for name, each in found.items():
        assert (each["threads"], each["memory_gb"], each["original"]) == (7, 2.5, job["file"])
        assert each["data"]["calibration"]["file"].startswith(str(beside(config.folder / name, ".work")))
        assert any(str(config.expanded()[0].config.model.path) in stamp for stamp in each["known_sha256"])


def test_cells_of_another_text_or_model_share_no_original(sweep, base):
    config = sweep(grid={"bits": [3, 4], "evaluation.samples": [2, 4]})
    assert len(at.original_jobs(config, at.examine(config), 1)[0]) == 2


def test_an_original_is_stored_for_several_cells_and_only_below_the_limit(sweep, monkeypatch):
    config = sweep()
    missing = at.examine(config)
    assert at.original_jobs(config, missing[:1], 1) == ({}, {})
    assert len(at.original_jobs(config, missing, 1)[0]) == 1
    monkeypatch.setattr(at, "STORED_ORIGINAL", 1000)
    assert at.original_jobs(config, missing, 1) == ({}, {})


def test_a_gate_judges_screened_cells_too(sweep, base):
    config = sweep(base=base | {"gate": {"max_kl": 0.1}}, mode="screening")
    figures = {"mode": "screening", "original_perplexity": 10.0, "quantized_perplexity": 11.0, "top1_agreement": 0.9, "bytes": 100,
               "bits_per_weight": 4.1, "seconds": 1.0, "set_aside": (), "fallback_layers": ["a"], "error": None}  # fmt: skip
    cells = config.expanded()[:2]
    states = [at.State(cell, "done", record=figures | {"kl": kl}) for cell, kl in zip(cells, (0.2, 0.05), strict=True)]
    found = at.result(config, states, [], 0.0)
    assert [row["gate"] for row in found["cells"]] == ["failed", "passed"] and found["cells"][0]["fallback_layers"] == 1
    assert found["recommended"]["name"] == cells[1].name and "gate" in found["recommended"]["rule"]


def test_allocate_is_for_exact_cells(sweep, base):
    base = json.loads(json.dumps(base)) | {"quantization": base["quantization"] | {"allocate": {"bits": [2, 4], "budget_bpw": 3}}}
    [state] = at.examine(sweep(base=base, grid={"bits": [4]}, mode="screening"))
    assert state.status == "invalid" and "mode: exact" in state.error
