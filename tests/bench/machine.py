"""The machine that a bench runs on, who else is at work there, and the two dated files that a bench leaves."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from side_by_side_tables import DISTURBED

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
"""Sets that a GEMM is fast or slow by, as /proc/cpuinfo names them."""


def machine() -> dict[str, Any]:
    known = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.+)$", known, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", known, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "processor": name[1] if name else platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instructions": [name for name in INSTRUCTIONS if name in present],
        "python": platform.python_version(),
    }


def graphics(device: torch.device) -> dict[str, Any]:
    """Name and memory of a GPU; empty for the CPU."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {"gpu": found.name, "gpu_memory_bytes": found.total_memory, "cuda": torch.version.cuda}


def busy_seconds() -> float:
    """CPU seconds that all processors have spent on anything since they started (proc(5), stat), waiting excluded."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Others:
    """Who else was at work since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = busy_seconds(), own_seconds(), time.perf_counter()

    @property
    def cores(self) -> float:
        return max(0.0, busy_seconds() - self._busy - (own_seconds() - self._own)) / (time.perf_counter() - self._started)


def begun(setting: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The head of a bench's results: when, where, with what."""
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "machine": machine() | graphics(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "setting": setting | {"threads": torch.get_num_threads(), "device": device.type},
    }


def head(results: dict[str, Any], title: str) -> str:
    """The first lines of a bench's .md."""
    found, setting = results["machine"], results["setting"]
    where = f"{found['processor']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB"
    where += f"; {' '.join(found['instructions']) or found['architecture']}"
    if "gpu" in found:
        where += f"; {found['gpu']}, {found['gpu_memory_bytes'] / 2**30:.0f} GiB, CUDA {found['cuda']}"
    busy = f"Others used {results['others']:.1f} cores meanwhile"
    busy += ": the seconds also measure them." if results["others"] >= DISTURBED else "."
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"# {title}\n\n{results['date']}. {told}.\n\n{where}. {busy}\n\n{versions}."


def write(out: Path, name: str, results: dict[str, Any], text: str) -> None:
    """<date>-<name>.json with all of it and .md to read."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{results['date'].replace(':', '')}-{name}"
    (out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text.rstrip() + "\n")
