"""QuantizeConfig, the schema of a quantization.

Names, defaults and rules of the fields are those of Optimum's `GPTQQuantizer`, and the keys are those of the checkpoint's
`quantization_config`: nothing is renamed on the way to disk. Rules between fields stand in `QuantizeConfig._between_fields`.
The docstring of a field is its description in the JSON schema, from which config comments, command-line help and
docs/reference.md are made: its first sentence has to stand alone.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationError, field_validator, model_validator

from gptq_core.schema import Schema, explain

Bits = Literal[2, 3, 4, 8]
Format = Literal["gptq", "gptq_v2"]


KERNELS = (
    "gptq_torch",
    "gptq_torch_fused",
    "gptq_torch_int8",
    "gptq_torch_aten",
    "gptq_torch_cpu_avx512",
    "gptq_triton",
    "gptq_exllama_v2",
    "gptq_machete",
    "gptq_swordfish",
    "gptq_marlin",
)
"""GPTQModel's names for its kernels that can run a checkpoint."""


def kernel_name(backend: str | None) -> str | None:
    """GPTQModel's name of the kernel that `backend` means, or None for this library's own code: None, 'torch', and Optimum's 'auto'
    and 'auto_trainable', which leave the choice to the library. Raises ValueError for an unknown backend."""
    backend = backend and backend.lower()
    if backend in (None, "torch", "auto", "auto_trainable"):
        return None
    name = backend if backend.startswith("gptq_") else f"gptq_{backend}"
    if name not in KERNELS:
        near = difflib.get_close_matches(name, KERNELS, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{hint}known backends are torch (this library) and GPTQModel's {', '.join(KERNELS)}")
    return name


def _known_backend(backend: str | None) -> str | None:
    kernel_name(backend)
    return backend


Backend = Annotated[str | None, AfterValidator(_known_backend)]


def _damping(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    try:
        share = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share < 1:
        raise ValueError("must be a number above 0 and below 1, or 'auto'")
    return share


# the type that Prefect's form and the reference page show
Damping = Annotated[float | str, PlainValidator(_damping, json_schema_input_type=Annotated[float, Field(gt=0, lt=1)] | Literal["auto"])]


TUNED = {"static_groups": True, "scale_search": "weighted", "refit": True, "descent": 1}
BEST = TUNED | {"target_shift": 1.0, "residual_shift": 0.5}
MAX = BEST | {"descent": 2, "tuning_steps": 50}
RECIPES: dict[Any, dict[str, Any]] = {"classic": {}, "tuned": TUNED, "best": BEST, "max": MAX}
"""Fields that a recipe sets where the config does not; run records and MLflow get the expanded fields."""


RULE_KEYS = (
    "bits",
    "group_size",
    "sym",
    "damp_percent",
    "desc_act",
    "act_group_aware",
    "static_groups",
    "scale_search",
    "refit",
    "descent",
)
"""Keys that a rule of `dynamic` may change."""


class Allocate(Schema):
    """Choice of a width for every layer, for the least predicted KL under a budget."""

    bits: list[Bits]
    """Widths to choose from: at least two of 2, 3, 4 and 8."""
    budget_bpw: float | None = None
    """Budget in bits per weight, averaged over all quantized layers: 3.0 is the size of 3 bits everywhere. Scales and zero points come
    on top."""
    budget_gb: float | None = None
    """Budget in GB (1e9 bytes) on disk for the quantized layers, with their scales, zero points and g_idx. Set exactly one of the two
    budgets."""

    @field_validator("bits")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        if len(set(value)) < 2:
            raise ValueError("needs at least two different widths, such as [2, 3, 4, 8]")
        return sorted(set(value))

    @model_validator(mode="after")
    def _one_budget(self) -> Allocate:
        if (self.budget_bpw is None) == (self.budget_gb is None):
            raise ValueError("set exactly one budget: budget_bpw (bits per weight, such as 3.5) or budget_gb (size in 1e9 bytes)")
        if self.budget_bpw is not None and not self.bits[0] <= self.budget_bpw <= self.bits[-1]:
            raise ValueError(
                f"budget_bpw = {self.budget_bpw:g}: must be {self.bits[0]} to {self.bits[-1]}, the range of the widths {self.bits}"
            )
        return self


class QuantizeConfig(Schema):
    """Quantization of the layers. Keys and defaults are Optimum's; `recipe` sets further ones."""

    bits: Bits
    """Bits per weight: 2, 3, 4 or 8."""
    dataset: str | list[str] | list[list[int]] | None = None
    """Calibration text: a .txt, .jsonl or .parquet file, wikitext2 or c4 from the hub, a list of texts, or a list of rows of token ids.
    A run needs one."""
    group_size: Annotated[int, Field(strict=True)] = 128
    """Input columns that share one scale; -1: one scale for the whole row. Must divide the input size of every quantized layer. Smaller
    groups are more accurate and larger on disk; 32, 64 and 128 load everywhere."""
    damp_percent: Damping = 0.1
    """Damping: share of mean(diag H) added to the diagonal of the Hessian H, above 0 and below 1. auto: half the input columns of the
    layer divided by its calibration tokens, kept between 0.005 and 0.9. Raise it if a Hessian cannot be factored."""
    desc_act: bool = False
    """Quantize columns in order of decreasing diag(H) and form the groups in that order. The order is stored as a non-trivial g_idx,
    which not every program loads; `python -m flows plan` lists them. Excludes static_groups and act_group_aware."""
    act_group_aware: bool = True
    """Quantize columns in order of decreasing diag(H) as far as g_idx stays trivial. With static_groups that is the exact order;
    without, whole groups are ordered, and the columns inside each group. Default: true, or false where desc_act is true."""
    static_groups: bool = False
    """Fit all scales on the target weights before any column is quantized. false: fit each group when its turn comes, on weights that
    already compensate earlier columns. Excludes desc_act."""
    sym: bool = True
    """Symmetric quantization, with the zero point fixed at 2^(bits-1); false: an integer zero point fitted for each group, for which
    gptq_v2 is the better format."""
    true_sequential: bool = True
    """Calibrate each layer of a block on inputs from the already quantized earlier layers of that block; false: on inputs from the
    original layers."""
    modules_in_block_to_quantize: list[list[str]] | None = None
    """Layers of each block to quantize, such as [["self_attn.q_proj"], ["mlp.up_proj"]]; null: all. The inner lists are Optimum's order
    of work; they are accepted and joined, and the engine finds the order itself."""
    lm_head: bool = False
    """Also quantize the output head. Refused for a model whose head is tied to its embeddings."""
    dynamic: dict[str, dict[str, Any]] | None = None
    """Rules for single layers in GPTQModel's notation: a regular expression, matched from the start of the full layer name, with the
    keys to change; "-:" before the expression and {} after it leave the layers unquantized. The first matching rule decides. Example:
    {'.*\\.down_proj': {bits: 8}, '-:model\\.layers\\.0\\.': {}}."""
    allocate: Allocate | None = None
    """Choose the width of every layer for the least predicted KL under a size budget; the choice is written as rules of dynamic. bits
    is then the width of layers that no rule names. Example: {bits: [2, 3, 4, 8], budget_bpw: 3.5}."""
    format: Format = "gptq"
    """Layout of the zero points on disk: gptq stores zero - 1, gptq_v2 the zero itself. With sym: true gptq loads everywhere; with
    sym: false choose gptq_v2."""
    backend: Backend = None
    """Backend for the quantized layers after loading, also in evaluation: torch, or a GPTQModel kernel such as gptq_marlin. null:
    torch, this library's own code. A kernel needs the package gptqmodel (pip install 'gptq-pipeline[kernels]')."""
    scale_search: Literal["min_max", "weighted"] = "min_max"
    """Search of the scales: min_max takes the extremes of each group; weighted searches the least error weighted by diag(H), where
    symmetric scales may become negative."""
    refit: bool = False
    """Move every scale to its best value, given the codes and all other scales, once all columns are quantized."""
    descent: Annotated[int, Field(ge=0)] = 0
    """Passes of coordinate descent once all columns are quantized; 0: none. A pass moves every code, and with refit every scale, to its
    best value given all others."""
    target_shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the target weights of a layer compensate for the change that earlier quantized layers caused in its inputs, from 0 (not)
    to 1 (fully). Above 0 the original model runs beside the quantized one: a second forward."""
    residual_shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far layers that write to the residual stream also compensate for its error, from 0 (not) to 1 (fully). Needs target_shift
    above 0."""
    shift_damp_percent: Damping = "auto"
    """Damping of the Hessian, as damp_percent, when target weights are computed for target_shift. auto: the input columns of the layer
    divided by its calibration tokens, kept between 0.005 and 0.9. Without effect where target_shift is 0."""
    tuning_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of gradient descent on the codes and scales of a block, towards the outputs of the original block; 0: none. A block that
    does not improve on held-out windows stays as it was. Needs target_shift above 0 and two calibration windows or more."""
    recipe: Literal["classic", "tuned", "best", "max"] = "tuned"
    """Named set of defaults for other keys of this section; a key that the config sets wins. classic: the paper's method, option for
    option as in Optimum and GPTQModel. tuned: static groups, searched and refitted scales, coordinate descent. best: also shifted
    targets, for a second forward. max: also block tuning. All write the same kind of files."""
    strict: bool = True
    """Refuse a layer that cannot be packed because of its size. false: leave it unquantized and report it."""
    on_failure: Literal["error", "round"] = "error"
    """Action for a layer whose Hessian cannot be factored: error stops the run, round rounds the layer to nearest and reports it."""

    @field_validator("group_size")
    @classmethod
    def _positive_or_row(cls, value: int) -> int:
        if value != -1 and value <= 0:
            raise ValueError("must be a positive number of columns (32, 64 and 128 load everywhere), or -1 for the whole row")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_give_way(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        recipe = data.get("recipe", cls.model_fields["recipe"].default)
        data = _beside(RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}, data) | data
        if _true(data.get("desc_act")):
            data.setdefault("act_group_aware", False)
        return data

    @model_validator(mode="after")
    def _between_fields(self) -> QuantizeConfig:
        if self.act_group_aware and self.desc_act:
            raise ValueError("act_group_aware: true excludes desc_act: true; remove one of them")
        if self.static_groups and self.desc_act:
            raise ValueError(
                "static_groups: true excludes desc_act: true; set act_group_aware: true instead, which processes columns in the same order "
                "and writes a g_idx that every program loads"
            )
        if self.residual_shift and not self.target_shift:
            raise ValueError(f"residual_shift = {self.residual_shift:g} needs target_shift above 0")
        if self.tuning_steps and not self.target_shift:
            raise ValueError(
                f"tuning_steps = {self.tuning_steps} needs target_shift above 0: only then the original model runs beside the quantized one"
            )
        if self.allocate and self.bits not in self.allocate.bits:
            raise ValueError(
                f"bits = {self.bits}: must be one of allocate.bits {self.allocate.bits}: it is the width of layers that no rule names"
            )
        positive = [rule for rule in self.dynamic or {} if not rule.startswith("-:")]
        if self.allocate and positive:
            raise ValueError(
                f"allocate writes the rules of dynamic itself and allows only '-:' rules beside them: remove {positive[0]!r} or allocate"
            )
        return self

    @model_validator(mode="after")
    def _rules_hold(self) -> QuantizeConfig:
        for rule, changes in (self.dynamic or {}).items():
            try:
                re.compile(expression(rule))
            except re.error as error:
                raise ValueError(f"dynamic: {rule!r} is not a regular expression ({error})") from error
            if rule.startswith("-:") and changes:
                raise ValueError(f"dynamic: {rule!r} leaves layers unquantized, so it takes no keys: write {{}}")
            unknown = [key for key in changes if key not in RULE_KEYS]
            if unknown:
                raise ValueError(f"dynamic: {rule!r} cannot set {unknown[0]!r}; it can set {', '.join(RULE_KEYS)}")
            try:
                changed = self._changed(changes)
            except ValidationError as error:
                raise ValueError(f"dynamic: {rule!r}: {explain(error)}") from error
            changes.update({key: getattr(changed, key) for key in changes})  # 8, not 8.0; false, not "false": it goes to disk
        return self

    def _changed(self, changes: dict[str, Any]) -> QuantizeConfig:
        """This config with the changes of a rule. Depends on values alone, so that equal configs give equal results: defaults that gave
        way to desc_act return where a rule sets desc_act: false."""
        own = self.model_dump(exclude={"dynamic", "allocate"})
        if "desc_act" in changes:
            own = _beside(own, own)
        return QuantizeConfig.model_validate(_beside(own, changes) | changes)

    def rule_for(self, name: str) -> str | None:
        """The rule of `dynamic` that decides about the layer with this full name, or None."""
        return next((rule for rule in self.dynamic or {} if re.match(expression(rule), name)), None)

    def for_linear(self, name: str) -> QuantizeConfig | None:
        """The config of the layer with this full name, without `dynamic` and `allocate`; None if a rule leaves it unquantized."""
        rule = self.rule_for(name)
        if rule is None:
            return self.model_copy(update={"dynamic": None, "allocate": None})
        return None if rule.startswith("-:") else self._changed((self.dynamic or {})[rule])

    @property
    def modules(self) -> list[str] | None:
        """The names in modules_in_block_to_quantize as one list."""
        names = self.modules_in_block_to_quantize
        return None if names is None else [name for group in names for name in group]

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def smallest_zero(self) -> int:
        """Smallest zero point that `format` can store: gptq stores zero - 1, and for 0 that would borrow from the neighbouring code."""
        return 1 if self.format == "gptq" else 0

    def groups_of(self, in_features: int) -> int:
        """Number of groups along a row of `in_features` columns."""
        return 1 if self.group_size == -1 else in_features // self.group_size


def _beside(defaults: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The defaults that do not contradict the chosen values."""
    excluded = {
        "static_groups": _true(chosen.get("desc_act")),
        "act_group_aware": _true(chosen.get("desc_act")),
        "residual_shift": chosen.get("target_shift", 1) == 0,
        "tuning_steps": chosen.get("target_shift", 1) == 0,
    }
    return {key: value for key, value in defaults.items() if not excluded.get(key)}


def _true(value: Any) -> bool:
    """Whether a bool field would read this raw value as true; "true" and 1 are."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def expression(rule: str) -> str:
    """The regular expression of a `dynamic` rule, without its sign."""
    return rule[2:] if rule.startswith(("-:", "+:")) else rule
