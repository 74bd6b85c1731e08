"""Everything that can be found wrong before anything is computed. No Prefect here: a wrong request must not wait for a server."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.data.overlap import objection, overlap
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import OVERSAMPLING, TAIL, Windows, calibration_windows, evaluation_windows, split_windows
from gptq_core.errors import GPTQError, InputError
from gptq_core.inference import backends
from gptq_core.model.architecture import choose_device
from gptq_core.planning.consumers import loadability, objections
from gptq_core.planning.estimate import Estimate, Texts, estimate
from gptq_core.planning.plan import Plan, plan
from gptq_core.run.engine import Quantization
from gptq_core.search import allocation
from gptq_core.search.allocation import Allocation
from tasks import record as records
from tasks import settings
from tasks.config import RunConfig
from tasks.measuring import check_measures, measures_key
from tasks.record import beside


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The two texts of a run as packed token windows, and what was adjusted on the way."""

    calibration: Windows
    evaluation: Windows
    notes: tuple[str, ...]
    overlap: tuple[float, float] = (0.0, 0.0)
    """Share of the held-out text's n-grams that calibration sees too, and share of the calibration's that stand in the held-out text."""


def prepare(config: RunConfig) -> Prepared:
    """Read and pack the calibration and the evaluation text. InputError: the model or a text does not do."""
    # the check, the flow and the cells of a sweep ask for the same text: one process reads it once while its files stay as they are
    text = {
        "model": config.model.model_dump(include={"path", "revision"}),
        "calibration": config.calibration.model_dump(),
        "evaluation": config.evaluation.model_dump(),
        "quantization": {"bits": 4, "dataset": config.quantization.dataset},
    }
    return _prepare(json.dumps(text), tuple(_stamp(text) for text in (config.quantization.dataset, config.evaluation.dataset)))


@lru_cache(maxsize=8)
def _prepare(text: str, stamps: tuple) -> Prepared:
    config = RunConfig.model_validate_json(text)
    calibration, evaluation = config.calibration, config.evaluation
    Checkpoint(resolve(config.model.path, config.model.revision))  # the weights first: without them no tokenizer helps
    limit = model_limits(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    notes = tuple(
        f"{room}.seqlen cut from {seqlen} to {limit}, the longest window the model allows"
        for room, seqlen in (("calibration", calibration.seqlen), ("evaluation", evaluation.seqlen))
        if seqlen > limit
    )
    seqlen, evaluation_seqlen = min(calibration.seqlen, limit), min(evaluation.seqlen, limit)
    dataset = config.quantization.dataset
    if evaluation.dataset is None:
        seen, held_out = split_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed, evaluation_seqlen)
    else:
        seen = calibration_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed)
        held_out = evaluation_windows(evaluation.dataset, tokenizer, evaluation_seqlen)
    shares = overlap(held_out.tokens, seen.tokens), overlap(seen.tokens, held_out.tokens)
    held_out = held_out.thinned(evaluation.samples)
    if text := objection(*shares, "evaluation"):
        if evaluation.strict:
            raise InputError(f"{text}: give another evaluation.dataset, or set evaluation.strict: false")
        notes += (f"{text}: the numbers are better than they would be on unseen text",)
    return Prepared(seen, held_out, notes, shares)


PIPELINE_BYTES = 220_000_000
"""What Prefect and the libraries of texts and tokenizers add to the process; measured on Linux with Python 3.11."""
BYTES_A_TOKEN, FEWEST_BYTES = 4, 2
"""Of text, as a rule and at least."""
HELD_A_BYTE = 25
"""Of memory for a byte of text that is tokenized: ids, offsets and pieces, and Python's list of numbers."""
TOLERANCE = 1.2
"""The estimates are good to a fifth: what exceeds the memory by less than that is tried."""


@dataclasses.dataclass(frozen=True)
class Foreseen(Plan):
    """A plan, and what the run will take."""

    estimate: Estimate = dataclasses.field(kw_only=True)


def foresee(config: RunConfig, rates: bool = False, prepared: Prepared | None = None) -> Foreseen:
    """What the run would make, who will load it and what it takes; reads config.json and headers, writes nothing.

    Where widths are still to be chosen, of a choice within the budget for which all weights count alike. rates: also measure this
    machine, and estimate seconds. prepared: the texts, where they were read; else their lengths are told by the config and their sizes.
    """
    wanted, at = config.quantization, (config.model.path, config.model.revision)
    found = plan(at[0], wanted, at[1])
    if wanted.allocate:
        chosen = allocation.presumed(wanted, found.selection).apply(wanted)
        found = plan(at[0], chosen, at[1])
    device, dtype = config.model.device, config.model.dtype
    process = _resident() + (0 if "prefect.flows" in sys.modules else PIPELINE_BYTES) + (0 if prepared else _tokenized(config))
    texts = _texts(config)
    if prepared:
        seen, held_out = prepared.calibration, prepared.evaluation
        texts = Texts(seen.count, seen.seqlen, held_out.seqlen, held_out.count)
    costs = estimate(found, wanted, texts, device=device, dtype=dtype, process_bytes=process, rates=rates)
    return Foreseen(**{field.name: getattr(found, field.name) for field in dataclasses.fields(Plan)}, estimate=costs)


