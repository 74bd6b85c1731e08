"""Everything that can be found wrong before anything is computed. No Prefect here: a wrong request must not wait for a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.data.windows import Windows
from gptq_core.errors import GPTQError, InputError
from gptq_core.inference import backends
from gptq_core.model.architecture import choose_device
from gptq_core.planning.consumers import loadability, objections
from gptq_core.run import identity
from gptq_core.run.engine import Quantization
from gptq_core.search.allocation import Allocation
from tasks.config import secrets
from tasks.config.run import RunConfig
from tasks.evaluation.scores import check_measures, measures_key
from tasks.outcome import record as records
from tasks.outcome.record import beside
from tasks.request.capacity import fits, foresee
from tasks.request.texts import prepare

KEY = "{key}"


def placed(config: RunConfig) -> RunConfig:
    """`config` with the {key} of its output.dir filled in."""
    if KEY not in (config.output.dir or ""):
        return config
    key = request_key(config, prepare(config).calibration)[:12]
    return config.model_copy(update={"output": config.output.model_copy(update={"dir": config.output.dir.replace(KEY, key)})})


def allocation_file(config: RunConfig) -> Path:
    """Where the widths lie that were chosen for this output, with the key of what they were chosen for."""
    return beside(config.out, ".work") / "allocation.json"


def request_key(config: RunConfig, calibration: Windows) -> str:
    """sha256 of the request: model, settings, calibration windows, kind of device and this code."""
    return identity.request_key(
        config.model.path,
        config.quantization,
        calibration,
        device=config.model.device,
        dtype=config.model.dtype,
        revision=config.model.revision,
    )


def stored_allocation(config: RunConfig, calibration: Windows) -> dict[str, Any] | None:
    """The record of the widths as they were chosen for this very request; None: not yet, or none are asked for."""
    path = allocation_file(config)
    if config.quantization.allocate is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): remove it, and the widths are chosen anew") from error
    return record if isinstance(record, dict) and record.get("key") == request_key(config, calibration) else None


def open_quantization(config: RunConfig, calibration: Windows) -> Quantization:
    """The engine on this request: checked, locked, resumed. OutputHeldError: another run writes there.

    Where widths are still to be chosen, it quantizes nothing yet.
    """
    if config.output.profile == "portable":
        refused = objections(foresee(config).verdicts, full=True)
        if refused:
            raise InputError(f"output.profile = 'portable': {'; '.join(refused)}; or set output.profile: mixed")
    wanted, stored = config.quantization, stored_allocation(config, calibration)
    if stored:
        wanted = Allocation.from_record(stored).apply(wanted)
    run = Quantization.open(
        config.model.path,
        wanted,
        calibration,
        config.out,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=config.model.device,
        overwrite=config.output.overwrite,
    )
    try:
        run.kernel()  # the evaluation at the end would be the first to miss it
    except GPTQError:
        run.close()
        raise
    return run


def check(config: RunConfig) -> tuple[str, ...]:
    """Raise what is wrong with the request, the model, the texts and the output; return what was adjusted."""
    backends.choose(config.evaluation_backend, [], choose_device(config.model.device))  # is it installed: before a text is read
    Checkpoint(resolve(config.model.path, config.model.revision))  # a plan does without weights, a run does not
    for value in (config.tracking.uri, config.notify and config.notify.webhook):
        secrets.check(value or "")
    found = foresee(config)
    tight = fits(config, found)
    prepared, record = prepare(config), records.read(config.out) or {}
    seen = ()
    if (record.get("evaluation") or {}).get("measured") != measures_key(config):
        seen = check_measures(config, prepared.calibration)
    with open_quantization(config, prepared.calibration) as job:
        verdicts = found.verdicts if job.config.allocate else loadability(job.config, job.selection)
        return (*prepared.notes, *seen, *tight, *objections(verdicts))
