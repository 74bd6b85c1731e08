"""Mixed precision under a budget: a width for every linear, so that the predicted KL is least.

    allocation = allocate(model, config, windows)          # config.allocate: {bits: [2, 3, 4, 8], budget_bpw: 3.5}
    Quantization.open(model, allocation.apply(config), windows, out)

1. Loss. The original model's activations pass through the blocks once. Every unit, a linear or the fused ones of FUSED
   together, is solved at every width on their Hessian by the config's own recipe, without shifted targets and tuning; its loss is
   Σ (w - q)(H + λI)(w - q)ᵀ. One factor serves all widths.
2. Effect. Beside the original stream run others, in each of which one unit alone is quantized, at one of the two smallest widths.
   At the end KL(original || that stream) is what this loss costs. Losses at larger widths are small enough to cost in proportion.
   A few windows do, since all units see the same ones. In memory are one block and, for each block of 4 units, 8 streams of
   PROBE_TOKENS tokens: 8.6 GB for 32 blocks of hidden size 4096 in bfloat16. The forwards of the streams grow with the square of
   the depth: for 32 blocks they are worth 128 passes of the whole model over PROBE_TOKENS tokens.
3. Knapsack. Minimise Σ KL(unit, width) under Σ size(unit, width) <= budget.

The sum takes errors for independent; it ranks choices better than it foretells the KL that the evaluation measures, which is larger.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptq_core.block.stream import BlockStream, HiddenStates, check_token_ids, quantized
from gptq_core.checkpoint.format import FUSED
from gptq_core.config import Allocate, QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.errors import FactorizationError, InputError
from gptq_core.inference.evaluation import log_probabilities
from gptq_core.method import solver
from gptq_core.method.factor import factorize
from gptq_core.method.hessian import Hessian
from gptq_core.model.architecture import head_name
from gptq_core.model.opened import Model, open_model
from gptq_core.model.selection import Selection, bits_on_disk, units_of
from gptq_core.work_sizes import PROBE_TOKENS, PROBED_WIDTHS

LARGEST_FRONT = 50_000
"""Partial choices kept in the knapsack: as long as they are not more, its result is exact."""

Progress = Callable[[int, int], None]
UnitCosts = dict[str, tuple[dict[int, float], dict[int, float]]]
"""Name of a unit to its losses and its KL, each by width."""


@dataclass(frozen=True)
class Unit:
    """A linear, or those that vLLM and SGLang run as one, which must agree in their width."""

    name: str
    """Full name; that of the whole where linears are fused."""
    members: tuple[str, ...]
    weights: int
    loss: dict[int, float]
    """By width."""
    kl: dict[int, float]
    """By width, with everything else as in the original: measured at the smallest widths, beyond in proportion to the loss."""
    bits: int
    """The chosen width."""


@dataclass(frozen=True)
class Allocation:
    """The widths of all quantized linears."""

    units: tuple[Unit, ...]
    predicted_kl: float
    """Σ KL of the units at the chosen widths."""
    bits_per_weight: float
    """Of the codes."""
    rules: dict[str, dict[str, Any]]
    """As `dynamic` takes them: where the width is not the config's own `bits`."""

    @property
    def shares(self) -> dict[int, float]:
        """Share of the weights at each width."""
        weights = sum(unit.weights for unit in self.units)
        widths = sorted({unit.bits for unit in self.units})
        return {bits: sum(unit.weights for unit in self.units if unit.bits == bits) / weights for bits in widths}

    def apply(self, config: QuantizeConfig) -> QuantizeConfig:
        """The config with these widths as rules, after its own negative ones."""
        rules = (config.dynamic or {}) | self.rules
        return config.model_copy(update={"allocate": None, "dynamic": rules or None})

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Allocation:
        """Back from JSON, whose keys are strings."""

        def unit(row: dict[str, Any]) -> Unit:
            by_width = {key: {int(bits): value for bits, value in row[key].items()} for key in ("loss", "kl")}
            return Unit(**row | by_width | {"members": tuple(row["members"])})

        return cls(tuple(map(unit, record["units"])), record["predicted_kl"], record["bits_per_weight"], record["rules"])


