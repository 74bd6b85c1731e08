"""Everything that can be found wrong before anything is computed. No Prefect here: a wrong request must not wait for a server."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptq_core import allocation, backends
from gptq_core.allocation import Allocation
from gptq_core.architecture import choose_device
from gptq_core.calibration import Windows, calibration_windows, evaluation_windows, split_windows
from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.engine import Quantization
from gptq_core.errors import GPTQError, InputError
from gptq_core.plan import Plan, loadability, objections, plan
from gptq_core.source import load_tokenizer, model_limits
from tasks.config import RunConfig
from tasks.record import beside


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The two texts of a run as packed token windows, and what was adjusted on the way."""

    calibration: Windows
    evaluation: Windows
    notes: tuple[str, ...]


def prepare(config: RunConfig) -> Prepared:
    """Read and pack the calibration and the evaluation text. InputError: the model or a text does not do."""
    # the check and the flow of one process ask for the same text: it is tokenized once while its files stay as they are
    return _prepare(config.model_dump_json(), tuple(_stamp(text) for text in (config.quantization.dataset, config.evaluation.dataset)))


@lru_cache(maxsize=1)
def _prepare(config_json: str, stamps: tuple) -> Prepared:
    config = RunConfig.model_validate_json(config_json)
    calibration, evaluation = config.calibration, config.evaluation
    Checkpoint(resolve(config.model.path, config.model.revision))  # the weights first: without them no tokenizer helps
    limit = model_limits(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    notes = tuple(f"{room}.seqlen cut from {seqlen} to {limit}, the longest window the model allows"
                  for room, seqlen in (("calibration", calibration.seqlen), ("evaluation", evaluation.seqlen)) if seqlen > limit)
    seqlen, evaluation_seqlen = min(calibration.seqlen, limit), min(evaluation.seqlen, limit)
    dataset = config.quantization.dataset
    if evaluation.dataset is None:
        seen, held_out = split_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed, evaluation_seqlen)
        held_out = held_out.thinned(evaluation.samples)
    else:
        seen = calibration_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed)
        held_out = evaluation_windows(evaluation.dataset, tokenizer, evaluation_seqlen, evaluation.samples)
    return Prepared(seen, held_out, notes)


def foresee(config: RunConfig) -> Plan:
    """What the run would make and who will load it; reads config.json and headers, writes nothing.

    Where widths are still to be chosen, of a choice within the budget for which all weights count alike.
    """
    wanted, at = config.quantization, (config.model.path, config.model.revision)
    if wanted.allocate:
        wanted = allocation.presumed(wanted, plan(at[0], wanted, at[1]).selection).apply(wanted)
    return plan(at[0], wanted, at[1])


def allocation_file(config: RunConfig) -> Path:
    """Where the widths lie that were chosen for this output, with the key of what they were chosen for."""
    return beside(config.out, ".work") / "allocation.json"


def allocation_key(config: RunConfig, calibration: Windows) -> str:
    return allocation.key(config.model.path, config.quantization, calibration, device=config.model.device, dtype=config.model.dtype,
                          revision=config.model.revision)


def stored_allocation(config: RunConfig, calibration: Windows) -> dict[str, Any] | None:
    """The record of the widths as they were chosen for this very request; None: not yet, or none are asked for."""
    path = allocation_file(config)
    if config.quantization.allocate is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): remove it, and the widths are chosen anew") from error
    return record if isinstance(record, dict) and record.get("key") == allocation_key(config, calibration) else None


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
        config.model.path, wanted, calibration, config.out, revision=config.model.revision,
        dtype=config.model.dtype, device=config.model.device, overwrite=config.output.overwrite,
    )
    try:
        run.kernel()  # the evaluation at the end would be the first to miss it
    except GPTQError:
        run.close()
        raise
    return run


def check(config: RunConfig) -> tuple[str, ...]:
    """Raise what is wrong with the request, the model, the texts and the output; return what was adjusted."""
    backends.choose(config.quantization.backend, [], choose_device(config.model.device))  # is it installed: before a text is read
    prepared = prepare(config)
    with open_quantization(config, prepared.calibration) as job:
        verdicts = foresee(config).verdicts if job.config.allocate else loadability(job.config, job.selection)
        return (*prepared.notes, *objections(verdicts))


def _stamp(dataset: object) -> tuple[int, int] | None:
    if not isinstance(dataset, str) or not Path(dataset).is_file():
        return None
    status = Path(dataset).stat()
    return status.st_mtime_ns, status.st_size
