"""SweepConfig, the schema of a sweep: many runs that differ in a few keys, and their expansion into cells.

A cell is a RunConfig with a name and a folder of its own. The name depends on the settings of the cell alone, so that a sweep whose
grid grows finds the cells that are done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from gptq_core.errors import InputError
from gptq_core.schema import Schema, explain
from tasks.config.run import RunConfig, from_dict, load_yaml, without_password

Positive = Annotated[int, Field(gt=0)]
Settings = dict[str, Any]
NOT_AXES = ("output.", "tracking.", "notify.", "gate.")
"""Sections that are the same for the whole sweep and cannot be axes."""


class LimitsConfig(Schema):
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Time limit of a cell in minutes; null: none. A cell that takes longer is ended and reported."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Limit in GB (1e9 bytes) on the main memory of a cell's process, its data segment; null: none. A cell that needs more is ended and
    reported."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Number of times a cell is restarted after its process died; it resumes at the first unfinished block."""


class ChoiceConfig(Schema):
    rule: Literal["smallest_within_gate", "best_within_size"] = "smallest_within_gate"
    """Rule for the recommended cell: smallest_within_gate or best_within_size. smallest_within_gate: the smallest cell that passes
    base.gate, or without a gate max_perplexity_increase. best_within_size: the best cell by measure among those that are no larger than
    max_gb and pass base.gate where one is set."""
    max_perplexity_increase: Annotated[float, Field(ge=0)] = 0.05
    """Largest allowed increase of perplexity for smallest_within_gate where base.gate is not set, relative to the original: 0.05 is
    5%."""
    max_gb: Annotated[float, Field(gt=0)] | None = None
    """Largest allowed size of a checkpoint in GB (1e9 bytes), for best_within_size."""
    measure: Literal["kl", "perplexity"] = "kl"
    """Measure of quality, for the Pareto front and for best_within_size: kl, KL(original || quantized) per token, or perplexity."""

    @model_validator(mode="after")
    def _has_budget(self) -> ChoiceConfig:
        if (self.rule == "best_within_size") != (self.max_gb is not None):
            raise ValueError("max_gb and rule: best_within_size need each other: set both or neither")
        return self


class SweepConfig(Schema):
    """A sweep: a base config, the axes and cells that vary it, and how cells are run and chosen."""

    base: dict[str, Any]
    """Config of a run: its sections, or in YAML the path of a run's config. The axes override it and may supply keys that it leaves
    out."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Axes with their values; every combination is a cell. An axis is a key of quantization, or section.key such as
    calibration.samples."""
    cells: list[Settings] = Field(default_factory=list)
    """Cells beside those of the grid, such as {bits: 4, group_size: -1}."""
    exclude: list[Settings] = Field(default_factory=list)
    """Combinations of the grid to leave out, such as {bits: 2, group_size: 128}. Every cell that agrees with one of them is left
    out."""
    mode: Literal["exact", "screening"] = "exact"
    """How cells are judged: exact runs every cell and writes its checkpoint; screening judges all cells in one pass through the
    original model, without checkpoints. Use screening for a first choice: it does not see what shifted targets and block tuning give,
    and its cells are never registered."""
    max_parallel: Positive | None = None
    """Maximum number of cells at a time; null: as many as devices, cores and the planned memory allow."""
    threads: Positive | None = None
    """Threads per cell; null: the cores of this machine divided by the cells at a time."""
    devices: list[str] | None = None
    """GPUs by number, such as ["0", "1"], or ["cpu"]; null: all GPUs, or the CPU where there is none."""
    runner: Literal["local", "ray"] = "local"
    """Where cells run: local, in processes on this machine, or ray, on a Ray cluster whose nodes see the same paths. ray needs
    pip install 'gptq-pipeline[ray]'."""
    ray_address: str | None = None
    """Address of the Ray cluster (ray://HOST:10001); null: a cluster on this machine. Only with runner: ray."""
    limits: LimitsConfig = LimitsConfig()
    """Limits on each cell."""
    choose: ChoiceConfig = ChoiceConfig()
    """Rule for the recommended cell."""
    dir: str | None = None
    """Folder of the sweep, with a folder for each cell; null: runs/<model>-sweep."""

    @field_validator("base", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return _base(value)

    @field_serializer("base")
    def _without_password(self, base: dict[str, Any]) -> dict[str, Any]:
        # as in TrackingConfig: dumps go into sweep.json and Prefect's pages; only the object itself is used to connect
        tracking = base.get("tracking")
        if not isinstance(tracking, dict) or not isinstance(tracking.get("uri"), str):
            return base
        return base | {"tracking": tracking | {"uri": without_password(tracking["uri"])}}

    @field_validator("grid")
    @classmethod
    def _values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        empty = [axis for axis, values in grid.items() if not values]
        if empty:
            raise ValueError(f"{empty[0]} has no values: give a list such as [3, 4]")
        return grid

    @model_validator(mode="after")
    def _makes_cells(self) -> SweepConfig:
        axes = dict.fromkeys(axis for settings in (self.grid, *self.cells, *self.exclude) for axis in settings)
        for axis in axes:
            if dotted(axis).startswith(NOT_AXES):
                raise ValueError(f"{axis} cannot be an axis: it is the same for the whole sweep; set it in base (folders: dir)")
        for axis in dict.fromkeys(axis for rule in self.exclude for axis in rule):
            if dotted(axis) not in {dotted(own) for own in self.grid}:
                raise ValueError(f"exclude: {axis} is not an axis of the grid; axes are {', '.join(self.grid)}")
        if not all(isinstance(section, dict) for section in self.base.values() if section is not None):
            raise ValueError("base must hold sections such as model: and quantization:, each with keys")
        if self.ray_address and self.runner != "ray":
            raise ValueError("ray_address needs runner: ray")
        if (self.base.get("output") or {}).get("dir"):
            raise ValueError("base.output.dir: each cell has its own folder; remove the key and set dir, the folder of the sweep")
        found = self.expanded()
        if not found:
            raise ValueError("no cells: give a grid such as {bits: [3, 4]} or cells, and do not exclude all of them")
        if all(cell.config is None for cell in found):
            raise ValueError(f"no cell is valid; the first is {found[0].name}: {found[0].error}")
        if self.runner == "ray" and (self.max_parallel or self.devices):
            raise ValueError(
                "max_parallel and devices apply to runner: local; Ray places cells by `threads` and its GPUs: remove them, "
                "or set runner: local"
            )
        if self.runner == "ray" and self.mode == "screening":
            raise ValueError("mode: screening runs in one process: set runner: local")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the sweep, with the default filled in."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        model = str((self.base.get("model") or {}).get("path", "model"))
        name = Path(model).resolve().name if Path(model).is_dir() else re.sub(r"[^\w.-]+", "-", model)
        return Path("runs") / f"{name.strip('.-') or 'model'}-sweep"

    def expanded(self) -> list[Cell]:
        """All cells without duplicates: those of the grid that are not excluded, then the explicit ones."""
        axes = list(self.grid)
        product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*self.grid.values())] if axes else []
        kept = [cell for cell in product if not any(_agrees(cell, rule) for rule in self.exclude)]
        unique = {cell_name(cell): cell for cell in (*kept, *self.cells)}
        return [self._cell(settings) for settings in unique.values()]

    def _cell(self, settings: Settings) -> Cell:
        name = cell_name(settings)
        overrides = {dotted(axis): value for axis, value in settings.items()} | {"output.dir": str(self.folder / name)}
        if self.devices == ["cpu"]:
            overrides["model.device"] = "cpu"
        try:
            config = from_dict(self.base, overrides)
        except InputError as error:
            return Cell(name, settings, None, str(error))
        if config.model.device.startswith("cuda:"):
            number = config.model.device.partition(":")[2]
            return Cell(name, settings, None, f"model.device = {config.model.device}: a cell sees a single GPU; set devices: ['{number}']")
        return Cell(name, settings, config, None)


