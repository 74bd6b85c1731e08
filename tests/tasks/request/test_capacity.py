"""A run that does not fit is refused before it starts; one that may not fit is told."""

import shutil
from collections import namedtuple

import pytest

from gptq_core.errors import InputError
from tasks.config.run import from_dict
from tasks.request import capacity
from tasks.request.request import Requests

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tiny_llama, corpus, tmp_path):
    return from_dict(
        {
            "model": {"path": str(tiny_llama), "device": "cpu"},
            "quantization": {"bits": 4, "group_size": 32, "dataset": str(corpus)},
            "calibration": {"samples": 32, "seqlen": 64},
            "output": {"dir": str(tmp_path / "deep" / "out")},
        }
    )


def foreseen(config):
    return Requests().of(config).foreseen


def needed(config):
    costs = foreseen(config).estimate
    return costs.host_bytes - costs.mapped_bytes - capacity._resident()


def test_memory_that_is_too_small_is_refused_with_a_remedy(config, monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 1_000_000)
    with pytest.raises(InputError, match=r"memory: .* are needed, 0.00 GB are free \(must fit\): .*calibration.samples"):
        Requests().of(config).check()
    assert not config.out.parent.exists()


def test_within_the_error_of_the_estimate_it_is_a_note(config, monkeypatch):
    need = needed(config)
    monkeypatch.setattr(capacity, "available_memory", lambda: int(need / 1.1))
    [note] = capacity.fits(config, foreseen(config))
    assert note.startswith("memory: ") and "good to a fifth" in note
    monkeypatch.setattr(capacity, "available_memory", lambda: int(need * 1.2))
    assert capacity.fits(config, foreseen(config)) == ()
    monkeypatch.setattr(capacity, "available_memory", lambda: None)
    assert capacity.fits(config, foreseen(config)) == ()


def test_a_full_disk_is_refused(config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 1000))
    with pytest.raises(InputError, match="disk: .* choose an output.dir on another disk"):
        capacity.fits(config, foreseen(config))


def test_no_more_windows_are_foreseen_than_the_text_can_hold(config):
    many = config.model_copy(update={"calibration": config.calibration.model_copy(update={"samples": 10**9})})
    assert foreseen(many).estimate.host_bytes < 2 * foreseen(config).estimate.host_bytes + 2**30


def test_the_memory_of_this_machine_is_known():
    assert capacity.available_memory() > 0 and capacity._resident() > 50_000_000
