"""The jobs of a sweep's missing cells, and where they run."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass

from gptq_core.checkpoint import reader
from gptq_core.inference.evaluation import original_bytes
from tasks.config.sweep import SweepConfig, cores, devices_of
from tasks.outcome import record as records
from tasks.outcome.job import OriginalJob, RunJob, ScreeningJob, without_passwords
from tasks.request.capacity import available_memory, existing
from tasks.request.request import Request
from tasks.request.texts import save
from tasks.sweep.cells import State

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
    needed = max(_needs(state.request, devices) for state in missing)
    free = _free(devices)
    slots = len(missing) if free is None else max(1, int(free // needed))
    wanted = config.max_parallel or (cores() if devices == ["cpu"] else len(missing))
    slots = min(slots, -(-min(wanted, len(missing)) // len(devices)))
    used = min(len(devices) * slots, wanted)
    return Places(devices[:used], slots, used, config.threads or max(1, cores() // used))


def _needs(request: Request, devices: list[str]) -> int:
    estimate = request.foreseen.estimate
    return max(1, estimate.host_bytes if devices == ["cpu"] else estimate.device_bytes)


def _free(devices: list[str]) -> int | None:
    """Memory that the cells of one device may use, in bytes; None where it cannot be read."""
    if devices == ["cpu"]:
        return available_memory()
    import torch

    return min(torch.cuda.mem_get_info(int(device))[0] for device in devices)


def jobs(config: SweepConfig, missing: list[State], threads: int, originals: dict[str, str]) -> dict[str, RunJob]:
    """A job for each missing cell of an exact sweep, by the cell's name."""
    return {
        state.cell.name: RunJob(
            threads=threads,
            memory_gb=config.limits.memory_gb,
            known_sha256=dict(reader.known_sha256),
            config=without_passwords(state.config),
            texts=state.request.texts.save(records.beside(state.config.out, ".work")),
            original=originals.get(_original_key(state.request)),
        )
        for state in missing
    }


def screening_jobs(config: SweepConfig, missing: list[State], threads: int) -> list[ScreeningJob]:
    """A job for all missing cells that share model and texts."""
    found: dict[str, ScreeningJob] = {}
    for state in missing:
        assert state.key is not None  # a valid cell of a screening has one
        texts, model = state.request.texts, state.config.model
        alike = json.dumps([model.model_dump(), texts.calibration.digest, texts.evaluation.digest])
        if alike not in found:
            found[alike] = ScreeningJob(
                threads=threads,
                memory_gb=config.limits.memory_gb,
                known_sha256=dict(reader.known_sha256),
                model=model,
                cells={},
                texts=texts.save(config.folder / "shared"),
            )
        found[alike].cells[state.key] = state.config.quantization
    return list(found.values())


def original_jobs(config: SweepConfig, missing: list[State], threads: int) -> tuple[dict[str, OriginalJob], dict[str, str]]:
    """Jobs that run an original once for several cells, and the files of those that are stored already; both by content key."""
    wanted: dict[str, list[State]] = {}
    for state in missing:
        wanted.setdefault(_original_key(state.request), []).append(state)
    found, stored = {}, {}
    for key, states in wanted.items():
        request, model, windows = states[0].request, states[0].config.model, states[0].request.texts.evaluation
        file = config.folder / "shared" / f"original-{key[:20]}.npy"
        size = original_bytes(request.model, windows)
        if file.is_file():
            stored[key] = str(file)
        elif len(states) > 1 and size <= min(STORED_ORIGINAL, shutil.disk_usage(existing(config.folder)).free // 2):
            found[key] = OriginalJob(
                threads=threads,
                memory_gb=config.limits.memory_gb,
                model=model.path,
                revision=model.revision,
                device=model.device,
                windows=save(windows, file.parent, "evaluation").file,
                file=str(file),
                config=without_passwords(states[0].config) if states[0].config.evaluation.measures else None,
            )
    return found, stored


def _original_key(request: Request) -> str:
    """sha256 of what decides the original's log-probabilities: its weights, the windows, device and library."""
    import torch
    import transformers

    from gptq_core.model.architecture import choose_device

    model, text, device = request.model.source.digest(), request.texts.evaluation.digest, choose_device(request.config.model.device)
    what = [model, text, device.type, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
