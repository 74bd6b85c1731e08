"""Which linears of a model are quantized, with which config, and why the others are not: decided from config and headers,
before any work."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gptq_core.checkpoint.format import FUSED, why_not_packable
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.config import QuantizeConfig, expression
from gptq_core.errors import InputError
from gptq_core.model.architecture import Decoder, head_name, linears_of, source_name

KEYS_ON_DISK = ("bits", "group_size", "sym", "desc_act")
"""What a reader of `dynamic` needs to know about a linear; how its codes were found does not concern it."""

NOT_LISTED = "not in modules_in_block_to_quantize"


@dataclass(frozen=True)
class Layer:
    """A linear that will be quantized."""

    config: QuantizeConfig
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Selection:
    """What happens to each linear of the decoder blocks, and to the head if it is quantized. All names are full names."""

    prefix: str
    """Name of the list of blocks."""
    blocks: int
    layers: dict[str, Layer]
    left: dict[str, str]
    """Linears that stay as they are, and the reason."""
    rules: dict[str, dict[str, Any]]
    """`dynamic` as it goes to disk: says for every linear whether and how it differs from the checkpoint's own keys."""
    unused: tuple[str, ...] = ()
    """Tensors of the source that the model has no place for, so that they are not written."""

    def in_block(self, index: int) -> dict[str, QuantizeConfig]:
        """Configs of a block's quantized linears by their names inside it."""
        path = f"{self.prefix}.{index}."
        return {name.removeprefix(path): layer.config for name, layer in self.layers.items() if name.startswith(path)}

    @property
    def modules(self) -> list[str] | None:
        """Names inside a block that are quantized, where some are left and all blocks agree: readers without `dynamic` need it.

        None where the head is quantized: vLLM would take it for a dense one, and a reader without `dynamic` cannot read it.
        """
        inner = [list(self.in_block(index)) for index in range(self.blocks)]
        head = any(not name.startswith(f"{self.prefix}.") for name in self.layers)
        return inner[0] if self.left and not head and all(names == inner[0] for names in inner) else None

    @property
    def parted(self) -> list[list[str]]:
        """Linears that are one in vLLM and SGLang and differ in being quantized or in their keys on disk."""
        fused = _fused(self.layers.keys() | self.left.keys()).values()
        return [members for members in fused if len({str(_stored(self.layers, name)) for name in members}) > 1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it before the run."""
        if not self.unused:
            return ()
        counts = Counter(re.sub(r"(\.\d+)\..*", r"\1", name) for name in self.unused)  # by block, where they have a number
        parts = ", ".join(f"{part} ({count})" if count > 1 else part for part, count in list(counts.items())[:5])
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        return (f"not written, since the model as transformers builds it has no place for them: tensors of {parts}{more}",)


def select(source: Checkpoint, decoder: Decoder, config: QuantizeConfig) -> Selection:
    """Raises InputError when the source is quantized already, lacks a tensor, has a linear that cannot be packed while
    `config.strict` forbids leaving it, or when a rule of `dynamic` decides nothing or parts what consumers fuse."""
    if getattr(decoder.model.config, "quantization_config", None):
        raise InputError(f"{source.folder}: this checkpoint is already quantized; give the original model")
    unused = _check_tensors(source, decoder)
    linears = {
        f"{decoder.prefix}.{index}.{name}": (linear.in_features, linear.out_features)
        for index, block in enumerate(decoder.blocks)
        for name, linear in linears_of(block).items()
    }
    if config.lm_head:
        head = _head(decoder)
        out, columns = decoder.model.get_parameter(f"{head}.weight").shape
        linears[head] = columns, out
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    unpackable: dict[str, str] = {}
    _check_names(decoder, config, linears)
    for name, (columns, out) in linears.items():
        inner = re.sub(rf"^{re.escape(decoder.prefix)}\.\d+\.", "", name)
        chosen = config.for_linear(name)
        if config.modules is not None and inner != name and inner not in config.modules:
            left[name] = NOT_LISTED
        elif chosen is None:
            left[name] = f"dynamic: {config.rule_for(name)}"
        elif reason := why_not_packable(columns, out, chosen.group_size):
            unpackable[name] = left[name] = reason
        else:
            layers[name] = Layer(chosen, columns, out)
    if unpackable and config.strict:
        first = next(iter(unpackable))
        raise InputError(
            f"{first}: {unpackable[first]}{_choices(list(linears.values()))}, or set quantization.strict: false to leave "
            f"{'it' if len(unpackable) == 1 else f'these {len(unpackable)} layers'} unquantized"
        )
    if not any(name.startswith(f"{decoder.prefix}.") for name in layers):
        keys = dict.fromkeys(
            "modules_in_block_to_quantize" if reason == NOT_LISTED else f"dynamic {config.rule_for(name)!r}"
            for name, reason in left.items()
            if name not in unpackable
        )
        if keys:
            raise InputError(f"no linear of any decoder block is quantized: {' and '.join(keys)} left them out; let some take part")
        raise InputError(f"{source.folder}: no linear of any decoder block can be quantized{_choices(list(linears.values()))}")
    _check_rules(config, linears, left)
    return Selection(decoder.prefix, len(decoder.blocks), layers, left, _rules(decoder, config, layers, left), unused)


def _head(decoder: Decoder) -> str:
    name = head_name(decoder.model)
    if name is None or f"{name}.weight" in getattr(decoder.model, "all_tied_weights_keys", {}):
        raise InputError(
            f"quantization.lm_head = true: the head of this {decoder.model.config.model_type} model is tied to its embeddings, "
            "which stay as they are; leave lm_head out"
        )
    return name


def _check_names(decoder: Decoder, config: QuantizeConfig, linears: dict[str, tuple[int, int]]) -> None:
    """Raise InputError for a name or a rule in the config that matches no linear."""
    known = {name for block in decoder.blocks for name in linears_of(block)}
    for name in config.modules or []:
        if name not in known:
            raise InputError(f"modules_in_block_to_quantize: no linear {name!r} in a block; there are {', '.join(sorted(known))}")
    for rule in config.dynamic or {}:
        if not any(re.match(expression(rule), name) for name in linears):
            raise InputError(
                f"dynamic: {rule!r} matches no linear of this model; full names are like {next(iter(linears))}"
                + (", and lm_head takes part only with lm_head: true" if "head" in rule and not config.lm_head else "")
            )


def _check_rules(config: QuantizeConfig, linears: Iterable[str], left: dict[str, str]) -> None:
    """Raise InputError for a rule that decides about no linear that could be quantized."""
    free = [name for name in linears if name not in left or left[name].startswith("dynamic: ")]
    deciding = {config.rule_for(name) for name in free}
    for rule in config.dynamic or {}:
        if rule in deciding:
            continue
        overruled = next((name for name in free if re.match(expression(rule), name)), None)
        if overruled:
            why = f"{config.rule_for(overruled)!r} comes before it at {overruled}; move it up or drop it"
        else:
            name = next(name for name in linears if re.match(expression(rule), name))
            why = f"{name} is left ({left[name]}); {'name it there or ' if left[name] == NOT_LISTED else ''}drop the rule"
        raise InputError(f"dynamic: {rule!r} decides about no linear: {why}")


def _stored(layers: dict[str, Layer], name: str) -> dict[str, Any] | None:
    """The keys that the files record for a linear; None: it is not quantized."""
    return {key: getattr(layers[name].config, key) for key in KEYS_ON_DISK} if name in layers else None


def _rules(decoder: Decoder, config: QuantizeConfig, layers: dict[str, Layer], left: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The rules for the files: what was left out for any reason as negative rules, and rules that also cover fused names.

    vLLM and SGLang look a fused linear up by its fused name, `qkv_proj` or `gate_up_proj`, so rules may not part its members.
    Where modules_in_block_to_quantize parts them, as Optimum allows, there is no rule to write.
    """
    rules = {
        _never_literal(rule): {k: v for k, v in changes.items() if k in KEYS_ON_DISK} for rule, changes in (config.dynamic or {}).items()
    }
    rule_of = {name: config.rule_for(name) for name in left}
    negative = _compressed(decoder, [name for name, rule in rule_of.items() if rule is None or not rule.startswith("-:")])
    rules = {f"-:{pattern}": {} for pattern in negative} | rules
    fused_rules: dict[str, dict[str, Any]] = {}
    for fused, members in _fused(layers.keys() | left.keys()).items():
        stored = {name: _stored(layers, name) for name in members}
        first, wanted = next(iter(stored.items()))
        leaves = "(" + "|".join(name.rpartition(".")[2] for name in members) + ")"
        for name, found in stored.items():
            if found == wanted or not any(config.rule_for(member) for member in members):
                continue
            unpackable = next((n for n in members if n in left and left[n] != NOT_LISTED and not left[n].startswith("dynamic: ")), None)
            if unpackable:
                raise InputError(
                    f"{unpackable}: {left[unpackable]}, and in vLLM and SGLang it is one linear with the rest of {leaves}; "
                    f"leave all of them out by a rule before the others, {{'-:.*\\.{leaves}': {{}}}}"
                )
            if any(left.get(member) == NOT_LISTED for member in members):
                remedy = f"name all of {leaves} in modules_in_block_to_quantize, or none"
            else:
                remedy = f"let a rule match {leaves}"
            raise InputError(
                f"{first} and {name} are one linear in vLLM and SGLang, so they must agree in {', '.join(KEYS_ON_DISK)} and in being "
                f"quantized ({wanted or 'left'} and {found or 'left'}); {remedy}"
            )
        if len(set(map(str, stored.values()))) == 1 and _on_disk(rules, config, fused) != wanted:
            fused_rules[("-:" if wanted is None else "+:") + re.escape(fused) + "$"] = {} if wanted is None else wanted
    return fused_rules | rules


def _on_disk(rules: dict[str, dict[str, Any]], config: QuantizeConfig, name: str) -> dict[str, Any] | None:
    """The keys that a reader of the rules finds for a name; None: not quantized."""
    rule = next((rule for rule in rules if re.match(expression(rule), name)), None)
    if rule is not None and rule.startswith("-:"):
        return None
    return {key: getattr(config, key) for key in KEYS_ON_DISK} | (rules[rule] if rule else {})


def _never_literal(rule: str) -> str:
    """The rule, written so that GPTQModel too matches it from the start of a name: it compares plain text to whole names."""
    plain = re.fullmatch(r"(?:\\\W|[^\\.^$*+?{}\[\]()|])*", expression(rule))
    return f"{rule[:2] if rule != expression(rule) else ''}(?:{expression(rule)})" if plain else rule


def _compressed(decoder: Decoder, names: list[str]) -> list[str]:
    """Patterns for names: one for all blocks where every block has the name in the list."""
    start = re.compile(rf"^{re.escape(decoder.prefix)}\.\d+\.")
    patterns: dict[str, None] = {}
    for name in names:
        inner = start.sub("", name)
        everywhere = all(f"{decoder.prefix}.{index}.{inner}" in names for index in range(len(decoder.blocks)))
        patterns[(rf"{re.escape(decoder.prefix)}\.\d+\.{re.escape(inner)}" if everywhere else re.escape(name)) + "$"] = None
    return list(patterns)


def _fused(names: Any) -> dict[str, list[str]]:
    """Fused name to the names of its members, for the linears that vLLM and SGLang run as one."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        for fused, members in FUSED.items():
            if leaf in members:
                found.setdefault(f"{parent}.{fused}", []).append(name)
    return found


FLOATING = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, as safetensors spells them, whose numbers mean what they say: others need scales or tables beside them."""


def _check_tensors(source: Checkpoint, decoder: Decoder) -> tuple[str, ...]:
    """Names of the source's tensors that the model has no place for.

    Raises InputError for a missing tensor, a wrong shape, a dtype that is none of weights, or a tied tensor that differs from its twin;
    it may be absent.
    """
    tied = getattr(decoder.model, "all_tied_weights_keys", {})
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.model.state_dict().items()}
    found = {name: source_name(decoder.model, name, source.__contains__) for name in expected}
    missing = [name for name, there in found.items() if there is None and not (name in tied and found.get(tied[name]))]
    if missing:
        raise InputError(
            f"{source.folder}: {len(missing)} tensors of the model are missing, the first is {missing[0]!r}; download it again"
        )
    parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
    for name, there in found.items():
        if not there:
            continue
        dtype, shape = source.header(there)
        if shape != expected[name]:
            raise InputError(f"{name}: shape {shape} on disk, {expected[name]} by config.json; the two do not belong together")
        if name in parameters and dtype not in FLOATING:
            raise InputError(
                f"{there}: stored as {dtype}, which is no dtype of plain weights (must be {', '.join(FLOATING)}); "
                "give the original model, or one that was converted back to bfloat16"
            )
    for name, twin in tied.items():
        own, other = found.get(name), found.get(twin)
        if own and other and not torch.equal(source.read(own), source.read(other)):
            raise InputError(
                f"{source.folder}: config.json ties {name} to {twin}, but the folder holds two different tensors; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )
    return tuple(sorted(set(source.names) - set(found.values())))


def _choices(sizes: list[tuple[int, int]]) -> str:
    """Group sizes that divide every layer that can be packed at all, as a phrase."""
    columns = [inputs for inputs, outputs in sizes if why_not_packable(inputs, outputs, -1) is None]
    common = math.gcd(*columns) if columns else 0
    fitting = [str(size) for size in (16, 32, 64, 128, 256, 512, 1024) if common and common % size == 0]
    if not fitting:
        return ""
    return f"; group sizes that fit{'' if len(columns) == len(sizes) else ' the other layers'}: {', '.join(fitting)} or -1"


def bits_on_disk(in_features: int, out_features: int, bits: int, group_size: int) -> int:
    """Bits of the packed tensors of one linear, scales, zeros and g_idx included."""
    groups = 1 if group_size == -1 else in_features // group_size
    return in_features * out_features * bits + groups * out_features * (16 + bits) + in_features * 32


def units_of(selection: Selection) -> dict[str, list[str]]:
    """The linears of each unit, by the name of the unit. Raises InputError where fused linears are not quantized alike."""
    if selection.parted:
        raise InputError(
            f"quantization.allocate: {' and '.join(selection.parted[0])} get one width, but not all of them are quantized; "
            "name all of them in modules_in_block_to_quantize, or none"
        )
    found: dict[str, list[str]] = {}
    for name in selection.layers:
        parent, _, leaf = name.rpartition(".")
        whole = next((fused for fused, members in FUSED.items() if leaf in members), leaf)
        found.setdefault(f"{parent}.{whole}" if parent else whole, []).append(name)
    return found
