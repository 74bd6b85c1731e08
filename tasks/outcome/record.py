"""The run record, `<out>.run.json`: all of a run that may differ between two equal runs, beside the checkpoint and never in it.

It is written before MLflow is asked for anything, so a tracking server that is away costs nothing but its copy.
"""

from __future__ import annotations

import calendar
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.format import code_version
from gptq_core.checkpoint.writer import MANIFEST, replace_file
from gptq_core.errors import InputError
from tasks.config.run import RunConfig

PROC = Path("/proc/self")
CHECKOUT = Path(__file__).resolve().parents[2]


def beside(out: str | Path, suffix: str) -> Path:
    """A path next to the checkpoint folder `out`: its name and `suffix`."""
    out = Path(out)
    if out.name in ("", ".."):
        out = Path(os.path.abspath(out))
        if not out.name:
            raise InputError(f"{out} is the root of the file system: name a folder of its own")
    return out.with_name(out.name + suffix)


def record_path(out: str | Path) -> Path:
    return beside(out, ".run.json")


def read(out: str | Path) -> dict[str, Any] | None:
    """The record of the checkpoint `out`; None where there is none."""
    path = record_path(out)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"run record {path} cannot be read ({error}): mend it or remove it") from error
    if not isinstance(record, dict):
        raise InputError(f"run record {path} must hold a JSON object: mend it or remove it")
    return record


def write(out: str | Path, record: dict[str, Any]) -> Path:
    """Replace the record of `out` at once: a reader sees the old one or the new one."""
    path = record_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def new(config: RunConfig, key: str) -> dict[str, Any]:
    """A record at the start of a run. Its id is what MLflow's run is found by."""
    return {
        "id": f"{key[:12]}-{uuid.uuid4().hex[:12]}",
        "key": key,
        "config": config.model_dump(mode="json"),
        "out": str(config.out),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "finished_ms": None,
        "seconds": None,
        "stage_seconds": {},
        "peak_memory_bytes": None,
        "machine": machine(),
        "source": source(),
        "system": None,
        "model_digest": None,
        "device": None,
        "kernels": None,
        "calibration_data": None,
        "evaluation_data": None,
        "allocation": None,
        "assembly": None,
        "evaluation": None,
        "evaluation_error": None,
        "blocks": [],
        "prefect_flow_run_id": None,
        "prefect_flow_run_url": None,
        "sweep": None,
        "mlflow": None,
        "gate": None,
        "registry": None,
        "notified": None,
    }


def allocated(record: dict[str, Any]) -> str | None:
    """What the chosen widths come to, in one line; None where none were chosen."""
    found = record.get("allocation")
    if not found:
        return None
    shares = ", ".join(f"{bits}: {share:.0%}" for bits, share in found["shares"].items())
    return f"{found['bits_per_weight']:.2f} bits ({shares}), predicted KL {found['predicted_kl']:.4g}"


def machine() -> dict[str, Any]:
    """What the numbers of seconds and bytes were measured on."""
    import torch

    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@lru_cache(maxsize=1)
def source() -> dict[str, str | None]:
    """Version of the code, and the revision of the checkout that it runs from, with -dirty where files differ; None without one."""
    return {"version": code_version(), "git": _revision(CHECKOUT)}


def _revision(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():  # git would look in the folders above
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user, which it does not read
        return None


def of_manifest(out: str | Path) -> dict[str, Any]:
    """What a run's record takes from its checkpoint's manifest: {"model_digest", "device": its type, "kernels": who ran its loops}."""
    with (Path(out) / MANIFEST).open(encoding="utf-8") as lines:
        run = json.loads(lines.readline())
    return {"model_digest": run["model_sha256"], "device": run["versions"]["device"], "kernels": run["versions"].get("kernels")}


def milliseconds(moment: str) -> int:
    """Since 1970, of a moment as records write it."""
    return 1000 * calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))


def peak_memory() -> dict[str, int]:
    """Highest resident set of this process, and highest allocation on its GPU, in bytes; since forget_peak_memory or the start."""
    import torch

    peak = {"host": _peak_resident()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def forget_peak_memory() -> None:
    """Begin anew, for a process that does one job after another. Where there is no /proc, the peak stays that of the process."""
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


def short_name(layer: str) -> str:
    """`model.layers.7.mlp.up_proj` as `mlp.up_proj`: the name of a layer within its block."""
    return re.sub(r"^.*?\.\d+\.", "", layer)
