"""RunConfig: one whole run as one frozen object, the same for the YAML, the command line, Prefect's parameter and MLflow.

A relative path of a model, a text or an output is relative to the working directory. Later versions add keys; none is renamed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_serializer, field_validator, model_validator

from gptq_core.config import QuantizeConfig, kernel_name
from gptq_core.errors import InputError
from gptq_core.schema import Schema, explain
from tasks.config.measures import Measures
from tasks.config.secrets import FORMS, is_reference, resolve

Positive = Annotated[int, Field(gt=0)]
Judged = Annotated[int, Field(ge=2)]
"""Length of an evaluation window: its first token has nothing to be predicted from."""


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value, re.ASCII):
        raise ValueError("must be auto, cpu, cuda or cuda:N, such as cuda:0")
    return value


Device = Annotated[str, AfterValidator(_known_device)]


class ModelConfig(Schema):
    path: str
    """Folder of a Hugging Face causal language model, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the main branch. Without meaning for a folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the blocks are forwarded; auto: float32 on the CPU, the one in which the model is stored on a GPU."""
    device: Device = "auto"
    """cpu, cuda or cuda:N; auto: cuda where there is one."""


class CalibrationConfig(Schema):
    samples: Positive = 128
    """Windows of text that the quantizer sees."""
    seqlen: Positive = 2048
    """Tokens in a window; cut to what the model allows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of windows."""


class EvaluationConfig(Schema):
    dataset: str | list[str] | list[list[int]] | None = None
    """Held-out text, as quantization.dataset; null: the end of the calibration text, kept apart from calibration."""
    seqlen: Judged = 2048
    """Tokens in a window; cut to what the model allows."""
    kl: bool = True
    """Also measure KL(original || quantized) per token in nats, and how often both prefer the same next token."""
    samples: Positive | None = None
    """At most this many windows; null: all of the text."""
    strict: bool = False
    """Refuse a run whose held-out text overlaps with its calibration windows; false: that is a note with the share."""
    measures: Measures = Field(default_factory=list)
    """What else is measured, on the checkpoint and on the original: perplexity of more texts, tasks of lm-eval. A name stands for the
    preset of configs/measures; a text file for its perplexity."""
    runner: Literal["torch", "gptqmodel", "vllm"] | None = None
    """Who runs the checkpoint: torch (this library), a kernel of gptqmodel (that of quantization.backend, or its torch kernel), or vllm,
    which runs the tasks alone. null: as quantization.backend says."""

    @property
    def has_tasks(self) -> bool:
        """Whether tasks are run, so that there is a recovery to set a limit on."""
        return any(measure.kind == "tasks" for measure in self.measures)


class OutputConfig(Schema):
    dir: str | None = None
    """Folder of the checkpoint; null: runs/<model>-w<bits, or the budget>g<group_size>. `<dir>.run.json` and `<dir>.work` lie beside it.
    {key} in it stands for 12 digits of what the work is known by (model, texts, settings): what changes gets a folder of its own."""
    overwrite: bool = False
    """Replace a checkpoint of another config that is already there; false: that is an error."""
    profile: Literal["mixed", "portable"] = "mixed"
    """portable: a config whose result vLLM, SGLang, transformers or GPTQModel will not load is an error; mixed: a note."""

    @field_validator("dir")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            name = Path(value).expanduser().name
        except RuntimeError as error:  # ~somebody who is not on this machine
            raise ValueError(f"{error}: give the whole path".replace("..:", ":")) from error
        if name in ("", ".."):
            raise ValueError("must name a folder of its own, such as runs/my-model-w4")
        return value


STORE = re.compile(r"sqlite:///.|https?://.|(postgresql|mysql|mssql)(\+\w+)?://.")
STORES = "sqlite:///FILE.db, http(s)://HOST:PORT, or postgresql://, mysql:// or mssql:// (also as DIALECT+DRIVER://)"


def without_password(text: str) -> str:
    """An address, or a message that holds one, with stars for its password."""
    text = re.sub(r"(://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


class TrackingConfig(Schema):
    uri: Annotated[str, Field(min_length=1)] = "sqlite:///mlflow.db"
    """MLflow tracking URI: sqlite:///FILE.db or http(s)://HOST:PORT; postgresql://, mysql:// and mssql:// need their drivers.
    One with a password: env:NAME or block:NAME, see tasks.config.secrets."""
    experiment: Annotated[str, Field(min_length=1)] = "gptq"
    """MLflow experiment; made where it does not exist."""
    outbox: Annotated[str, Field(min_length=1)] = "runs/outbox"
    """Folder for notes of what MLflow did not take, which `python -m flows track-pending` logs later."""

    @field_validator("uri")
    @classmethod
    def _known_store(cls, value: str) -> str:
        # now, not after hours: MLflow would look at it at the end of the run
        if not STORE.match(value) and not is_reference(value):
            raise ValueError(f"must be {STORES}, or {FORMS} that holds it")
        return value

    @property
    def address(self) -> str:
        """The URI itself, where `uri` only tells where it stands, and with the whole path of a database file: MLflow keeps its stores by
        their address, and would use that of an earlier working directory. InputError: nothing stands there."""
        found = resolve(self.uri)
        if not STORE.match(found):
            raise InputError(f"tracking.uri = {self.uri}: what stands there must be {STORES}")
        file = found.removeprefix("sqlite:///")
        return found if file == found else f"sqlite:///{Path(file).absolute()}"

    @field_serializer("uri")
    def _without_password(self, value: str) -> str:
        # dumps go into the run record, MLflow's parameters and Prefect's pages; only the object itself is used to connect
        return without_password(value)


LIMITS = ("max_perplexity_increase", "max_kl", "min_recovery", "max_gb", "max_fallback_layers")
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GateConfig(Schema):
    """Limits on a run; one that is null is not set. A run outside them keeps its checkpoint, exits 1 and is not registered."""

    max_perplexity_increase: Share | None = None
    """Quantized over original perplexity, minus one: 0.05 is five percent more."""
    max_kl: Above | None = None
    """KL(original || quantized) per token in nats."""
    min_recovery: Share | None = None
    """Score of a task, quantized over original, of the task that loses most; 1 is no loss."""
    max_gb: Above | None = None
    """Size of the checkpoint's tensor files in GB (1e9 bytes)."""
    max_fallback_layers: Annotated[int, Field(ge=0)] | None = None
    """Linears that were rounded to nearest (quantization.on_failure: round) or left dense (quantization.strict: false)."""
    measure: Literal["kl", "perplexity_increase"] = "kl"
    """What a registered version has to be lower in than the one that holds the alias."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$")] = "champion"
    """Alias in MLflow's registry; it moves to a version that passed and is better."""
    register_as: Annotated[str, Field(pattern=r"^[\w.-][\w. -]*$")] | None = None
    """Name in MLflow's model registry under which what passes becomes a version; null: nothing is registered."""

    @field_validator("alias")
    @classmethod
    def _no_version(cls, value: str) -> str:
        if re.fullmatch(r"latest|v\d+", value, re.IGNORECASE):
            raise ValueError("is MLflow's own word for a version: choose another, such as champion")
        return value

    @model_validator(mode="after")
    def _has_limit(self) -> GateConfig:
        if all(getattr(self, name) is None for name in LIMITS):
            raise ValueError(f"no limit is set: set one of {', '.join(LIMITS)}, or leave the gate out")
        return self


