"""SweepConfig: many runs that differ in a few keys, and the cells that come of it.

A cell is a RunConfig with a name and a folder of its own. Names come from a cell's own settings alone, so that a grid that grows
finds what it has done.
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
"""Sections that belong to the sweep as a whole; `output.dir` is what the cells are told apart by."""


class LimitsConfig(Schema):
    minutes: Annotated[float, Field(gt=0)] | None = None
    """A cell that takes longer is ended and reported; null: no limit."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Main memory of one cell's process (its data segment); a cell that needs more is ended and reported; null: no limit."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a cell is begun again whose worker died; it goes on at the first unfinished block."""


class ChoiceConfig(Schema):
    rule: Literal["smallest_within_gate", "best_within_size"] = "smallest_within_gate"
    """The one cell that is recommended: the smallest that passes base.gate, or the best by `measure` that is no larger than max_gb."""
    max_perplexity_increase: Annotated[float, Field(ge=0)] = 0.05
    """What smallest_within_gate allows where base.gate is not set: 0.05 is five per cent above the original's perplexity."""
    max_gb: Annotated[float, Field(gt=0)] | None = None
    """Size budget of best_within_size, in GB of the checkpoint on disk."""
    measure: Literal["kl", "perplexity"] = "kl"
    """What quality means: KL(original || quantized) per token, or perplexity. For the front and for best_within_size."""

    @model_validator(mode="after")
    def _has_budget(self) -> ChoiceConfig:
        if (self.rule == "best_within_size") != (self.max_gb is not None):
            raise ValueError("max_gb goes with rule: best_within_size; give both or neither")
        return self


