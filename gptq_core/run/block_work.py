"""One decoder block on its way from the source's tensors to a shard: its linears solved, tuned, judged and packed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gptq_core.block import walk
from gptq_core.block.group import LayerReport, Member, solve_group
from gptq_core.block.stream import BlockStream, HiddenStates
from gptq_core.block.tuning import tune
from gptq_core.checkpoint.finite import half
from gptq_core.config import QuantizeConfig
from gptq_core.method import solver
from gptq_core.method.hessian import Hessian, Shift
from gptq_core.model import architecture
from gptq_core.model.selection import Selection
from gptq_core.run import assembly
from gptq_core.run.summary import LayerRecord, distribution
from gptq_core.runtime import heap

LARGE_GROUP = 4096
"""Inputs from which solving takes so much memory and time that the heap's free pages are given back before: the forward that follows
must fault them in again, which on a small model is a tenth of the whole run."""


WORST_OUTPUT, WORST_WEIGHT = 0.5, 2.0
"""Squared errors over squares beyond which a layer is not rounded but destroyed. Two bits by the plainest recipe, a row a group, came to
0.34 and 0.83 at most on the models of the benches; a layer whose scales float16 cannot hold has 0.76 and more."""


class BlockWork:
    """A filled decoder block on its way from the source's tensors to a shard."""

    def __init__(
        self,
        stream: BlockStream,
        selection: Selection,
        config: QuantizeConfig,
        states: HiddenStates,
        original: HiddenStates | None,
        index: int,
        block: nn.Module,
        tensors: dict[str, Tensor],
    ) -> None:
        """states: the hidden states that enter the block; original: those of the original model, where targets are shifted. Both leave it
        in `quantize`. tensors: the block's own, by their full names."""
        self.stream, self.selection, self.config, self.states, self.original = stream, selection, config, states, original
        self.index, self.block, self.tensors = index, block, tensors
        self.path = stream.path(index)
        configs, linears = selection.in_block(index), architecture.linears_of(block)
        self.configs = configs
        self.linears = {name: linears[name] for name in configs}
        self.solutions: dict[str, solver.Solution] = {}
        self.reports: dict[str, LayerReport] = {}
        self.weight_errors: dict[str, Tensor] = {}
        self.tuning: dict[str, Any] | None = None
        self.writers: frozenset[str] = frozenset()
        """Linears that write to the residual stream and make up for its error."""

    def quantize(self) -> None:
        """Solve every linear, and take the run's hidden states through the block."""
        stream, config, states = self.stream, self.config, self.states
        with stream.timed("forward"):
            groups = stream.input_groups(self.index, self.block, self.linears)
        original = self._twin()
        inputs = list(states.states) if config.tuning_steps else []
        with stream.timed("forward"):
            walk.walk(
                self.block,
                self.linears,
                groups,
                states.states,
                states.calls[self.index],
                self._solve,
                config.true_sequential,
                original=original,
                timed=stream.timed,
                once=not config.tuning_steps,
            )
        if config.tuning_steps:
            with stream.timed("tuning"):
                self._tune(inputs)

    def _twin(self) -> walk.Original | None:
        """A copy of the block that stays as it is, for the original model's hidden states; None where targets are not shifted."""
        if self.original is None:
            return None
        if self.config.residual_shift:
            with self.stream.timed("forward"):
                self.writers = self.stream.residual_writers(self.index, self.block, self.linears)
        twin = copy.deepcopy(self.block)
        inner = architecture.linears_of(twin)
        return walk.Original(twin, {name: inner[name] for name in self.linears}, self.original.states, self.writers)

    def _solve(self, group: walk.InputGroup, hessian: Hessian, shift: Shift | None) -> None:
        """Solve the linears of an input group, and give them the weights that a reader of the checkpoint will compute with."""
        stream = self.stream
        if stream.device.type == "cpu" and group.in_features >= LARGE_GROUP:
            heap.give_back()  # what the forward up to here has left
        members = [
            Member(f"{self.path}.{name}", self.linears[name].weight, self.configs[name], name in self.writers) for name in group.names
        ]
        for name, solution, report in solve_group(members, hessian, shift, stream.timed):
            self.solutions[name], self.reports[name] = solution, report
            linear = self.linears[name.removeprefix(f"{self.path}.")]
            self.tensors[f"{name}.weight"] = linear.weight.to("meta")  # its pages leave now, not with the block
            weight = solution.weight(stream.dtype)
            self.weight_errors[name] = _squares(weight - linear.weight) / _squares(linear.weight)
            linear.weight.data = weight
            if linear.bias is not None:  # float16 on disk: what follows must see what a consumer will compute
                linear.bias.data = half(linear.bias, f"{name}.bias").to(stream.dtype)

    def _tune(self, inputs: list[Tensor]) -> None:
        """Tune the solutions against the original block's outputs; then the weights and hidden states are those of the tuned ones."""
        path = f"{self.path}."
        assert self.original is not None  # tuning_steps works only with target_shift
        inner = {name.removeprefix(path): solution for name, solution in self.solutions.items()}
        codes = {name: self.configs[name].max_code for name in inner}
        outputs, call = torch.cat(self.original.states), self.states.call(self.index)
        found, tuning = tune(self.block, inner, codes, torch.cat(inputs), outputs, call, self.config.tuning_steps)
        for name, solution in found.items():
            self.linears[name].weight.data = solution.weight(self.stream.dtype)
        self.states.states = inputs
        self.states.run(self.block, self.index)
        self.solutions = {path + name: solution for name, solution in found.items()}
        self.tuning = dataclasses.asdict(tuning) | {"kept": tuning.kept}

    def _judge(self) -> None:
        """Count layers that were destroyed rather than rounded among those that fell back: their report says why."""
        errors = torch.stack(list(self.weight_errors.values())).tolist()  # one wait for a GPU
        for name, error in zip(self.weight_errors, errors, strict=True):
            report = self.reports[name]
            of_outputs = report["relative_error"]
            if of_outputs is not None and (not of_outputs <= WORST_OUTPUT or error > WORST_WEIGHT):  # neither holds for a nan
                report["fallback"] = (
                    f"destroyed: relative error {of_outputs:.3g} of its outputs (limit {WORST_OUTPUT:g}), "
                    f"{error:.3g} of its weights (limit {WORST_WEIGHT:g})"
                )

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the block's shard, and its record for the manifest."""
        with self.stream.timed("pack"):
            self._judge()
            layers: list[LayerRecord] = [
                {**self.reports[name], **distribution(solution, self.selection.layers[name].config.bits)}
                for name, solution in self.solutions.items()
            ]
            shard = assembly.packed(self.tensors, self.solutions, self.selection)
        return shard, {"kind": "block", "block": self.index, "layers": layers} | ({"tuning": self.tuning} if self.tuning else {})


def _squares(tensor: Tensor) -> Tensor:
    """Their sum, in float32."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.square()
