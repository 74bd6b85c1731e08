"""Which tensors the kernels are given, and what is logged where there are none."""

import re
import sys
import types

import pytest
import torch

from gptq_core import kernels
from gptq_core.kernels import c_loops, constants, descent, dispatch


@pytest.fixture
def everywhere(monkeypatch):
    """As if Triton ran on every device, be it installed or not: a module that stands for its kernels."""
    fused = types.ModuleType("gptq_core.kernels.triton_loops")
    for name in ("NAME", "round_columns", "descend_columns", "search"):
        setattr(fused, name, getattr(c_loops, name))
    monkeypatch.setattr(dispatch, "runs_on", lambda device: True)
    monkeypatch.setitem(sys.modules, fused.__name__, fused)
    monkeypatch.setattr(kernels, "triton_loops", fused, raising=False)
    return fused


def test_float32_is_taken(everywhere):
    rows = torch.zeros(8, 12)
    assert dispatch.kernels(rows, torch.zeros(8, dtype=torch.uint8), torch.arange(8)) is everywhere
    assert not dispatch.kernels(rows, rows.double())
    assert not dispatch.kernels(rows, rows.bfloat16())


def test_the_cpu_keeps_the_twin_where_nothing_can_be_compiled(monkeypatch):
    monkeypatch.setattr(dispatch, "compiles", lambda: False)
    assert dispatch.kernels(torch.zeros(8, 12)) is None
    assert dispatch.implementation(torch.device("cpu"), torch.float32) == "torch"


def test_a_block_longer_than_registers_hold_descends_in_the_twin(everywhere):
    """On CPU tensors the kernel would fail outside of the interpreter, and inside be slow: the twin is quick and right."""
    block = constants.LARGEST_BLOCK + 1
    codes, slope = torch.zeros(block, 4, dtype=torch.uint8), torch.randn(block, 4, generator=torch.Generator().manual_seed(0))
    expected = codes.double(), slope.double()
    change = descent.descend_columns(codes, slope, torch.ones(4), torch.zeros(4), 15, torch.eye(block))
    assert torch.equal(change.double(), (expected[0] - expected[1]).round().clamp(0, 15))


@pytest.mark.parametrize(
    ("missing", "logged"),
    [("triton", "pip install triton"), ("compiler", r"does not start \(no gcc\): it wants a C compiler"), ("gpu", "this one has 6.1")],
)
def test_a_gpu_without_triton_is_logged_once(missing, logged, monkeypatch, caplog):
    class Driver(types.SimpleNamespace):
        @property
        def active(self):
            raise RuntimeError("no gcc")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1) if missing == "gpu" else (9, 0))
    monkeypatch.setitem(sys.modules, "triton.runtime", None if missing == "triton" else types.SimpleNamespace(driver=Driver()))
    dispatch.runs_on.cache_clear()
    for _ in range(2):
        assert not dispatch.runs_on(torch.device("cuda", 0))
    assert len(caplog.messages) == 1 and re.search(logged, caplog.text)
    dispatch.runs_on.cache_clear()


@pytest.mark.parametrize(
    ("missing", "logged"),
    [("compiler", "no cc, gcc or clang on the PATH"), ("flag", "false ended with 1"), ("cache", "[Nn]ot a directory|[Ff]ile exists")],
)
def test_a_cpu_without_compiled_loops_is_logged_once(missing, logged, monkeypatch, caplog, fresh):
    if missing == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(fresh))
    elif missing == "flag":
        monkeypatch.setenv("CC", "false")
    else:
        (fresh / "gptq_core").write_text("in the way")
    for _ in range(2):
        assert dispatch.kernels(torch.zeros(8, 12)) is None
    assert len(caplog.messages) == 1 and re.search(logged, caplog.text)
    # and the work is done all the same
    assert torch.equal(
        descent.descend_columns(torch.zeros(1, 4, dtype=torch.uint8), -torch.ones(1, 4), torch.ones(4), torch.zeros(4), 15, torch.eye(1)),
        torch.ones(1, 4),
    )


def test_products_of_bfloat16_are_named_where_forwards_are_in_it(monkeypatch):
    monkeypatch.setattr(dispatch, "compiles", lambda: True)
    for known in (True, False):
        monkeypatch.setattr(dispatch, "compiles_products", lambda known=known: known)
        named = [dispatch.implementation(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
        assert named == ["c", "c with bfloat16 products" if known else "c"]
