"""RunConfig, the schema of a run: the same object for YAML, command line, Prefect parameter and MLflow.

Paths of models, texts and outputs are relative to the working directory. Later versions add keys; none is renamed.
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
"""Length of an evaluation window: its first token cannot be predicted, so one token is too few."""


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value, re.ASCII):
        raise ValueError("must be auto, cpu, cuda or cuda:N, such as cuda:0")
    return value


Device = Annotated[str, AfterValidator(_known_device)]


class ModelConfig(Schema):
    path: str
    """Folder of a Hugging Face causal language model, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the main branch. Ignored for a folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the forward passes while quantizing: auto, float32, bfloat16 or float16. auto: on a GPU the type in which the model
    is stored; on a CPU bfloat16 if the model is stored in it and the processor has instructions for it, else float32. A model that
    names no type counts as stored in bfloat16. Evaluation does not follow this key: it runs in float32 on a CPU and in the stored type
    on a GPU; GPTQModel's kernels and vLLM choose their own."""
    device: Device = "auto"
    """Device to compute on: cpu, cuda, cuda:N or auto, which is the first GPU, or the CPU where there is none."""


class CalibrationConfig(Schema):
    samples: Positive = 128
    """Number of calibration windows, drawn at random from the text; all of them where the text has fewer. The activations of all
    windows at one block are in memory together: lower it where memory does not suffice."""
    seqlen: Positive = 2048
    """Tokens per window; cut to the limit of the model."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed for the choice of calibration windows."""


class EvaluationConfig(Schema):
    dataset: str | list[str] | list[list[int]] | None = None
    """Held-out text, in any form of quantization.dataset; null: the end of the calibration text, which calibration then does not
    see."""
    seqlen: Judged = 2048
    """Tokens per window; cut to the limit of the model."""
    kl: bool = True
    """Also measure KL(original || quantized) per token in nats, top-1 agreement and flips."""
    samples: Positive | None = None
    """Maximum number of windows, spread evenly over the text; null: all."""
    strict: bool = False
    """Refuse a run whose held-out text overlaps its calibration windows. false: add a note with the share."""
    measures: Measures = Field(default_factory=list)
    """Further measures of checkpoint and original: names of presets in configs/measures such as [wikitext2, arc_easy], text files such
    as my.txt for their perplexity, or measures in place such as {kind: tasks, tasks: [mine], include: FOLDER, limit: 100}."""
    runner: Literal["torch", "gptqmodel", "vllm"] | None = None
    """Backend of the evaluation: torch (this library), gptqmodel (the kernel of quantization.backend, or its torch kernel) or vllm
    (tasks only). null: as quantization.backend says."""

    @property
    def has_tasks(self) -> bool:
        """Whether tasks are run; only then there is a recovery."""
        return any(measure.kind == "tasks" for measure in self.measures)


class OutputConfig(Schema):
    dir: str | None = None
    """Folder of the checkpoint; null: runs/<model>-w<bits>g<group_size>. With quantization.allocate the budget stands for the bits.
    {key} in it becomes 12 hex digits that identify model, calibration text, settings and code: what has changed gets a folder of its
    own. Record, report and work files lie beside it: <dir>.run.json, <dir>.report.html, <dir>.work."""
    overwrite: bool = False
    """Replace a checkpoint of another config that is already there. false: that is an error."""
    profile: Literal["mixed", "portable"] = "mixed"
    """Treatment of programs that will not load the result (vLLM, SGLang, transformers, GPTQModel): mixed notes them, portable refuses
    the config before any work."""

    @field_validator("dir")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            name = Path(value).expanduser().name
        except RuntimeError as error:  # ~NAME without such a user
            raise ValueError(f"{error}: give the full path".replace("..:", ":")) from error
        if name in ("", ".."):
            raise ValueError("must name a folder of its own, such as runs/my-model-w4")
        return value


STORE = re.compile(r"sqlite:///.|https?://.|(postgresql|mysql|mssql)(\+\w+)?://.")
STORES = "sqlite:///FILE.db, http(s)://HOST:PORT, or postgresql://, mysql:// or mssql:// (also as DIALECT+DRIVER://)"


