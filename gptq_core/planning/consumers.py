"""Who loads a checkpoint: a table of consumers, and the verdict of each on a plan.

`CONSUMERS` is the one table of who accepts what, each row with the version that it was read from. Rows and versions are those of
the project's format notes, read from the published sources and, for GPTQModel and transformers, held by tests/consumers:

- vLLM, `auto_gptq.py` and `gptq_utils.py`: (bits, sym) must be (4 | 8, true) for the checkpoint's own keys and for every rule;
  Marlin's group sizes; linears are looked up by their fused names. `modules_in_block_to_quantize` is a list of substrings that must
  name every quantized linear, the head too, so ours is left out where the head is quantized. Tiles are padded.
- SGLang, `gptq.py`: the same keys, no padding. Marlin's kernel finds no tile unless in and out are multiples of 64 and one of
  them of 128; `check_marlin_supports_shape` knows, and its answer is not looked at.
- Both pad a head's vocabulary to 64 and copy packed columns only into a room of their own width.
- transformers replaces, through optimum, every linear of a block, or those in `modules_in_block_to_quantize`; it reads no rules,
  and nothing outside the blocks. Kernels are GPTQModel's.
- GPTQModel reads rules and the head, not `modules_in_block_to_quantize`. It takes asymmetric zeros stored minus one only from itself.

All four read both layouts of the zeros: vLLM and SGLang take symmetric files only and never look at their zeros. What depends on
the machine (GPU, kernel, tensor parallelism) or on the architecture being known there is not judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gptq_core.checkpoint.format import FUSED
from gptq_core.config import QuantizeConfig
from gptq_core.model import selection
from gptq_core.model.selection import Selection


@dataclass(frozen=True)
class Consumer:
    """One row of the table: what a program accepts."""

    name: str
    version: str
    bits: tuple[int, ...]
    sym: tuple[bool, ...]
    group_sizes: tuple[int, ...]
    desc_act: bool
    """Groups in the order of the activations; without groups desc_act changes nothing on disk and loads everywhere."""
    rules: bool
    """Reads `dynamic`: keys of single linears, and which are left. Otherwise all are alike, and left alike in every block."""
    lm_head: bool
    asymmetric_v1: bool
    """Loads zeros that are fitted and stored minus one."""
    fuses: bool = False
    """Runs q, k and v, and gate and up, as one linear: all of them quantized alike, or none."""
    tiles: bool = False
    """In and out of a linear must be multiples of 64, and one of them of 128."""
    vocabulary: int = 1
    """A quantized head's rows must be a multiple of this."""


MARLIN = (-1, 32, 64, 128)


TORCH = (-1, 16, 32, 64, 128, 256, 512, 1024)


ANY_BITS, EITHER = (2, 3, 4, 8), (True, False)


CONSUMERS = (
    #        name            version   bits      sym      groups  desc_act rules  head   asymmetric v1
    Consumer("vLLM", "0.33", (4, 8), (True,), MARLIN, False, True, True, False, fuses=True, vocabulary=64),
    Consumer("SGLang", "0.5.23", (4, 8), (True,), MARLIN, True, True, True, False, fuses=True, tiles=True, vocabulary=64),
    Consumer("transformers", "5.23", ANY_BITS, EITHER, TORCH, True, False, False, True),
    Consumer("GPTQModel", "7.7", ANY_BITS, EITHER, TORCH, True, True, True, False),
)


@dataclass(frozen=True)
class Verdict:
    """Whether one consumer will load the checkpoint; why not, each reason as `value (rule): remedy`."""

    consumer: str
    version: str
    reasons: tuple[str, ...]

    @property
    def loads(self) -> bool:
        return not self.reasons

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"consumer": self.consumer, "version": self.version, "loads": self.loads, "reasons": list(self.reasons)}


def loadability(config: QuantizeConfig, chosen: Selection) -> list[Verdict]:
    """A verdict for every consumer of the table, on the files that `config` will make of the linears in `chosen`."""
    return [Verdict(c.name, c.version, tuple(_reasons(c, config, chosen))) for c in CONSUMERS]


def objections(verdicts: list[Verdict], full: bool = False) -> list[str]:
    """A line for all consumers with the same reasons: `vLLM 0.33 and SGLang 0.5.23 will not load this: …`; remedies only if `full`."""
    who: dict[tuple[str, ...], list[str]] = {}
    for verdict in verdicts:
        if verdict.reasons:
            who.setdefault(verdict.reasons, []).append(f"{verdict.consumer} {verdict.version}")
    return [
        f"{_listed(names, 'and')} will not load this: "
        + "; ".join(reason if full else reason.partition("): ")[0] + ")" for reason in reasons)
        for reasons, names in who.items()
    ]