@dataclass(frozen=True)
class Cell:
    """One combination of settings; if it is invalid, config is None and error holds the reason."""

    name: str
    settings: Settings
    config: RunConfig | None
    error: str | None


def dotted(axis: str) -> str:
    """The key of an axis with its section: `bits` becomes `quantization.bits`."""
    return axis if "." in axis else f"quantization.{axis}"


def cell_name(settings: Settings) -> str:
    """Folder name from settings: `bits=3_group_size=32`. Long or unusual values are shortened and get a digest."""
    parts = []
    for axis, value in sorted((dotted(axis), value) for axis, value in settings.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        slug = re.sub(r"[^\w.+-]+", "-", text)
        if slug != text or len(slug) > 40:  # shortened values may collide, digests do not
            slug = f"{slug[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        parts.append(f"{axis.removeprefix('quantization.')}={slug}")
    return "_".join(parts)


def _agrees(cell: Settings, rule: Settings) -> bool:
    own = {dotted(axis): value for axis, value in cell.items()}
    return bool(rule) and all(dotted(axis) in own and own[dotted(axis)] == value for axis, value in rule.items())


def _base(value: Any) -> Any:
    """Replace the path of a run's YAML by its content, without output.dir: cells have their own folders."""
    if not isinstance(value, str):
        return value
    base = load_yaml(value)
    return base | {"output": {key: kept for key, kept in (base.get("output") or {}).items() if key != "dir"}}


def load_sweep(path: str | Path, grid: dict[str, list[Any]], overrides: dict[str, Any]) -> SweepConfig:
    """A SweepConfig from a sweep's YAML, or from a run's YAML as the base. `grid` adds or replaces axes; `overrides` hold keys of the
    sweep, or keys of its base as section.key."""
    data = load_yaml(path)
    if "base" not in data:
        data = {"base": str(path)}
    data["base"], data["grid"] = _base(data["base"]), {**(data.get("grid") or {}), **grid}
    for key, value in overrides.items():
        room, _, leaf = key.partition(".")
        place = data if room in SweepConfig.model_fields else data["base"]
        if not isinstance(place, dict) or leaf and not isinstance(place.get(room) or {}, dict):
            raise InputError(f"{key}: {room} is not a section that holds keys")
        place[room] = {**(place.get(room) or {}), leaf: value} if leaf else value
    try:
        return SweepConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Axis and values from text such as `bits=3,4`; the values are YAML."""
    axis, equals, values = text.partition("=")
    if not equals or not axis.strip() or not values.strip():
        raise InputError(f"--grid {text}: expected AXIS=VALUE,VALUE, such as bits=3,4 or calibration.samples=64,128")
    try:
        return axis.strip(), yaml.safe_load(values if values.lstrip().startswith("[") else f"[{values}]")
    except yaml.YAMLError as error:
        raise InputError(f"--grid {text}: the values are not valid YAML; write them as in bits=3,4") from error


def devices_of(config: SweepConfig) -> list[str]:
    """Numbers of the GPUs that cells may use, or ["cpu"]."""
    if config.devices is not None:
        return config.devices
    wanted = {cell.config.model.device if cell.config else "auto" for cell in config.expanded()}
    import torch

    if wanted == {"cpu"} or not torch.cuda.is_available():
        return ["cpu"]
    return [str(index) for index in range(torch.cuda.device_count())]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