def without_password(text: str) -> str:
    """Replace passwords and tokens in an address, or in a message that holds one, by stars."""
    text = re.sub(r"(://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


class TrackingConfig(Schema):
    uri: Annotated[str, Field(min_length=1)] = "sqlite:///mlflow.db"
    """MLflow tracking URI: sqlite:///FILE.db, http(s)://HOST:PORT, or postgresql://, mysql:// or mssql:// with the driver installed.
    Give one that holds a password as env:NAME, an environment variable, or block:NAME, a Prefect Secret block."""
    experiment: Annotated[str, Field(min_length=1)] = "gptq"
    """MLflow experiment; created if it does not exist."""
    outbox: Annotated[str, Field(min_length=1)] = "runs/outbox"
    """Folder for notes of what MLflow did not take; `python -m flows track-pending` logs it later."""

    @field_validator("uri")
    @classmethod
    def _known_store(cls, value: str) -> str:
        # at the start: MLflow would refuse it only at the end of the run
        if not STORE.match(value) and not is_reference(value):
            raise ValueError(f"must be {STORES}, or {FORMS} that holds one")
        return value

    @property
    def address(self) -> str:
        """The URI with its reference resolved and with the absolute path of a database file: MLflow caches stores by address and would
        otherwise write to the file of an earlier working directory. Raises InputError for a reference that holds no URI."""
        found = resolve(self.uri)
        if not STORE.match(found):
            raise InputError(f"tracking.uri = {self.uri}: its value must be {STORES}")
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
    """Limits that a run must keep."""

    max_perplexity_increase: Share | None = None
    """Largest allowed increase of perplexity, relative to the original: 0.05 is 5%."""
    max_kl: Above | None = None
    """Largest allowed KL(original || quantized) per token in nats. Needs evaluation.kl: true."""
    min_recovery: Share | None = None
    """Smallest allowed ratio of scores, quantized over original, of the task that loses most; 1: no loss. Needs tasks in
    evaluation.measures."""
    max_gb: Above | None = None
    """Largest allowed size of the checkpoint's tensor files in GB (1e9 bytes)."""
    max_fallback_layers: Annotated[int, Field(ge=0)] | None = None
    """Largest allowed number of layers rounded to nearest (quantization.on_failure: round) or left unquantized (quantization.strict:
    false)."""
    measure: Literal["kl", "perplexity_increase"] = "kl"
    """Number that must be lower than that of the registered version which holds the alias: kl or perplexity_increase."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$")] = "champion"
    """Alias in MLflow's registry; it moves to a version that passed the gate and is better on the same text."""
    register_as: Annotated[str, Field(pattern=r"^[\w.-][\w. -]*$")] | None = None
    """Name in MLflow's model registry under which a run that passes becomes a version; null: nothing is registered."""

    @field_validator("alias")
    @classmethod
    def _no_version(cls, value: str) -> str:
        if re.fullmatch(r"latest|v\d+", value, re.IGNORECASE):
            raise ValueError("is a name that MLflow reserves for versions: choose another, such as champion")
        return value

    @model_validator(mode="after")
    def _has_limit(self) -> GateConfig:
        if all(getattr(self, name) is None for name in LIMITS):
            raise ValueError(f"no limit is set: set one of {', '.join(LIMITS)}, or remove the gate")
        return self


class NotifyConfig(Schema):
    """Hooks that receive the outcome of a run."""

    command: Annotated[str, Field(min_length=1)] | None = None
    """Shell command that receives the JSON on stdin; null: none. Refer to secrets as $NAME: the shell takes them from the
    environment."""
    webhook: str | None = None
    """http(s) URL that receives the JSON by POST; null: none. Give one that holds a secret as env:NAME, an environment variable, or
    block:NAME, a Prefect Secret block."""
    when: Annotated[list[Literal["passed", "failed", "done"]], Field(min_length=1)] = ["done"]
    """Events to report: passed (the gate passed), failed (the gate or the evaluation failed), done (any run with a checkpoint)."""
    seconds: Above = 30.0
    """Timeout of a hook in seconds."""

    @model_validator(mode="after")
    def _is_open(self) -> NotifyConfig:
        # here and not at the field: the error of a field would show the value, which may be a secret
        if self.command is None and self.webhook is None:
            raise ValueError("no target is set: set command or webhook, or remove the section")
        if self.webhook is not None and not is_reference(self.webhook):
            url = urlsplit(self.webhook)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError(f"webhook must be http(s)://HOST/..., or {FORMS} that holds the URL")
            if _holds_secret(url):
                raise ValueError(f"webhook seems to contain a secret, which must not be in a config: give {FORMS} that holds the URL")
        return self


def _holds_secret(url: Any) -> bool:
    """Whether a URL has a user, a query parameter named like a token, or a path segment like the keys of chat services."""
    named = any(re.search("token|key|secret|sig|pass|auth|code", name, re.IGNORECASE) for name, _ in parse_qsl(url.query, True))
    keys = re.findall(r"(?=[^/]*\d)(?=[^/]*[A-Za-z])[\w-]{20,}", url.path)
    return "@" in url.netloc or named or bool(keys)


class RunConfig(Schema):
    """A run: model, quantization, texts, output, tracking, gate and hooks."""

    model: ModelConfig
    """Model to quantize."""
    quantization: QuantizeConfig
    """Quantization of the layers."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Windows of the calibration text."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation of the checkpoint against the original model."""
    output: OutputConfig = OutputConfig()
    """Where the checkpoint is written."""
    tracking: TrackingConfig = TrackingConfig()
    """Where MLflow records the run."""
    gate: GateConfig | None = None
    """Limits that the run must keep; null: no gate. A limit that is null is not set. A run outside them keeps its checkpoint, exits
    with code 1 and is not registered."""
    notify: NotifyConfig | None = None
    """Hooks that receive the outcome of the run as JSON; null: none. A hook that fails adds a note to the run and never fails it."""

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
                f"gate.min_recovery = {gate.min_recovery:g} needs task scores: name tasks in evaluation.measures, such as [arc_easy], "
                "or use max_kl or max_perplexity_increase"
            )
        return self

    @model_validator(mode="after")
    def _has_text(self) -> RunConfig:
        if not self.quantization.dataset:
            raise ValueError("quantization.dataset is required: a text file (.txt, .jsonl, .parquet), wikitext2 or c4")
        if self.quantization.allocate and self.output.profile == "portable":
            raise ValueError(
                "output.profile = 'portable' excludes quantization.allocate: it writes rules, which transformers does not read; "
                "set output.profile: mixed (with allocate.bits [4, 8] vLLM, SGLang and GPTQModel load the result)"
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
        """Bits, or their budget, and group size as in names: w4g128."""
        group = "row" if self.quantization.group_size == -1 else self.quantization.group_size
        width, wanted = str(self.quantization.bits), self.quantization.allocate
        if wanted:
            width = f"{wanted.budget_bpw:g}" if wanted.budget_bpw is not None else f"{wanted.budget_gb:g}gb-"
        return f"w{width}g{group}"

    @property
    def evaluation_backend(self) -> str | None:
        """The `backend` with which load_quantized opens the checkpoint for evaluation."""
        own, runner = self.quantization.backend, self.evaluation.runner
        if runner == "gptqmodel":
            return own if kernel_name(own) else "gptq_torch"
        return "torch" if runner == "torch" else own

    def to_yaml(self) -> str:
        """The config with all keys as YAML; loading it gives an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Values by dotted key, for tables and MLflow parameters, without sections that are not set."""
        rows: dict[str, Any] = {}
        for room, values in self.model_dump(mode="json").items():
            if values is not None:
                _flatten(room, values, rows)
        return rows | {"output.dir": str(self.out)}


def _flatten(key: str, value: Any, rows: dict[str, Any]) -> None:
    """Add the contents of `value` to `rows` under dotted keys. Texts in place are only counted; rules named by patterns stay one JSON."""
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
"""Sections that may be null, `gate` and `notify`; the others have defaults or are required."""


def from_dict(data: dict[str, Any], overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from nested keys, with dotted `overrides` on top. Raises one InputError of one line for all problems."""
    # an empty section (`evaluation:` with all its keys commented out) means its defaults, and no gate or hooks at all
    data = {room: {} if values is None and room not in OPTIONAL else values for room, values in data.items()}
    for room in ("model", "quantization"):
        data.setdefault(room, {})
    for dotted, value in (overrides or {}).items():
        room, _, key = dotted.partition(".")
        if not key or "." in key:
            raise InputError(f"{dotted}: must be section.key, such as quantization.bits or model.path")
        section = {} if data.get(room) is None else data[room]
        if not isinstance(section, dict):
            raise InputError(f"{room} = {section!r}: must be a section that holds keys")
        data[room] = {**section, key: value}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a YAML file, with dotted `overrides` on top."""
    return from_dict(load_yaml(path), overrides)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises InputError if it cannot be read or holds anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"config file {path} cannot be read: {reason}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not valid YAML ({where(error)})") from error
    if not isinstance(data, dict):
        raise InputError(f"config file {path}: must hold sections such as model: and quantization:")
    return {str(key): value for key, value in data.items()}


def where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "unreadable"
    return f"line {mark.line + 1}: {problem}" if mark else problem


def model_name(path: str) -> str:
    """The last part of a model's id or folder."""
    return Path(path).name or Path(path).resolve().name or "model"