def _texts(config: RunConfig) -> Texts:
    """The windows that the config asks for, and no more than a text of that size can hold."""
    calibration, evaluation = config.calibration, config.evaluation
    limit = model_limits(config.model.path, config.model.revision)
    seqlen, evaluation_seqlen = min(calibration.seqlen, limit), min(evaluation.seqlen, limit)
    text = config.quantization.dataset if evaluation.dataset is None else evaluation.dataset
    held_out = evaluation.samples
    if size := _text_bytes(text):
        tokens = size / BYTES_A_TOKEN
        if evaluation.dataset is None:
            tokens = TAIL * min(tokens, OVERSAMPLING * calibration.samples * seqlen)
        windows = max(1, int(tokens / evaluation_seqlen))
        held_out = windows if held_out is None else min(held_out, windows)
    size = _text_bytes(config.quantization.dataset)
    samples = min(calibration.samples, max(1, size // FEWEST_BYTES // seqlen)) if size else calibration.samples
    return Texts(samples, seqlen, evaluation_seqlen, held_out)


def _text_bytes(text: object) -> int:
    """Size of a text in a file or in the config; 0 where it lies elsewhere. Token ids count as text of the usual length."""
    if isinstance(text, list):
        return sum(len(part) * (1 if isinstance(part, str) else BYTES_A_TOKEN) for part in text)
    if not isinstance(text, str) or not Path(text).is_file():
        return 0
    if Path(text).suffix != ".parquet":
        return Path(text).stat().st_size
    try:
        rows = pq.ParquetFile(text).metadata
    except (pa.ArrowInvalid, OSError):  # told by whoever reads it
        return 0
    return sum(rows.row_group(index).total_byte_size for index in range(rows.num_row_groups))


def _tokenized(config: RunConfig) -> int:
    """Bytes that reading the texts leaves in the process."""
    calibration = config.calibration
    most = OVERSAMPLING * calibration.samples * calibration.seqlen * BYTES_A_TOKEN  # no more is read for calibration
    return HELD_A_BYTE * max(min(most, _text_bytes(config.quantization.dataset)), _text_bytes(config.evaluation.dataset))


def _resident() -> int:
    """Resident set of this process, in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available_memory() -> int | None:
    """Bytes of memory that this process can still take: of the machine and of its control group; None where nobody tells."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        pass
    for limit, used, stat in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            most, now = (group / limit).read_text().strip(), int((group / used).read_text())
            cache = dict(line.split() for line in (group / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdecimal():
            found.append(int(most) - now + int(cache.get(stat, 0)))
    return min(found, default=None)


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Something that the run needs more of than there is."""

    text: str
    """Value and rule."""
    remedy: str
    certain: bool
    """Beyond the estimate's error."""

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


def shortages(config: RunConfig, found: Foreseen) -> list[Shortage]:
    """What of the memory, the accelerator's memory and the disk does not do for a plan."""
    costs = found.estimate
    fewer = "lower calibration.samples or calibration.seqlen"
    if max(costs.stage_bytes, key=costs.stage_bytes.__getitem__) == "evaluation":
        fewer = "its highest stage is the evaluation, which holds both models whole, so fewer calibration.samples do not help"
    needs = [("memory", costs.host_bytes - costs.mapped_bytes - _resident(), available_memory(), f"{fewer}; take a machine with more")]
    if costs.device_bytes and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(choose_device(config.model.device))[0]
        needs.append((f"memory of {costs.device}", costs.device_bytes, free, f"{fewer}; choose another model.device"))
    free = shutil.disk_usage(existing(config.out)).free
    needs.append(("disk", costs.write_bytes, free, "choose an output.dir on another disk, or free space"))
    return [
        Shortage(f"{what}: {need / 1e9:.2f} GB are needed, {there / 1e9:.2f} GB are free (must fit)", remedy, need > TOLERANCE * there)
        for what, need, there, remedy in needs
        if there is not None and need > there
    ]


def existing(path: Path) -> Path:
    """The folder that is there already, of a path that may not be."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def fits(config: RunConfig, found: Foreseen | None = None) -> tuple[str, ...]:
    """Notes on what may not do. Raises InputError for memory or disk that is too small beyond the estimate's error.

    found: what `foresee` said about the config, where that is known.
    """
    short = shortages(config, found or foresee(config))
    for shortage in short:
        if shortage.certain:
            raise InputError(str(shortage))
    return tuple(f"{shortage}; by an estimate that is good to a fifth" for shortage in short)


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
    return allocation.key(
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
        settings.check(value or "")
    found = foresee(config)
    tight = fits(config, found)
    prepared, record = prepare(config), records.read(config.out) or {}
    seen = ()
    if (record.get("evaluation") or {}).get("measured") != measures_key(config):
        seen = check_measures(config, prepared.calibration)
    with open_quantization(config, prepared.calibration) as job:
        verdicts = found.verdicts if job.config.allocate else loadability(job.config, job.selection)
        return (*prepared.notes, *seen, *tight, *objections(verdicts))


def _stamp(dataset: object) -> tuple[int, int] | None:
    if not isinstance(dataset, str) or not Path(dataset).is_file():
        return None
    status = Path(dataset).stat()
    return status.st_mtime_ns, status.st_size