def allocate(
    model: Model,
    config: QuantizeConfig,
    windows: Windows,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Choose widths as `config.allocate` says. Raises InputError as Quantization.open does, and for a budget out of range."""
    plain = config.model_copy(update={"allocate": None, "target_shift": 0.0, "residual_shift": 0.0, "tuning_steps": 0})
    with BlockStream.open(open_model(model, revision), dtype=dtype, device=device) as stream:
        check_token_ids(windows, stream.model.config, "calibration")
        selected = stream.model.select(plain)
        budget_of(config, selected)
        probes = UnitProbes(stream, selected, _wanted(config).bits)
        return choose(config, selected, probes.measure(windows, progress or (lambda done, total: None)))


def presumed(config: QuantizeConfig, selection: Selection) -> Allocation:
    """An allocation under the budget before anything is known: every weight counts 4⁻ᵇⁱᵗˢ."""
    widths = _wanted(config).bits
    found: dict[str, dict[int, float]] = {
        name: {bits: 4.0**-bits * weights_of(selection, members) for bits in widths} for name, members in units_of(selection).items()
    }
    return choose(config, selection, {name: (losses, losses) for name, losses in found.items()})


# -- units and budget -----------------------------------------------------------------------------------------------------


def _wanted(config: QuantizeConfig) -> Allocate:
    assert config.allocate is not None, "this module is for configs with `allocate`"
    return config.allocate


def weights_of(selection: Selection, members: Iterable[str]) -> int:
    return sum(selection.layers[name].in_features * selection.layers[name].out_features for name in members)


def _sizes(config: QuantizeConfig, selection: Selection, members: list[str]) -> list[int]:
    """Bits that a unit takes of the budget at each width."""
    wanted = _wanted(config)
    if wanted.budget_bpw is not None:
        return [bits * weights_of(selection, members) for bits in wanted.bits]
    layers = [selection.layers[name] for name in members]
    return [sum(bits_on_disk(layer.in_features, layer.out_features, bits, config.group_size) for layer in layers) for bits in wanted.bits]


def budget_of(config: QuantizeConfig, selection: Selection) -> int:
    """The budget in bits. Raises InputError where no choice of widths is as small, or none as large."""
    units, wanted = units_of(selection), _wanted(config)
    if wanted.budget_bpw is not None:
        return math.floor(wanted.budget_bpw * weights_of(selection, selection.layers))
    assert wanted.budget_gb is not None  # one of the two budgets is there
    sizes = [_sizes(config, selection, members) for members in units.values()]
    least, most = (sum(size[end] for size in sizes) / 8e9 for end in (0, -1))
    if not least <= wanted.budget_gb <= most:
        raise InputError(
            f"quantization.allocate.budget_gb = {wanted.budget_gb:g}: the quantized linears take {least:.4g} GB at {wanted.bits[0]} "
            f"bits and {most:.4g} GB at {wanted.bits[-1]}; give a size between, or other widths"
        )
    return math.floor(wanted.budget_gb * 8e9)


# -- the choice -----------------------------------------------------------------------------------------------------------


def choose(config: QuantizeConfig, selection: Selection, costs: UnitCosts) -> Allocation:
    """The widths of the least total KL within the budget."""
    members, widths = units_of(selection), _wanted(config).bits
    divergences = [[costs[name][1][bits] for bits in widths] for name in members]
    sizes = [_sizes(config, selection, names) for names in members.values()]
    picks = knapsack(divergences, sizes, budget_of(config, selection))
    units = tuple(
        Unit(name, tuple(names), weights_of(selection, names), *costs[name], widths[pick])
        for (name, names), pick in zip(members.items(), picks, strict=True)
    )
    return Allocation(
        units,
        sum(kl[pick] for kl, pick in zip(divergences, picks, strict=True)),
        sum(unit.bits * unit.weights for unit in units) / sum(unit.weights for unit in units),
        _rules([unit for unit in units if unit.bits != config.bits], selection.prefix),
    )


def knapsack(costs: list[list[float]], sizes: list[list[int]], budget: int) -> list[int]:
    """For every unit the index of its choice, for the least total cost at a total size within the budget.

    Unit by unit, the front of partial choices is kept: those that no smaller one matches in cost. Equal sizes meet there, so that
    the front is never longer than the number of different totals.
    """
    rest = sum(min(size) for size in sizes)
    front_size, front_cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[np.ndarray] = []
    for cost, size in zip(costs, sizes, strict=True):
        rest -= min(size)
        all_sizes = (front_size[:, None] + np.array(size, np.int64)).ravel()
        all_costs = (front_cost[:, None] + np.array(cost)).ravel()
        order = np.lexsort((all_costs, all_sizes))
        order = order[all_sizes[order] + rest <= budget]
        before = np.minimum.accumulate(np.concatenate([[np.inf], all_costs[order]]))[:-1]
        order = order[all_costs[order] < before]
        if len(order) > LARGEST_FRONT:
            order = order[np.linspace(0, len(order) - 1, LARGEST_FRONT).round().astype(int)]
        steps.append(order)
        front_size, front_cost = all_sizes[order], all_costs[order]
    at, picks = len(front_cost) - 1, []
    for order, cost in zip(reversed(steps), reversed(costs), strict=True):
        at, pick = divmod(int(order[at]), len(cost))
        picks.append(pick)
    return picks[::-1]


def _rules(units: list[Unit], prefix: str) -> dict[str, dict[str, Any]]:
    """One rule for every width of every kind of unit, which also covers the name of the whole: vLLM and SGLang ask for that."""
    alike: dict[tuple[str, int], list[str]] = {}
    for unit in units:
        parent, dot, whole = unit.name.rpartition(".")
        leaf = f"({'|'.join((*FUSED[whole], whole))})" if whole in FUSED and unit.members != (unit.name,) else re.escape(whole)
        block = re.match(rf"{re.escape(prefix)}\.(\d+)\.", unit.name)
        inner = re.escape(parent[block.end() :] + dot) if block and len(parent) > block.end() else ""
        alike.setdefault((inner + leaf, unit.bits), []).append(block[1] if block else "")
    rules = {}
    for (inner, bits), blocks in alike.items():
        where = f"({'|'.join(blocks)})" if len(blocks) > 1 else blocks[0]
        rules[(rf"{re.escape(prefix)}\.{where}\." if where else "") + f"{inner}$"] = {"bits": bits}
    return rules


# -- losses and their effects ---------------------------------------------------------------------------------------------------


Probe = dict[nn.Linear, Tensor]
"""The linears of a unit and their dequantized weights at one width."""


class UnitProbes:
    """The original stream through all blocks, and beside it others, in each of which one unit alone is quantized."""

    def __init__(self, stream: BlockStream, selected: Selection, widths: Sequence[int]) -> None:
        self._stream, self._selection, self._widths = stream, selected, widths
        self._unit_of = {member: unit for unit, members in units_of(selected).items() for member in members}
        self._losses: dict[str, dict[int, float]] = {}
        self._variants: dict[tuple[str, int], Tensor] = {}  # by unit and width: hidden states of the probed windows

    def measure(self, windows: Windows, progress: Progress) -> UnitCosts:
        """Losses and KL of every unit at every width."""
        [states] = self._stream.enter(windows)
        count = min(max(1, PROBE_TOKENS // windows.seqlen), states.batches[0].shape[0])
        for index in range(self._stream.block_count):
            self._pass(index, states, count)
            progress(index + 1, self._stream.block_count)
        measured = self._divergences(states, count)
        return {unit: (losses, self._costs(unit, losses, measured)) for unit, losses in self._losses.items()}

    def _costs(self, unit: str, losses: dict[int, float], measured: dict[tuple[str, int], float]) -> dict[int, float]:
        """KL by width; beyond the measured ones in proportion to the loss."""
        probed = [bits for bits in self._widths if (unit, bits) in measured]
        rate = measured[unit, probed[-1]] / losses[probed[-1]] if losses[probed[-1]] else 0.0
        return {bits: measured.get((unit, bits), rate * losses[bits]) for bits in self._widths}

    def _pass(self, index: int, states: HiddenStates, count: int) -> None:
        """Take all variants past a block; those of its own units begin there."""
        probes: dict[tuple[str, int], Probe] = {}

        def solve(modules: dict[str, nn.Linear], hessian: Hessian) -> None:
            probes.update(self._solve(modules, hessian))

        entering, call = states.states[0][:count], states.call(index).cut(count)
        names = self._selection.in_block(index)
        with self._stream.pass_original(index, states, names, solve) as block, torch.no_grad():
            self._variants = {probe: call(block, hidden) for probe, hidden in self._variants.items()}
            for probe, weights in probes.items():
                with quantized(weights):
                    self._variants[probe] = call(block, entering)

    def _solve(self, modules: dict[str, nn.Linear], hessian: Hessian) -> dict[tuple[str, int], Probe]:
        """Note the losses of the units of an input group; their weights at the smallest widths."""
        mean, config = hessian.mean(), self._selection.layers[next(iter(modules))].config
        try:
            factor = factorize(mean, config, " + ".join(modules), hessian.tokens)
        except FactorizationError:
            if config.on_failure != "round":
                raise
            factor = None
        found: dict[tuple[str, int], Probe] = {}
        for unit in dict.fromkeys(self._unit_of[name] for name in modules):
            linears = [linear for name, linear in modules.items() if self._unit_of[name] == unit]
            weight = torch.cat([linear.weight.float() for linear in linears])  # (out of all members, in)
            self._losses[unit] = {}
            for bits in self._widths:
                narrow = config.model_copy(update={"bits": bits})
                solution = solver.solve(weight, factor, narrow) if factor else solver.round_to_nearest(weight, narrow)
                self._losses[unit][bits] = float(solution.loss.double().sum())
                if bits in self._widths[:PROBED_WIDTHS]:
                    parts = solution.weight(self._stream.dtype).split([linear.out_features for linear in linears])
                    found[unit, bits] = dict(zip(linears, parts, strict=True))
        return found

    def _divergences(self, states: HiddenStates, count: int) -> dict[tuple[str, int], float]:
        """KL(original || variant) a token of every variant, and of the original with its head quantized where that takes part."""
        with self._stream.outside_filled() as model:
            name, heads = head_name(model), dict[tuple[str, int], Probe]()
            if name is not None and name in self._selection.layers:
                head = model.get_output_embeddings()
                heads = self._solve({name: head}, self._stream.head_hessian(states, head))
            total = dict.fromkeys((*self._variants, *heads), 0.0)
            for window in range(count):
                here = slice(window, window + 1)
                batch, entered = states.batches[0][here], states.states[0][here]
                original = log_probabilities(self._stream.logits(batch, entered))
                for probe, hidden in self._variants.items():
                    total[probe] += _divergence(original, log_probabilities(self._stream.logits(batch, hidden[here])))
                for probe, weights in heads.items():
                    with quantized(weights):
                        total[probe] += _divergence(original, log_probabilities(self._stream.logits(batch, entered)))
        positions = count * (states.batches[0].shape[1] - 1)
        return {probe: max(0.0, value) / positions for probe, value in total.items()}


def _divergence(original: Tensor, other: Tensor) -> float:
    return float((original.exp() * (original - other)).sum(-1).double().sum())