class NotifyConfig(Schema):
    """Who is told what came of a run, as JSON. A hook that fails costs a note and never the run."""

    command: Annotated[str, Field(min_length=1)] | None = None
    """Run by the shell, with the JSON on its stdin. Secrets as $NAME, which the shell takes from the environment."""
    webhook: str | None = None
    """http(s) URL that gets the JSON by POST. One that holds a secret: env:NAME or block:NAME, see tasks.config.secrets."""
    when: Annotated[list[Literal["passed", "failed", "done"]], Field(min_length=1)] = ["done"]
    """passed: the gate was passed; failed: the gate or the evaluation failed; done: at the end of every run with a checkpoint."""
    seconds: Above = 30.0
    """A hook that takes longer is given up."""

    @model_validator(mode="after")
    def _is_open(self) -> NotifyConfig:
        # here and not at the field: the message of a field would show its value
        if self.command is None and self.webhook is None:
            raise ValueError("nobody is told: set command or webhook, or leave notify out")
        if self.webhook is not None and not is_reference(self.webhook):
            url = urlsplit(self.webhook)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError(f"webhook must be http(s)://HOST/..., or {FORMS} that holds the URL")
            if _holds_secret(url):
                raise ValueError(f"webhook looks as if it held a secret, and a config is no place for one: give {FORMS} that holds the URL")
        return self


def _holds_secret(url: Any) -> bool:
    """A user, a query that names a token, or a part of the path as long as the keys of chat services."""
    named = any(re.search("token|key|secret|sig|pass|auth|code", name, re.IGNORECASE) for name, _ in parse_qsl(url.query, True))
    keys = re.findall(r"(?=[^/]*\d)(?=[^/]*[A-Za-z])[\w-]{20,}", url.path)
    return "@" in url.netloc or named or bool(keys)


