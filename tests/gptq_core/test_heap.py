"""Giving the heap's free pages back, in a process of its own: other tests leave holes too."""

import ctypes
import subprocess
import sys

import pytest

HOLES = """
import ctypes
from pathlib import Path
from gptq_core import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

take, give = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
take.restype, give.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
parts = [take(64 << 10) for _ in range(1024)]  # below what is mapped alone
for part in parts:
    ctypes.memset(part, 1, 64 << 10)
for part in parts[::2]:
    give(part)
before = resident()
heap.give_back()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_holes_between_what_stays_go_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 16 << 20  # of 32


def test_a_c_library_without_it_is_left_alone(monkeypatch):
    from gptq_core import heap

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _name: object())
    heap.give_back()
