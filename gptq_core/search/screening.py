"""Judge many configurations of one model from one capture: what a sweep with `mode: screening` runs.

    found = screen(model, {"w4": QuantizeConfig(bits=4), "w3": QuantizeConfig(bits=3)}, calibration, heldout)

The decoder blocks are walked once for all cells, a cell being one configuration. In each block:

1. The original model's calibration windows pass. One forward gives the Hessians of its input groups, one after another, and the
   inputs of the next block.
2. On each Hessian every cell solves the linears that it selects, by the engine's own `solve_group`. Cells of equal column order and
   damping share the factor.
3. The held-out windows pass: once as in the original, and once for each cell with its own hidden states and its dequantized weights,
   exact in float16 as its checkpoint would have them.

After the last block, norm and head turn every stream into the figures of `evaluate_pair`. A block's tensors are read once, and
nothing is stored.

What screening means:

- A Hessian is that of the original's inputs. In an exact run it is that of the inputs which the quantized layers before have changed.
  So the figures rank configurations, and are not those of a checkpoint: results are labelled `screening`, and there is none to publish.
  The first input group of the first block has the codes of an exact run.
- target_shift, residual_shift and tuning_steps answer to what was quantized upstream, and here nothing is. They are set aside: a cell
  is solved as if they were 0, and `Screened.set_aside` names them. Configurations that differ in nothing else come out equal.
  What recipes best and max gain by them, screening does not see: it may rank such a cell behind one that it beats.
- All cells see the same calibration windows, and every layer the original inputs: `dataset` is not read and `true_sequential` makes
  no difference.
- Cells may differ in the linears that they select; what a cell does not select stays as it is. A quantized head is solved on the
  original's final hidden states.

Memory in bytes, for K cells, T calibration and E held-out tokens, hidden size h, b bytes an element, W weights in a block, n inputs of
the group that is being solved, and F different factors of its Hessian:

    b h (T + (K + 1) E)  +  W (2 b + K)  +  4 n² (2 + 2 F)

the hidden states, the block with one cell's dequantized weights and the codes of all, and one Hessian. For nine cells with the same
factors on the shape of Llama-3-8B in bfloat16, 128 × 2048 calibration and 96 × 2048 held-out tokens: 18 + 3 + 3 GB.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq_core.block.group import Member, solve_group
from gptq_core.block.stream import BlockStream, HiddenStates, check_token_ids, quantized
from gptq_core.config import QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.errors import EvaluationError, FactorizationError, InputError
from gptq_core.inference.evaluation import Comparison, log_probabilities, pieces, vocabulary_of
from gptq_core.method import solver
from gptq_core.method.factor import Factor, column_order, factorize
from gptq_core.method.hessian import Hessian
from gptq_core.model.architecture import head_name, linears_of
from gptq_core.model.opened import Model, OpenedModel, open_model
from gptq_core.model.selection import Selection
from gptq_core.planning.plan import plan
from gptq_core.runtime.timing import Stages

SET_ASIDE = {"target_shift": 0.0, "residual_shift": 0.0, "tuning_steps": 0}
"""What has no meaning where nothing upstream is quantized, and its value for that."""


@dataclass(frozen=True)
class Screened:
    """What one configuration came to. Measured figures are None where `error` says why there are none."""

    original_perplexity: float | None
    quantized_perplexity: float | None
    kl: float | None
    """KL(original || this cell) per token."""
    top1_agreement: float | None
    bits_per_weight: float
    bytes: int
    """Size of the checkpoint that the configuration would write, as `plan` predicts it."""
    original_bytes: int
    """Size of the model as it is."""
    seconds: float
    """Spent in this cell's solves. A factor that several cells share counts for the first of them."""
    set_aside: tuple[str, ...]
    """Fields of the config that screening took for 0."""
    fallback_layers: tuple[str, ...] = ()
    """Linears that were rounded to nearest, which on_failure: round allows."""
    error: str | None = None
    """Why the cell could not be solved; the others went on without it."""

    def record(self) -> dict[str, Any]:
        """As JSON, with its label."""
        return {"mode": "screening"} | dataclasses.asdict(self)