class RunConfig(Schema):
    model: ModelConfig
    quantization: QuantizeConfig
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    tracking: TrackingConfig = TrackingConfig()
    gate: GateConfig | None = None
    notify: NotifyConfig | None = None

    @model_validator(mode="after")
    def _can_be_judged(self) -> RunConfig:
        gate = self.gate
        if gate and not self.evaluation.kl and (gate.max_kl is not None or gate.measure == "kl"):
            key = f"max_kl = {gate.max_kl:g}" if gate.max_kl is not None else "measure = 'kl'"
            raise ValueError(
                f"gate.{key} needs the KL: set evaluation.kl: true, or use max_perplexity_increase and measure: perplexity_increase"
            )
        if gate and gate.min_recovery is not None and not self.evaluation.has_tasks:
            raise ValueError(
                f"gate.min_recovery = {gate.min_recovery:g} needs the scores of tasks, and none are run: name some in "
                "evaluation.measures, such as [arc_easy], or use max_kl or max_perplexity_increase"
            )
        return self

    @model_validator(mode="after")
    def _has_text(self) -> RunConfig:
        if not self.quantization.dataset:
            raise ValueError("quantization.dataset is required: a text file (.txt, .jsonl, .parquet), wikitext2 or c4")
        if self.quantization.allocate and self.output.profile == "portable":
            raise ValueError(
                "output.profile = 'portable' excludes quantization.allocate: its widths stand in rules, which transformers "
                "does not read; set output.profile: mixed (with allocate.bits [4, 8] vLLM, SGLang and GPTQModel load it)"
            )
        return self

    @property
    def out(self) -> Path:
        """Folder of the checkpoint, with the default filled in."""
        if self.output.dir is not None:
            return Path(self.output.dir).expanduser()
        name = re.sub(r"[^\w.-]+", "-", Path(self.model.path).resolve().name if Path(self.model.path).is_dir() else self.model.path)
        return Path("runs") / f"{name.strip('.-') or 'model'}-{self.width}"

    @property
    def width(self) -> str:
        """Bits, or the budget of them, and group size, as names tell them: w4g128."""
        group = "row" if self.quantization.group_size == -1 else self.quantization.group_size
        width, wanted = self.quantization.bits, self.quantization.allocate
        if wanted:
            width = f"{wanted.budget_bpw:g}" if wanted.budget_bpw is not None else f"{wanted.budget_gb:g}gb-"
        return f"w{width}g{group}"

    @property
    def evaluation_backend(self) -> str | None:
        """Who runs the linears of the checkpoint when it is evaluated, as in load_quantized."""
        own, runner = self.quantization.backend, self.evaluation.runner
        if runner == "gptqmodel":
            return own if kernel_name(own) else "gptq_torch"
        return "torch" if runner == "torch" else own

    def to_yaml(self) -> str:
        """The expanded config; loading it gives an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Dotted keys to values, for tables and MLflow parameters. Sections that are not set are left out."""
        rows: dict[str, Any] = {}
        for room, values in self.model_dump(mode="json").items():
            if values is not None:
                _flatten(room, values, rows)
        return rows | {"output.dir": str(self.out)}


def _flatten(key: str, value: Any, rows: dict[str, Any]) -> None:
    """Add what `value` holds under dotted keys; text given in place is only counted, rules whose names are patterns stay one JSON."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"\w+", str(name)) for name in value):
        for name, item in value.items():
            _flatten(f"{key}.{name}", item, rows)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            _flatten(f"{key}.{index}", item, rows)
    elif isinstance(value, list) and key.endswith(".dataset"):
        rows[key] = f"{len(value)} given in the config"
    else:
        rows[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


OPTIONAL = tuple(room for room, field in RunConfig.model_fields.items() if field.default is None)
"""Sections that may be absent, `gate` and `notify`; the others have defaults or are required."""


def parse_setting(setting: str) -> tuple[str, Any]:
    """`key.path=value` as a dotted key and its YAML value."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {setting}: expected key.path=value, such as quantization.group_size=64")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: the value is not valid YAML ({_where(error)})") from error


def from_dict(data: dict[str, Any], overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from nested keys, with dotted `overrides` on top. Everything wrong is one InputError of one line."""
    # an empty section (`evaluation:` with all its keys commented out) means its defaults, and no gate or hooks at all
    data = {room: {} if values is None and room not in OPTIONAL else values for room, values in data.items()}
    for room in ("model", "quantization"):
        data.setdefault(room, {})
    for dotted, value in (overrides or {}).items():
        room, _, key = dotted.partition(".")
        if not key or "." in key:
            raise InputError(f"{dotted}: a key is written section.key, such as quantization.bits or model.path")
        section = {} if data.get(room) is None else data[room]
        if not isinstance(section, dict):
            raise InputError(f"{room} = {section!r}: must be a section with keys of its own")
        data[room] = {**section, key: value}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a YAML file, with dotted `overrides` on top."""
    return from_dict(load_yaml(path), overrides)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file. InputError: it cannot be read, or holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"config file {path} cannot be read: {reason}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not valid YAML ({_where(error)})") from error
    if not isinstance(data, dict):
        raise InputError(f"config file {path} must hold sections such as model: and quantization:")
    return {str(key): value for key, value in data.items()}


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "unreadable"
    return f"line {mark.line + 1}: {problem}" if mark else problem


def model_name(path: str) -> str:
    """The last part of a model's id or folder."""
    return Path(path).name or Path(path).resolve().name or "model"
