"""QuantizeConfig: the one frozen schema of a quantization.

Field names, defaults and rules are those of Optimum's `GPTQQuantizer`, and the keys are the keys of the checkpoint's
`quantization_config`: nothing is renamed on the way to disk. A config is validated when it is made; an object that exists
is valid. Rules between fields stand in `QuantizeConfig._between_fields` and nowhere else.
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
"""GPTQModel's kernels that can run a checkpoint, by their names there."""


def kernel_name(backend: str | None) -> str | None:
    """The kernel in GPTQModel that a `backend` names; None for this library's own path: None, 'torch', or Optimum's 'auto' and
    'auto_trainable', which leave the choice to the library. ValueError: neither."""
    backend = backend and backend.lower()
    if backend in (None, "torch", "auto", "auto_trainable"):
        return None
    name = backend if backend.startswith("gptq_") else f"gptq_{backend}"
    if name not in KERNELS:
        near = difflib.get_close_matches(name, KERNELS, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{hint}known are torch (this library) and GPTQModel's {', '.join(KERNELS)}")
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


Damping = Annotated[float | str, PlainValidator(_damping)]


TUNED = {"static_groups": True, "scale_search": "weighted", "refit": True, "descent": 1}
BEST = TUNED | {"target_shift": 1.0, "residual_shift": 0.5}
MAX = BEST | {"descent": 2, "tuning_steps": 50}
RECIPES: dict[Any, dict[str, Any]] = {"classic": {}, "tuned": TUNED, "best": BEST, "max": MAX}
"""What a recipe sets where the config says nothing; the expanded fields are what is logged."""


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
"""What a rule of `dynamic` may set for the linears that it matches."""


class Allocate(Schema):
    """Widths chosen linear by linear, for the least predicted KL under a budget."""

    bits: list[Bits]
    """Widths to choose from, at least two."""
    budget_bpw: float | None = None
    """Bits a weight on average, over all quantized linears: 3.0 is the size of 3 bits everywhere. Scales and zeros come on top."""
    budget_gb: float | None = None
    """Instead: size of the quantized linears on disk in 1e9 bytes, scales, zeros and g_idx included."""

    @field_validator("bits")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        if len(set(value)) < 2:
            raise ValueError("needs two different widths at least, such as [2, 3, 4, 8]")
        return sorted(set(value))

    @model_validator(mode="after")
    def _one_budget(self) -> Allocate:
        if (self.budget_bpw is None) == (self.budget_gb is None):
            raise ValueError("one budget is needed: budget_bpw (bits a weight, such as 3.5) or budget_gb (size in 1e9 bytes)")
        if self.budget_bpw is not None and not self.bits[0] <= self.budget_bpw <= self.bits[-1]:
            raise ValueError(f"budget_bpw = {self.budget_bpw:g}: the widths {self.bits} allow {self.bits[0]} to {self.bits[-1]}")
        return self


class QuantizeConfig(Schema):
    """What is computed for every quantized linear. Defaults are Optimum's."""

    bits: Bits
    """Bits a weight: 2, 3, 4 or 8."""
    dataset: str | list[str] | list[list[int]] | None = None
    """Calibration text: a file (.txt, .jsonl, .parquet), a named hub dataset (wikitext2, c4), texts, or rows of token ids."""
    group_size: Annotated[int, Field(strict=True)] = 128
    """Input columns that share a scale; -1: the whole row. Must divide the input size of every quantized linear."""
    damp_percent: Damping = 0.1
    """Share of mean(diag H) added to the diagonal of H. auto: half the input columns of the layer over the tokens that it saw."""
    desc_act: bool = False
    """Process columns by decreasing diag(H) and let groups follow that order (a non-trivial g_idx on disk)."""
    act_group_aware: bool = True
    """Process columns by decreasing diag(H) as far as g_idx stays trivial: with static_groups in that very order, without them whole
    groups, and the columns inside each. Gives way to desc_act."""
    static_groups: bool = False
    """Fit all scales on the target weights before the sweep, instead of group by group on the conditional targets."""
    sym: bool = True
    """Zero point fixed at 2^(bits-1). False: a fitted integer zero point a group."""
    true_sequential: bool = True
    """Layers of a block see the already quantized earlier layers of the same block. False: all see the original ones."""
    modules_in_block_to_quantize: list[list[str]] | None = None
    """Names of the linears of a block that are quantized, such as [["self_attn.q_proj"], ["mlp.up_proj"]]; null: all. The inner
    lists are Optimum's order of work and only joined here: the walk finds the order itself."""
    lm_head: bool = False
    """Also quantize the output head. Only for a model whose head is not tied to its embeddings."""
    dynamic: dict[str, dict[str, Any]] | None = None
    """Rules for single linears, in GPTQModel's notation: a regular expression that is matched from the start of the full name, with
    the keys to change there, such as {"bits": 8}; "-:expression" with {} leaves them unquantized. The first rule that matches decides."""
    allocate: Allocate | None = None
    """Choose the width of every linear, fused ones alike, for the least predicted KL under a budget; written as rules of `dynamic`.
    `bits` is then the width of the linears that no rule names."""
    format: Format = "gptq"
    """Layout of the zeros on disk: 'gptq' stores zero - 1, 'gptq_v2' the zero itself."""
    backend: Backend = None
    """Who runs the quantized linears when the checkpoint is loaded, for evaluation too. None or 'torch': this library, in plain torch;
    gptq_torch, gptq_marlin, … (or marlin, …): GPTQModel's kernel of that name, where that package is installed."""
    scale_search: Literal["min_max", "weighted"] = "min_max"
    """Scales from the extremes of a group, or searched for the least error weighted by diag(H); symmetric ones may be negative."""
    refit: bool = False
    """After the sweep, move every scale to its best value given the codes and all other scales."""
    descent: Annotated[int, Field(ge=0)] = 0
    """Passes of coordinate descent after the sweep: every code to its best value given all others, and every scale with refit."""
    target_shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of what the quantized layers before have changed in a layer's inputs that its target weights make up for; above 0 the
    original model runs beside the quantized one."""
    residual_shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """With target_shift: share of the error that stands in the residual stream that the layers which write to it make up for."""
    shift_damp_percent: Damping = "auto"
    """Share of mean(diag H) added to the diagonal of H when targets are shifted. auto: the input columns over the tokens."""
    tuning_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of gradient descent on the codes and scales of a block, against the outputs of the original block."""
    recipe: Literal["classic", "tuned", "best", "max"] = "tuned"
    """A named set of defaults for the fields above. classic: the paper's method, option for option as in Optimum and GPTQModel.
    tuned: static groups, searched and refitted scales, descent. best: also shifted targets, for a second forward. max: also block
    tuning. All write the same kind of files."""
    strict: bool = True
    """A linear that cannot be packed (size not divisible) is an error. False: it is left in its dtype and reported."""
    on_failure: Literal["error", "round"] = "error"
    """A Hessian that cannot be factored is an error, or the layer is rounded to nearest; counted and reported."""

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
            raise ValueError("act_group_aware: true works only with desc_act: false; leave one of them out")
        if self.static_groups and self.desc_act:
            raise ValueError(
                "static_groups: true excludes desc_act: true; static groups take act_group_aware: true instead, "
                "the same order with a g_idx that every consumer loads"
            )
        if self.residual_shift and not self.target_shift:
            raise ValueError("residual_shift works only with target_shift above 0")
        if self.tuning_steps and not self.target_shift:
            raise ValueError(
                "tuning_steps works only with target_shift above 0, for which the original model runs beside the quantized one"
            )
        if self.allocate and self.bits not in self.allocate.bits:
            raise ValueError(f"bits = {self.bits}: must be one of allocate.bits {self.allocate.bits}, it is where no rule differs")
        positive = [rule for rule in self.dynamic or {} if not rule.startswith("-:")]
        if self.allocate and positive:
            raise ValueError(f"allocate writes the rules itself, so of dynamic it takes only '-:' ones: drop {positive[0]!r} or allocate")
        return self

    @model_validator(mode="after")
    def _rules_hold(self) -> QuantizeConfig:
        for rule, changes in (self.dynamic or {}).items():
            try:
                re.compile(expression(rule))
            except re.error as error:
                raise ValueError(f"dynamic: {rule!r} is not a regular expression ({error})") from error
            if rule.startswith("-:") and changes:
                raise ValueError(f"dynamic: {rule!r} leaves linears out, so it takes no keys; write {{}}")
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
        """With a rule's changes, by values alone: equal configs give equal ones. What gave way to desc_act comes back without it."""
        own = self.model_dump(exclude={"dynamic", "allocate"})
        if "desc_act" in changes:
            own = _beside(own, own)
        return QuantizeConfig.model_validate(_beside(own, changes) | changes)

    def rule_for(self, name: str) -> str | None:
        """The rule of `dynamic` that decides about the linear of this full name."""
        return next((rule for rule in self.dynamic or {} if re.match(expression(rule), name)), None)

    def for_linear(self, name: str) -> QuantizeConfig | None:
        """The config of the linear of this full name, without `dynamic` and `allocate`; None where a rule leaves it out."""
        rule = self.rule_for(name)
        if rule is None:
            return self.model_copy(update={"dynamic": None, "allocate": None})
        return None if rule.startswith("-:") else self._changed((self.dynamic or {})[rule])

    @property
    def modules(self) -> list[str] | None:
        """modules_in_block_to_quantize as one list."""
        names = self.modules_in_block_to_quantize
        return None if names is None else [name for group in names for name in group]

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def smallest_zero(self) -> int:
        """v1 stores zero - 1, so it cannot hold a zero of 0 (the subtraction would borrow from its neighbour)."""
        return 1 if self.format == "gptq" else 0

    def groups_of(self, in_features: int) -> int:
        """Number of groups along a row of `in_features` columns."""
        return 1 if self.group_size == -1 else in_features // self.group_size


def _beside(defaults: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The defaults that can stand beside what was chosen."""
    excluded = {
        "static_groups": _true(chosen.get("desc_act")),
        "act_group_aware": _true(chosen.get("desc_act")),
        "residual_shift": chosen.get("target_shift", 1) == 0,
        "tuning_steps": chosen.get("target_shift", 1) == 0,
    }
    return {key: value for key, value in defaults.items() if not excluded.get(key)}


def _true(value: Any) -> bool:
    """Whether a field would take this value, not validated yet, for true; "true" and 1 are."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def expression(rule: str) -> str:
    """The regular expression of a `dynamic` rule."""
    return rule[2:] if rule.startswith(("-:", "+:")) else rule