def screen(
    model: Model,
    configs: Mapping[str, QuantizeConfig],
    calibration: Windows,
    heldout: Windows,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_block: Callable[[int, int], None] | None = None,
) -> dict[str, Screened]:
    """Each configuration's result under its name; what that is, is in this module's docstring. on_block: blocks done, of how many.

    Raises InputError before any work, as Quantization.open does, for a config with `allocate`, and for token ids beyond the
    vocabulary. A cell that cannot be factored, or for whose solves the device's memory is too small, is an `error` in its result.
    """
    if not configs:
        raise InputError("configs = {}: screening needs one configuration at least; name one")
    for name, config in configs.items():
        if config.allocate:
            raise InputError(
                f"configs[{name!r}]: quantization.allocate cannot be screened, a cell's widths must be given; choose them first with "
                "allocate(model, config, windows).apply(config), or drop it"
            )
    opened = open_model(model, revision)
    cells = [_cell(opened, name, config) for name, config in configs.items()]
    with BlockStream.open(opened, dtype=dtype, device=device) as stream:
        check_token_ids(calibration, opened.config, "calibration")
        check_token_ids(heldout, opened.config, "held-out")
        _Screening(stream, cells).run(calibration, heldout, on_block or (lambda done, total: None))
    return {cell.name: cell.result() for cell in cells}


# -- one cell -------------------------------------------------------------------------------------------------------------


@dataclass
class _Cell:
    """A configuration on its way through the blocks."""

    name: str
    config: QuantizeConfig
    """As it is solved."""
    selection: Selection
    bits_per_weight: float
    bytes: int
    original_bytes: int
    set_aside: tuple[str, ...]
    states: HiddenStates | None = None
    """Of the held-out windows, in this cell; None before they enter the model, and for a cell that has failed."""
    solutions: dict[str, solver.Solution] = field(default_factory=dict)
    """Of the block at hand, by full names; at last of the head."""
    fallbacks: list[str] = field(default_factory=list)
    comparison: Comparison = field(default_factory=Comparison)
    seconds: float = 0.0
    error: str | None = None

    def solve(self, modules: dict[str, nn.Linear], hessian: Hessian, timed: Stages, factors: _Factors) -> None:
        """Solve what this cell selects of an input group. A failure ends the cell, and it alone."""
        layers = self.selection.layers
        members = [Member(name, linear.weight, layers[name].config) for name, linear in modules.items() if name in layers]
        if not members:
            return
        started = time.perf_counter()
        try:
            for name, solution, report in solve_group(members, hessian, None, timed, factors):
                self.solutions[name] = solution
                if report["fallback"]:
                    self.fallbacks.append(name)
        except FactorizationError as error:
            self._end(str(error))
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            self._end(f"{members[0].name}: no memory left to solve it ({reason}); screen fewer cells or held-out windows at a time")
        self.seconds += time.perf_counter() - started

    def _end(self, why: str) -> None:
        self.error, self.states, self.solutions = why, None, {}

    def weights(self, linears: Mapping[str, nn.Linear], dtype: torch.dtype) -> dict[nn.Linear, Tensor]:
        return {linears[name]: solution.weight(dtype) for name, solution in self.solutions.items()}

    def result(self) -> Screened:
        figures = None
        try:
            figures = None if self.error else self.comparison.figures()
        except EvaluationError as error:
            self.error = str(error)
        return Screened(
            original_perplexity=figures and figures["original_perplexity"],
            quantized_perplexity=figures and figures["quantized_perplexity"],
            kl=figures and figures["kl"],
            top1_agreement=figures and figures["top1_agreement"],
            bits_per_weight=self.bits_per_weight,
            bytes=self.bytes,
            original_bytes=self.original_bytes,
            seconds=self.seconds,
            set_aside=self.set_aside,
            fallback_layers=tuple(self.fallbacks),
            error=self.error,
        )