def _reasons(consumer: Consumer, config: QuantizeConfig, chosen: Selection) -> Iterator[str]:
    def wrong(key: str, choices: tuple[Any, ...]) -> Iterator[str]:
        yield from _wrong(config, chosen, key, lambda c: getattr(c, key) in choices, _listed([_text(value) for value in choices], "or"))

    yield from wrong("bits", consumer.bits)
    yield from wrong("group_size", consumer.group_sizes)
    yield from wrong("sym", consumer.sym)
    if not consumer.desc_act:
        yield from _wrong(config, chosen, "desc_act", lambda c: not c.desc_act or c.group_size == -1, "false, or group_size -1")
    if False in consumer.sym and not consumer.asymmetric_v1 and not config.sym and config.format == "gptq":
        yield "sym false with format gptq (taken only from its own writer): set quantization.format: gptq_v2"
    if not consumer.rules:
        yield from _uneven(config, chosen)
    if consumer.fuses:
        yield from _parted(chosen)
    heads = [(name, layer) for name, layer in chosen.layers.items() if not name.startswith(f"{chosen.prefix}.")]
    for name, layer in heads:
        if not consumer.lm_head:
            yield f"{name} quantized (only linears of the decoder blocks are read): set quantization.lm_head: false"
        elif layer.out_features % consumer.vocabulary:
            yield (
                f"{name} with {layer.out_features} rows (must be a multiple of {consumer.vocabulary} to be read packed): "
                "set quantization.lm_head: false"
            )
    if consumer.tiles:
        yield from _without_tile(chosen)


def _wrong(config: QuantizeConfig, chosen: Selection, key: str, accepts: Callable[[QuantizeConfig], bool], rule: str) -> Iterator[str]:
    """A reason for each value of a key that is not accepted: in the config itself, or where rules set it."""
    own = getattr(config, key) if not accepts(config) else None
    at: dict[Any, list[str]] = {} if own is None else {own: []}
    for name, layer in chosen.layers.items():
        if not accepts(layer.config):
            at.setdefault(getattr(layer.config, key), []).append(name)
    for value, names in at.items():
        where, remedy = ("", f"set quantization.{key}") if value == own else (f" at {_first(names)}", "change that in quantization.dynamic")
        yield f"{key} {_text(value)}{where} (must be {rule}): {remedy}"


def _uneven(config: QuantizeConfig, chosen: Selection) -> Iterator[str]:
    """Reasons of a consumer that gives every linear the same keys, and every block the same linears."""
    for key in selection.KEYS_ON_DISK:
        names = [name for name, layer in chosen.layers.items() if getattr(layer.config, key) != getattr(config, key)]
        if names:
            value, usual = (_text(getattr(c, key)) for c in (chosen.layers[names[0]].config, config))
            yield f"{key} {value} at {_first(names)} (rules are not read, so it must be {usual}): change that in quantization.dynamic"
    kept = [chosen.in_block(index).keys() for index in range(chosen.blocks)]
    if any(names != kept[0] for names in kept):
        yield (
            f"{_first([n for n in chosen.left if n.startswith(f'{chosen.prefix}.')])} unquantized (must be the same linears in every "
            "block): leave them out in all blocks or in none"
        )


def _parted(chosen: Selection) -> Iterator[str]:
    """Reasons of a consumer that runs several linears as one."""
    odd: dict[str, list[str]] = {}
    for members in chosen.parted:
        leaves = "|".join(name.rpartition(".")[2] for name in members)
        odd.setdefault(leaves, []).extend([name for name in members if name in chosen.left] or members[1:])
    for leaves, names in odd.items():
        if any(chosen.left.get(name) == selection.NOT_LISTED for name in names):
            remedy = "name all of them in quantization.modules_in_block_to_quantize, or none"
        else:
            remedy = f"leave all of them out by a rule in quantization.dynamic, '-:.*\\.({leaves})'"
        yield f"{_first(names)} unlike the rest of {leaves} (one linear there, so quantized alike or not at all): {remedy}"


def _without_tile(chosen: Selection) -> Iterator[str]:
    sizes: dict[str, list[int]] = {}
    for name, layer in chosen.layers.items():
        if name.startswith(f"{chosen.prefix}."):
            parent, _, leaf = name.rpartition(".")
            whole = next((fused for fused, members in FUSED.items() if leaf in members), leaf)
            sizes.setdefault(f"{parent}.{whole}", [layer.in_features, 0])[1] += layer.out_features
    bad = [name for name, size in sizes.items() if any(n % 64 for n in size) or all(n % 128 for n in size)]
    if bad:
        columns, out = sizes[bad[0]]
        yield (
            f"in {columns} and out {out} at {_first(bad)} (must be multiples of 64, and one of 128): "
            "leave it out by a rule in quantization.dynamic"
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _text(value: Any) -> str:
    return json.dumps(value)
