"""What the adapters of this folder share: their arguments, the measuring of a step, and the line that they print.

An adapter quantizes one model with one library in a process of its own and prints one line of JSON, its last:
{"versions": {...}, "threads": 1, "load": STEP, "quantize": STEP, "save": STEP}, where STEP is
{"seconds", "cpu_seconds", "start_bytes", "peak_bytes"}: wall and CPU seconds, the resident set before and its peak.
It runs in the environment of that library, so nothing of this project is imported here. Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DAMPING = 0.01
"""Of every peer that has one, so that they solve the same problem."""
BATCH = 8
"""Calibration windows of one forward, where a peer can be told."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def arguments(**own: Any) -> argparse.Namespace:
    """The arguments of every adapter, with the tokens (windows, seqlen) int64 read from their file. own: further options, with what
    argparse takes for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", help=".safetensors with 'tokens' (windows, seqlen)")
    parser.add_argument("out", help="a folder for the checkpoint, that does not exist")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    for name, options in own.items():
        parser.add_argument("--" + name.replace("_", "-"), **options)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.tokens = load_file(args.tokens)["tokens"]
    return args


def torch_dtype(name: str) -> torch.dtype | str:
    """For from_pretrained: a dtype, or 'auto', the checkpoint's own."""
    return name if name == "auto" else getattr(torch, name)


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM the highest."""
    return int(re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)[1]) * 1024


class Steps:
    """Time and memory of the steps of one process, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Wall and CPU seconds of all threads, and the highest resident set from here on, what is there already included."""
        _CLEAR.write_text("5")  # proc(5): resets VmHWM
        start, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        yield
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        self.found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "start_bytes": start, "peak_bytes": resident("VmHWM")}

    def answer(self, *packages: str, **more: Any) -> None:
        """Print the line and end: threads that a peer leaves behind would hold up the exit."""
        versions = {name: version(name) for name in ("torch", "transformers", *packages)}
        print("\n" + json.dumps({"versions": versions, "threads": torch.get_num_threads(), **self.found, **more}), flush=True)
        sys.stderr.flush()
        os._exit(0)
