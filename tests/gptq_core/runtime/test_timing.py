"""The clock of the stages: each stage its own time, whatever runs inside it."""

import pytest
import torch
from tiny import save_model, windows

from gptq_core import Quantization, QuantizeConfig
from gptq_core.runtime import timing
from gptq_core.runtime.timing import Stages


@pytest.fixture
def clock(monkeypatch):
    """A hand that the test moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_an_inner_stage_stops_the_outer_clock(clock):
    timed = Stages(torch.device("cpu"))
    with timed("forward"):
        clock[0] += 1
        with timed("hessian"):
            clock[0] += 10
            with timed("forward"):
                clock[0] += 100
        clock[0] += 1000
    clock[0] += 10000  # in no stage
    with timed("pack"):
        clock[0] += 5
    timed.add("pack", 7.0)
    assert timed.seconds == {"forward": 1101.0, "hessian": 10.0, "pack": 12.0}


def test_a_stage_that_fails_is_left(clock):
    timed = Stages(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), timed("sweep"):
        clock[0] += 2
        raise ZeroDivisionError
    clock[0] += 50
    with timed("write"):
        clock[0] += 3
    assert timed.seconds == {"sweep": 2.0, "write": 3.0}


def test_a_run_tells_its_stages_apart(tmp_path):
    with Quantization.open(
        str(save_model("llama", tmp_path / "model")), QuantizeConfig(bits=4, group_size=32), windows(), tmp_path / "out", device="cpu"
    ) as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()
        seconds = run.stage_seconds
    timing = {"read", "forward", "hessian", "factor", "scales", "sweep", "descent", "pack", "write"}
    assert set(seconds) == timing and all(seconds[stage] > 0 for stage in timing)
