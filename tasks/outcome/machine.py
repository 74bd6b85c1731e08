"""The machine and the code of a run, and the memory that its process took."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from gptq_core.checkpoint.format import code_version
from tasks.outcome.parts import Machine, Source

PROC = Path("/proc/self")
CHECKOUT = Path(__file__).resolve().parents[2]


def machine() -> Machine:
    """This machine, its Python, torch and GPU."""
    import torch

    return Machine(
        host=platform.node(),
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


@lru_cache(maxsize=1)
def source() -> Source:
    """Version of the code, and revision of the checkout that it runs from."""
    return Source(version=code_version(), git=_revision(CHECKOUT))


def _revision(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():  # git would look in the folders above
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user, which it does not read
        return None


def peak_memory() -> dict[str, int]:
    """Highest resident set of this process (host) and highest allocation on its GPU (gpu), in bytes, since the last reset."""
    import torch

    peak = {"host": _peak_resident()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def reset_peak_memory() -> None:
    """Reset the peaks, for a process that does one job after another. Without /proc the host's peak stays that of the process."""
    import torch

    if PROC.is_dir():
        (PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_resident() -> int:
    if PROC.is_dir():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
