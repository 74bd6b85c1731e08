"""The memory, disk and time that a run will take, and whether this machine has them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gptq_core.data.tokenizer import model_limits
from gptq_core.data.windows import OVERSAMPLING, TAIL
from gptq_core.errors import InputError
from gptq_core.model.architecture import choose_device, choose_dtype
from gptq_core.model.opened import OpenedModel
from gptq_core.planning.estimate import Estimate, Texts, estimate, planned_device
from gptq_core.planning.plan import Plan, plan
from gptq_core.search import allocation
from tasks.config.run import RunConfig

PIPELINE_BYTES = 220_000_000
"""What Prefect and the libraries of texts and tokenizers add to the process; measured on Linux with Python 3.11."""
BYTES_A_TOKEN, FEWEST_BYTES = 4, 2
"""Bytes of text in a token: the usual number, and the smallest."""
HELD_A_BYTE = 25
"""Bytes of memory for a byte of text while it is tokenized: ids, offsets and pieces, and Python's list of numbers."""
TOLERANCE = 1.2
"""The estimates are good to a fifth: a run that exceeds the memory by less than that is tried."""


@dataclasses.dataclass(frozen=True)
class Foreseen(Plan):
    """A plan, and an estimate of what the run will take."""

    estimate: Estimate = dataclasses.field(kw_only=True)


def foresee(config: RunConfig, model: OpenedModel, rates: bool = False) -> Foreseen:
    """Plan and estimate a run of `config` on its model; reads config.json and headers, writes nothing.

    Where widths are still to be chosen, the plan is of a choice within the budget for which all weights count alike. The lengths of the
    texts are taken from the config and the sizes of their files. rates: also measure this machine, and estimate seconds.
    """
    wanted, device, dtype = config.quantization, config.model.device, config.model.dtype
    model.decoder(choose_dtype(dtype, model.config, planned_device(device)[0]))  # plan, estimate and run share this empty model
    found = plan(model, wanted)
    if wanted.allocate:
        found = plan(model, allocation.presumed(wanted, found.selection).apply(wanted))
    process = _resident() + (0 if "prefect.flows" in sys.modules else PIPELINE_BYTES) + _tokenized(config)
    costs = estimate(found, wanted, _texts(config, model), device=device, dtype=dtype, process_bytes=process, rates=rates)
    return Foreseen(**{field.name: getattr(found, field.name) for field in dataclasses.fields(Plan)}, estimate=costs)


def _texts(config: RunConfig, model: OpenedModel) -> Texts:
    """The windows that the config names, and no more than a text of that size can hold."""
    calibration, evaluation = config.calibration, config.evaluation
    limit = model_limits(model)
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
    except (pa.ArrowInvalid, OSError):  # reading the text raises it with a remedy
        return 0
    return sum(rows.row_group(index).total_byte_size for index in range(rows.num_row_groups))


def _tokenized(config: RunConfig) -> int:
    """Bytes that reading the texts leaves in the process."""
    calibration = config.calibration
    most = OVERSAMPLING * calibration.samples * calibration.seqlen * BYTES_A_TOKEN  # no more is read for calibration
    return HELD_A_BYTE * max(min(most, _text_bytes(config.quantization.dataset)), _text_bytes(config.evaluation.dataset))


def _resident() -> int:
    """Resident set of this process, in bytes; 0 where it cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def available_memory() -> int | None:
    """Bytes that this process can still take of the machine's memory and of its control group's; None where neither can be read."""
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
    """Whether it exceeds the estimate's error."""

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


def shortages(config: RunConfig, found: Foreseen) -> list[Shortage]:
    """Resources (RAM, GPU memory, disk) that are too small for the plan."""
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
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def fits(config: RunConfig, found: Foreseen) -> tuple[str, ...]:
    """Notes on memory or disk that may be too small. Raises InputError where they are too small beyond the estimate's error."""
    short = shortages(config, found)
    for shortage in short:
        if shortage.certain:
            raise InputError(str(shortage))
    return tuple(f"{shortage}; by an estimate that is good to a fifth" for shortage in short)
