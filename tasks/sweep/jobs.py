"""The jobs of a sweep's missing cells, and where they run."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass

from gptq_core.checkpoint import reader
from gptq_core.inference.evaluation import original_bytes
from tasks.config.run import RunConfig
from tasks.config.sweep import SweepConfig, cores, devices_of
from tasks.outcome import record as records
from tasks.request.capacity import available_memory, existing, foresee
from tasks.request.texts import Prepared, prepare
from tasks.steps.prepare_dataset import overlap_record, save
from tasks.sweep.cells import State
from tasks.sweep.worker import Job

STORED_ORIGINAL = 4_000_000_000
"""Bytes of the original's log-probabilities that are kept on disk for the cells. Beyond that every cell runs the original itself."""


@dataclass(frozen=True)
class Places:
    """Where cells run: `slots` of them at a time on each device, with `threads` each."""

    devices: list[str]
    slots: int
    at_once: int
    threads: int


def places(config: SweepConfig, missing: list[State]) -> Places:
    """As many cells at a time as max_parallel, the cores, and the planned memory of the largest cell allow; one at least."""
    devices = devices_of(config)
    needed = max(_needs(state.config, devices) for state in missing)
    free = _free(devices)
    slots = len(missing) if free is None else max(1, int(free // needed))
    wanted = config.max_parallel or (cores() if devices == ["cpu"] else len(missing))
    slots = min(slots, -(-min(wanted, len(missing)) // len(devices)))
    used = min(len(devices) * slots, wanted)
    return Places(devices[:used], slots, used, config.threads or max(1, cores() // used))


def _needs(config: RunConfig, devices: list[str]) -> int:
    estimate = foresee(config).estimate
    return max(1, estimate.host_bytes if devices == ["cpu"] else estimate.device_bytes)


def _free(devices: list[str]) -> int | None:
    """Memory that the cells of one device may use, in bytes; None where the system does not tell."""
    if devices == ["cpu"]:
        return available_memory()
    import torch

    return min(torch.cuda.mem_get_info(int(device))[0] for device in devices)


def jobs(config: SweepConfig, missing: list[State], threads: int, originals: dict[str, str]) -> dict[str, Job]:
    """A job for each missing cell of an exact sweep, by the cell's name."""
    common = {"kind": "run", "threads": threads, "memory_gb": config.limits.memory_gb, "known_sha256": dict(reader.known_sha256)}
    found = {}
    for state in missing:
        prepared, folder = prepare(state.config), records.beside(state.config.out, ".work")
        data = {
            "calibration": save(prepared.calibration, folder, "calibration"),
            "evaluation": save(prepared.evaluation, folder, "evaluation"),
            "overlap": overlap_record(prepared),
            "notes": list(prepared.notes),
            "seconds": 0.0,
        }
        found[state.cell.name] = common | {
            "config": state.config.model_dump(mode="json"),
            "data": data,
            "original": originals.get(_original_key(state.config, prepared)),
        }
    return found


def screening_jobs(config: SweepConfig, missing: list[State], threads: int) -> list[Job]:
    """A job for all missing cells that share model and texts."""
    found: dict[str, Job] = {}
    for state in missing:
        prepared, model = prepare(state.config), state.config.model
        digests = [prepared.calibration.digest, prepared.evaluation.digest]
        job = found.setdefault(
            json.dumps([model.model_dump(), digests]),
            {
                "kind": "screening",
                "threads": threads,
                "memory_gb": config.limits.memory_gb,
                "model": model.model_dump(),
                "cells": {},
                "known_sha256": dict(reader.known_sha256),
                "calibration": save(prepared.calibration, config.folder / "shared", "calibration"),
                "evaluation": save(prepared.evaluation, config.folder / "shared", "evaluation"),
            },
        )
        job["cells"][state.key] = state.config.quantization.model_dump(mode="json")
    return list(found.values())


def original_jobs(config: SweepConfig, missing: list[State], threads: int) -> tuple[dict[str, Job], dict[str, str]]:
    """Jobs that run an original once for several cells, and the files of those that are stored already; both by content key."""
    wanted: dict[str, list[State]] = {}
    for state in missing:
        wanted.setdefault(_original_key(state.config, prepare(state.config)), []).append(state)
    found, stored = {}, {}
    for key, states in wanted.items():
        model, windows = states[0].config.model, prepare(states[0].config).evaluation
        file = config.folder / "shared" / f"original-{key[:20]}.npy"
        size = original_bytes(model.path, windows, model.revision)
        if file.is_file():
            stored[key] = str(file)
        elif len(states) > 1 and size <= min(STORED_ORIGINAL, shutil.disk_usage(existing(config.folder)).free // 2):
            found[key] = {
                "kind": "original",
                "threads": threads,
                "memory_gb": config.limits.memory_gb,
                "model": model.path,
                "revision": model.revision,
                "device": model.device,
                "file": str(file),
                "windows": save(windows, file.parent, "evaluation")["file"],
                "config": states[0].config.model_dump(mode="json") if states[0].config.evaluation.measures else None,
            }
    return found, stored


def _original_key(config: RunConfig, prepared: Prepared) -> str:
    """sha256 of what decides the original's log-probabilities: its weights, the windows, device and library."""
    import torch
    import transformers

    from gptq_core.model.architecture import choose_device

    model = reader.Checkpoint(reader.resolve(config.model.path, config.model.revision)).digest()
    what = [model, prepared.evaluation.digest, choose_device(config.model.device).type, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
