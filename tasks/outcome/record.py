"""The records of runs and sweeps, and the only place that reads and writes them: `<out>.run.json` and `<folder>/sweep.json`.

A record holds what may differ between two equal runs, so it lies beside the checkpoint and never in it. It is written before MLflow
is called: a tracking server that does not answer costs only its copy.

Records have a `schema_version`. Files without one are of version 1, whose keys are those of version 2; they are read, and written as
version 2. Unknown keys are kept. A file of a later version is refused: what its keys mean is not known here.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_core.checkpoint.writer import MANIFEST, replace_file
from gptq_core.errors import InputError
from tasks.config.run import RunConfig
from tasks.outcome.machine import machine, source
from tasks.outcome.parts import (
    AllocatedWidths,
    Assembly,
    Block,
    CellName,
    Evaluation,
    GateResult,
    HookCalls,
    Json,
    Machine,
    MachineLoad,
    MlflowLink,
    Recommendation,
    Registration,
    Source,
    SweepName,
    SweptCell,
    Text,
)

VERSION = 2
SWEEP = "sweep.json"


class Record(BaseModel):
    """A mutable record; what is assigned is validated. Its parts are frozen."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, protected_namespaces=(), ser_json_inf_nan="constants")

    schema_version: int = VERSION


class RunRecord(Record):
    id: str
    """MLflow's run is found by it."""
    key: str
    """Content key of the work: model, texts, config and code."""
    config: Json
    """The RunConfig as JSON; passwords are stars. tasks.config.run.from_dict reads it."""
    out: str
    """Folder of the checkpoint, relative to the working directory of the run."""
    started: str
    finished_ms: int | None = None
    """Since 1970; None while the evaluation is still to come. So is `seconds`."""
    seconds: float | None = None
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: dict[str, int] | None = None
    """By kind: host, gpu."""
    machine: Machine
    source: Source = Source()
    system: MachineLoad | None = None
    model_digest: str | None = None
    device: str | None = None
    """Type of the device: cpu or cuda."""
    kernels: str | None = None
    """Implementation of the innermost loops: triton, c or torch."""
    calibration_data: Text
    evaluation_data: Text
    allocation: AllocatedWidths | None = None
    """None: no widths were to be chosen."""
    assembly: Assembly
    evaluation: Evaluation | None = None
    """None: still to come, or failed."""
    evaluation_error: str | None = None
    blocks: list[Block] = Field(default_factory=list)
    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None
    sweep: CellName | None = None
    mlflow: MlflowLink | None = None
    """None: not logged yet."""
    gate: GateResult | None = None
    """None: no gate is set."""
    registry: Registration | None = None
    """None: not to be registered."""
    notified: HookCalls | None = None
    notes: list[str] = Field(default_factory=list)
    """What was adjusted before the run."""
    unchanged: bool = False
    """Whether the last command found the checkpoint finished."""


class SweepRecord(Record):
    id: str
    """MLflow's run is found by it."""
    folder: str
    mode: Literal["exact", "screening"]
    started_ms: int | None = None
    model: str | None = None
    """Name of the model, or how many there are."""
    config: Json
    source: Source = Source()
    machine: Machine = Machine()
    finished: str
    seconds: float
    """Of the last command that computed cells."""
    computed: list[str] = Field(default_factory=list)
    """Cells that it computed."""
    measure: Literal["kl", "perplexity"]
    """Quality of the front and the choice."""
    cells: list[SweptCell]
    front: list[str]
    """Names of the cells on the Pareto front over size and quality."""
    recommended: Recommendation
    registry: Registration | None = None
    """The recommended cell's; None: not to be registered."""
    mlflow: MlflowLink | None = None
    notified: HookCalls | None = None
    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None

    @property
    def name(self) -> SweepName:
        return SweepName(id=self.id, folder=self.folder, mode=self.mode, started_ms=self.started_ms, model=self.model)

    @property
    def chosen(self) -> SweptCell | None:
        """The recommended cell."""
        return next((cell for cell in self.cells if cell.name == self.recommended.name), None)

    @property
    def screening(self) -> bool:
        return self.mode == "screening"


# -- where records lie ----------------------------------------------------------------------------------------------------


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


def sweep_path(folder: str | Path) -> Path:
    return Path(folder) / SWEEP


# -- reading and writing --------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Record)


def read(out: str | Path) -> RunRecord | None:
    """The record of the checkpoint `out`; None where there is none. Raises InputError if it is damaged or of a later version."""
    return _read(record_path(out), RunRecord, "run record", "mend it or remove it")


def write(out: str | Path, record: RunRecord) -> Path:
    return _write(record_path(out), record)


def read_sweep(folder: str | Path) -> SweepRecord | None:
    """The record of the sweep in `folder`; None where there is none. Raises InputError if it is damaged or of a later version."""
    return _read(sweep_path(folder), SweepRecord, "sweep record", "remove it, and the same sweep command writes it again; its cells stay")


def write_sweep(folder: str | Path, record: SweepRecord) -> Path:
    return _write(sweep_path(folder), record)


def _read(path: Path, kind: type[R], what: str, remedy: str) -> R | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise InputError(f"{what} {path} must hold a JSON object: {remedy}")
    version = found.get("schema_version", 1)
    if version not in (1, VERSION):
        raise InputError(
            f"{what} {path}: schema_version = {version!r}: this code reads 1 and {VERSION}; use the code that wrote it, or {remedy}"
        )
    try:
        return kind.model_validate(found | {"schema_version": VERSION})
    except ValidationError as error:
        raise InputError(f"{what} {path} is damaged ({damage(error)}): {remedy}") from error


def damage(error: ValidationError) -> str:
    """The first thing that is wrong, as `key: rule`, in one line."""
    problems = error.errors(include_url=False, include_input=False)
    text = f"{'.'.join(map(str, problems[0]['loc']))}: {problems[0]['msg']}"
    return text + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")


def _write(path: Path, record: Record) -> Path:
    """Replace the file at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (text_of(record) + "\n").encode())
    return path


def text_of(record: Record) -> str:
    return json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)


# -- what records are made of ---------------------------------------------------------------------------------------------


def now() -> str:
    """This moment, as records write one."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def milliseconds(moment: str) -> int:
    """Since 1970, of a moment as records write it."""
    return 1000 * calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))


def new(config: RunConfig, key: str, started: str, calibration: Text, evaluation: Text, assembly: Assembly) -> RunRecord:
    """The record of a checkpoint that is finished and still to be evaluated."""
    return RunRecord(
        id=f"{key[:12]}-{uuid.uuid4().hex[:12]}",
        key=key,
        config=config.model_dump(mode="json"),
        out=str(config.out),
        started=started,
        machine=machine(),
        source=source(),
        calibration_data=calibration,
        evaluation_data=evaluation,
        assembly=assembly,
    )


def add_manifest(record: RunRecord, out: str | Path) -> None:
    """Fill in model_digest, device and kernels from the checkpoint's manifest."""
    with (Path(out) / MANIFEST).open(encoding="utf-8") as lines:
        run = json.loads(lines.readline())
    record.model_digest, record.device, record.kernels = run["model_sha256"], run["versions"]["device"], run["versions"].get("kernels")


def short_name(layer: str) -> str:
    """`model.layers.7.mlp.up_proj` as `mlp.up_proj`: the name of a layer within its block."""
    return re.sub(r"^.*?\.\d+\.", "", layer)