class SweepConfig(Schema):
    base: dict[str, Any]
    """A run's config (model, quantization, ...), or in YAML the path of one; the axes override it. What an axis sets may be missing."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Axis to values; every combination is a cell. An axis is a key of quantization, or any other as section.key."""
    cells: list[Settings] = Field(default_factory=list)
    """Cells beside those of the grid, each as axis to value."""
    exclude: list[Settings] = Field(default_factory=list)
    """Combinations of the grid that are left out: all those that agree with one of these."""
    mode: Literal["exact", "screening"] = "exact"
    """exact: every cell is a run of its own, with its checkpoint. screening: all cells from one pass through the original model, without
    checkpoints; good for a first choice and never published."""
    max_parallel: Positive | None = None
    """Cells at a time; null: as many as the devices, the cores and the planned memory allow."""
    threads: Positive | None = None
    """Threads of one cell; null: the cores of this machine over the cells at a time."""
    devices: list[str] | None = None
    """Numbers of GPUs, such as ["0", "1"], or ["cpu"]; null: all GPUs, or the CPU where there is none."""
    runner: Literal["local", "ray"] = "local"
    """Where cells run: workers on this machine, or a Ray cluster whose nodes share the paths of this one."""
    ray_address: str | None = None
    """Of the cluster, such as ray://HOST:10001; null: a cluster of this machine alone. Only with runner: ray."""
    limits: LimitsConfig = LimitsConfig()
    choose: ChoiceConfig = ChoiceConfig()
    dir: str | None = None
    """Folder of the sweep, with a folder for each cell; null: runs/<model>-sweep."""

    @field_validator("base", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return _base(value)

    @field_serializer("base")
    def _without_password(self, base: dict[str, Any]) -> dict[str, Any]:
        # as RunConfig does: dumps go into sweep.json and Prefect's pages; only the object itself is used to connect
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
                raise ValueError(f"{axis} cannot be an axis: it belongs to the sweep; set it in base, or dir for the folders")
        for axis in dict.fromkeys(axis for rule in self.exclude for axis in rule):
            if dotted(axis) not in {dotted(own) for own in self.grid}:
                raise ValueError(f"exclude: {axis} is no axis of the grid, so it leaves nothing out; axes are {', '.join(self.grid)}")
        if not all(isinstance(section, dict) for section in self.base.values() if section is not None):
            raise ValueError("base must hold sections with keys of their own, such as model: and quantization:")
        if self.ray_address and self.runner != "ray":
            raise ValueError("ray_address goes with runner: ray")
        if (self.base.get("output") or {}).get("dir"):
            raise ValueError("base.output.dir: cells have folders of their own; drop it and set dir, the folder of the sweep")
        found = self.expanded()
        if not found:
            raise ValueError("no cells: give a grid such as {bits: [3, 4]}, or cells, and exclude fewer")
        if all(cell.config is None for cell in found):
            raise ValueError(f"no cell is valid; the first, {found[0].name}: {found[0].error}")
        if self.runner == "ray" and (self.max_parallel or self.devices):
            raise ValueError(
                "max_parallel and devices are for this machine; Ray places the cells by `threads` and its GPUs: drop them, "
                "or set runner: local"
            )
        if self.runner == "ray" and self.mode == "screening":
            raise ValueError("mode: screening is one pass in one process; set runner: local")
        return self

    @property
    def folder(self) -> Path:
        """Of the sweep, with the default filled in."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        model = str((self.base.get("model") or {}).get("path", "model"))
        name = Path(model).resolve().name if Path(model).is_dir() else re.sub(r"[^\w.-]+", "-", model)
        return Path("runs") / f"{name.strip('.-') or 'model'}-sweep"

    def expanded(self) -> list[Cell]:
        """The cells: the grid's without the excluded ones, then the explicit ones; equal ones once."""
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
            return Cell(name, settings, None, f"model.device = {config.model.device}: a cell sees one GPU alone; set devices: ['{number}']")
        return Cell(name, settings, config, None)


@dataclass(frozen=True)
class Cell:
    """One combination; config is None where it is invalid, and error says why."""

    name: str
    settings: Settings
    config: RunConfig | None
    error: str | None


def dotted(axis: str) -> str:
    """`bits` as `quantization.bits`; a key with its section as it is."""
    return axis if "." in axis else f"quantization.{axis}"


def cell_name(settings: Settings) -> str:
    """A folder name that tells the settings: `bits=3_group_size=32`. Long values end in a digest."""
    parts = []
    for axis, value in sorted((dotted(axis), value) for axis, value in settings.items()):
        text = value if isinstance(value, str) else json.dumps(value)
        slug = re.sub(r"[^\w.+-]+", "-", text)
        if slug != text or len(slug) > 40:  # not the whole of it: told apart by a digest
            slug = f"{slug[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        parts.append(f"{axis.removeprefix('quantization.')}={slug}")
    return "_".join(parts)


def _agrees(cell: Settings, rule: Settings) -> bool:
    own = {dotted(axis): value for axis, value in cell.items()}
    return bool(rule) and all(dotted(axis) in own and own[dotted(axis)] == value for axis, value in rule.items())


def _base(value: Any) -> Any:
    """A run's YAML, where the path of one is given, without the folder of that run: cells have their own."""
    if not isinstance(value, str):
        return value
    base = load_yaml(value)
    return base | {"output": {key: kept for key, kept in (base.get("output") or {}).items() if key != "dir"}}


def load_sweep(path: str | Path, grid: dict[str, list[Any]], overrides: dict[str, Any]) -> SweepConfig:
    """A sweep from its YAML, or from a run's YAML and `grid`. Overrides: keys of the sweep, or of its base as section.key."""
    data = load_yaml(path)
    if "base" not in data:
        data = {"base": str(path)}
    data["base"], data["grid"] = _base(data["base"]), {**(data.get("grid") or {}), **grid}
    for key, value in overrides.items():
        room, _, leaf = key.partition(".")
        place = data if room in SweepConfig.model_fields else data["base"]
        if not isinstance(place, dict) or leaf and not isinstance(place.get(room) or {}, dict):
            raise InputError(f"{key}: {room} is not a section with keys of its own")
        place[room] = {**(place.get(room) or {}), leaf: value} if leaf else value
    try:
        return SweepConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`bits=3,4` as an axis and its YAML values."""
    axis, equals, values = text.partition("=")
    if not equals or not axis.strip() or not values.strip():
        raise InputError(f"--grid {text}: expected AXIS=VALUE,VALUE, such as bits=3,4 or calibration.samples=64,128")
    try:
        return axis.strip(), yaml.safe_load(values if values.lstrip().startswith("[") else f"[{values}]")
    except yaml.YAMLError as error:
        raise InputError(f"--grid {text}: the values are not valid YAML: write them as in bits=3,4") from error


def devices_of(config: SweepConfig) -> list[str]:
    """Numbers of the GPUs that cells may lease, or ["cpu"]."""
    if config.devices is not None:
        return config.devices
    wanted = {cell.config.model.device if cell.config else "auto" for cell in config.expanded()}
    import torch

    if wanted == {"cpu"} or not torch.cuda.is_available():
        return ["cpu"]
    return [str(index) for index in range(torch.cuda.device_count())]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
