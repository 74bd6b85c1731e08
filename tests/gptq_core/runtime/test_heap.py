"""Keeping the heap's free pages and giving them back, in a process of its own: other tests leave holes too."""

import ctypes
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from tiny import save_model

from gptq_core import Quantization, QuantizeConfig, Windows
from gptq_core.block.stream import BlockStream
from gptq_core.errors import InputError
from gptq_core.runtime import heap

TOOLS = """
import ctypes
from pathlib import Path
from gptq_core.runtime import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

take, give = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
take.restype, give.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
"""
HOLES = """
parts = [take(64 << 10) for _ in range(1024)]  # below what is mapped alone
for part in parts:
    ctypes.memset(part, 1, 64 << 10)
for part in parts[::2]:
    give(part)
before = resident()
heap.give_back()
print(before - resident())
"""
TURNS = """
def turn():
    before = resident()
    parts = [take(4 << 20) for _ in range(24)]
    for part in parts:
        ctypes.memset(part, 1, 4 << 20)
    for part in parts[::-1]:
        give(part)
    return resident() - before

print(turn())
heap.keep()
print(turn())
before = resident()
heap.let_go()
print(before - resident())
print(turn())
"""
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")


def numbers(program):
    done = subprocess.run([sys.executable, "-c", TOOLS + program], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@glibc
def test_holes_between_what_stays_go_back():
    assert numbers(HOLES)[0] > 16 << 20  # of 32


@glibc
def test_free_pages_are_kept_and_let_go():
    before, kept, back, after = numbers(TURNS)
    assert kept > 90 << 20 and back > 90 << 20  # of 96
    assert max(before, after) < 70 << 20, "what glibc itself keeps is 64 MB at most"


def test_a_c_library_of_another_kind_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _name: Mock(spec=["mallopt"], **{"mallopt.side_effect": AssertionError}))
    heap.keep()
    heap.let_go()


def test_a_run_on_the_cpu_keeps_them_until_it_is_closed(tmp_path, monkeypatch):
    model, told = save_model("llama", tmp_path / "model"), []
    for name in ("keep", "let_go"):
        monkeypatch.setattr(heap, name, lambda name=name: told.append(name))
    windows = Windows(torch.zeros(1, 8, dtype=torch.long), "zeros", 1)
    with BlockStream.open(str(model), dtype="auto", device="cpu"):
        assert told == ["keep"]
    assert told == ["keep", "let_go"]
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match="is a file"):
        Quantization.open(str(model), QuantizeConfig(bits=4, group_size=32), windows, tmp_path / "taken", device="cpu")
    assert told == ["keep", "let_go"] * 2, "nobody has it to close it"
