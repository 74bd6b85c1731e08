"""prepare_dataset: the texts of a run as token windows in files that are named by their content."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.data.overlap import NGRAM
from gptq_core.data.windows import Windows
from tasks.config.run import RunConfig
from tasks.outcome.record import beside
from tasks.request.texts import Prepared, prepare


@task(name="prepare_dataset", cache_policy=NO_CACHE)
def prepare_dataset(config: RunConfig) -> dict[str, Any]:
    """{"calibration": record, "evaluation": record, "overlap": as in the run record, "notes": [...], "seconds": s}; a record tells file,
    digest, source and sizes."""
    started = time.perf_counter()
    prepared = prepare(config)
    folder = beside(config.out, ".work")
    return {
        "calibration": save(prepared.calibration, folder, "calibration"),
        "evaluation": save(prepared.evaluation, folder, "evaluation"),
        "overlap": overlap_record(prepared),
        "notes": list(prepared.notes),
        "seconds": time.perf_counter() - started,
    }


def overlap_record(prepared: Prepared) -> dict[str, Any]:
    """What of the whole held-out text is calibrated on too, and of the calibration text held out, for the run record."""
    share, of_calibration = prepared.overlap
    windows = prepared.evaluation
    return {
        "share": share,
        "calibration_share": of_calibration,
        "ngram": NGRAM,
        "positions": windows.total_windows * max(0, windows.seqlen - NGRAM + 1),
    }


def save(windows: Windows, folder: Path, role: str) -> dict[str, Any]:
    """Write `windows` where their digest says, once; return the record of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{role}-{windows.digest[:20]}.safetensors"
    if not path.exists():
        draft = path.with_name(f".{os.getpid()}-{path.name}")
        windows.save(draft)
        draft.replace(path)
    return {
        "file": str(path),
        "digest": windows.digest,
        "source": windows.source,
        "windows": windows.count,
        "seqlen": windows.seqlen,
        "total_windows": windows.total_windows,
    }
