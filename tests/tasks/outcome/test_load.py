import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from tasks.outcome import load as system
from tasks.outcome.load import Sampler, sample


def test_a_run_is_sampled_by_mlflows_names():
    with Sampler(seconds=0.01) as sampler:
        time.sleep(0.1)
        found = sampler.record()
    assert set(found.metrics) >= {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}
    assert len(found.times_ms) > 1 and found.times_ms == sorted(found.times_ms)
    assert all(len(values) == len(found.times_ms) for values in found.metrics.values())
    assert all(0 < value <= 100 for value in found.metrics["system_memory_usage_percentage"])
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    theirs = CPUMonitor()
    theirs.collect_metrics()
    assert set(theirs.metrics) <= set(found.metrics)


def test_a_short_run_has_a_sample_and_the_thread_ends():
    with Sampler() as sampler:
        assert len(sampler.record().times_ms) == 1
    assert not sampler._thread.is_alive()


def test_a_long_run_is_told_more_coarsely(monkeypatch):
    values = iter(range(1000))
    monkeypatch.setattr(system, "sample", lambda: {"cpu_utilization_percentage": float(next(values))})
    sampler = Sampler(seconds=1.0, limit=4)
    for _ in range(4):
        sampler._sample()
    found = sampler.record()  # the fifth
    assert found.metrics == {"cpu_utilization_percentage": [0.5, 2.5, 4.0]} and found.interval_seconds == 2.0
    for _ in range(100):
        sampler._sample()
    found = sampler.record()
    assert len(found.times_ms) <= 4 and found.interval_seconds >= 32


def test_a_system_that_does_not_tell_costs_only_the_samples(monkeypatch):
    def fails():
        raise psutil.AccessDenied()

    monkeypatch.setattr(system, "sample", fails)
    with Sampler(seconds=0.001) as sampler:
        time.sleep(0.02)
    assert sampler.record() is None


def test_without_room_for_a_thread_the_end_is_sampled(monkeypatch):
    def fails(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fails)
    with Sampler() as sampler:
        pass
    assert len(sampler.record().times_ms) == 1


@pytest.mark.parametrize("load, told", [(lambda index: 70, {"gpu_1_utilization_percentage": 70.0}), (None, {})])
def test_of_gpus_only_those_that_are_used_are_told(monkeypatch, load, told):
    def absent(index):
        raise ModuleNotFoundError("pynvml")

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_reserved=lambda index: index,
        utilization=load or absent,
        mem_get_info=lambda index: (25_000_000, 100_000_000),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    found = {key: value for key, value in sample().items() if key.startswith("gpu_")}
    assert found == {"gpu_1_memory_usage_megabytes": 75.0, "gpu_1_memory_usage_percentage": 75.0, **told}