def _cell(model: OpenedModel, name: str, config: QuantizeConfig) -> _Cell:
    plain = config.model_copy(update=SET_ASIDE)
    try:
        planned = plan(model, plain)
    except InputError as error:
        raise type(error)(f"configs[{name!r}]: {error}") from error
    set_aside = tuple(key for key, off in SET_ASIDE.items() if getattr(config, key) != off)
    return _Cell(name, plain, planned.selection, planned.bits_per_weight, planned.bytes, planned.original_bytes, set_aside)


class _Factors:
    """`factorize` on one Hessian, once for all cells of the same column order and damping."""

    def __init__(self) -> None:
        self._found: dict[tuple[float | str, bytes], Factor] = {}

    def __call__(self, hessian: Tensor, config: QuantizeConfig, layer: str, tokens: int) -> Factor:
        key = config.damp_percent, column_order(hessian.diagonal(), config).cpu().numpy().tobytes()
        if key not in self._found:
            self._found[key] = factorize(hessian, config, layer, tokens)
        return self._found[key]


# -- all cells ------------------------------------------------------------------------------------------------------------


class _Screening:
    """The original's calibration windows, and the held-out windows in the original and in every cell, on their way through the blocks."""

    def __init__(self, stream: BlockStream, cells: list[_Cell]) -> None:
        self._stream, self._cells = stream, cells

    def run(self, calibration: Windows, heldout: Windows, on_block: Callable[[int, int], None]) -> None:
        """Take the cells through the model; what they come to is in them."""
        states, original = self._stream.enter(calibration, heldout)
        for cell in self._cells:
            cell.states = original.copy()
        for index in range(self._stream.block_count):
            if not self._alive():
                return
            self._pass(index, states, original)
            on_block(index + 1, self._stream.block_count)
        self._compare(states, original, pieces(vocabulary_of(self._stream.decoder.model), heldout.seqlen)[0])

    def _alive(self) -> list[tuple[_Cell, HiddenStates]]:
        """The cells that have not failed, with their held-out windows."""
        return [(cell, cell.states) for cell in self._cells if cell.states is not None]

    def _pass(self, index: int, states: HiddenStates, original: HiddenStates) -> None:
        stream = self._stream
        names = dict.fromkeys(name for cell, _ in self._alive() for name in cell.selection.in_block(index))
        with stream.pass_original(index, states, names, self._solve) as block:
            linears = {f"{stream.path(index)}.{name}": linear for name, linear in linears_of(block).items()}
            original.run(block, index)
            for cell, heldout in self._alive():
                with quantized(cell.weights(linears, stream.dtype)):
                    heldout.run(block, index)
                cell.solutions = {}

    def _solve(self, modules: dict[str, nn.Linear], hessian: Hessian) -> None:
        factors = _Factors()
        for cell, _ in self._alive():
            cell.solve(modules, hessian, self._stream.timed, factors)

    def _compare(self, states: HiddenStates, original: HiddenStates, at_once: int) -> None:
        """Solve the head where it takes part, and compare the cells with the original, `at_once` windows at a time."""
        stream = self._stream
        with stream.outside_filled() as model:
            name, heads = head_name(model), dict[str, nn.Linear]()
            if name is not None and any(name in cell.selection.layers for cell, _ in self._alive()):
                heads[name] = model.get_output_embeddings()
                self._solve(heads, stream.head_hessian(states, heads[name]))
            states.states = []
            for number, batch in enumerate(original.batches):
                for start in range(0, len(batch), at_once):
                    here = slice(start, start + at_once)
                    targets = batch[here][:, 1:].flatten()
                    answers = log_probabilities(stream.logits(batch[here], original.states[number][here]))
                    for cell, heldout in self._alive():
                        with quantized(cell.weights(heads, stream.dtype)):
                            found = log_probabilities(stream.logits(batch[here], heldout.states[number][here]))
                            cell.comparison.add(answers, found, targets)
