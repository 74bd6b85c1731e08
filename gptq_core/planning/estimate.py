"""What a run will take: memory, bytes and seconds, from shapes and from a measured rate of this machine.

Memory is the highest of these stages. With T calibration tokens, h the hidden size, e bytes of the dtype that blocks are forwarded in:

- capture: what stands before the blocks, one block, hidden states T·h·e, one batch on its way.
- walk: hidden states T·h·e, once more where targets are shifted (the original's stream) or a block is tuned (its inputs); the block dense
  and whole, though its weights leave when all have passed them, once more as stored where that is another dtype, and its copy where
  targets are shifted; what every batch holds while it waits at an input group (footprint.py), twice with targets shifted; and with the
  group of n inputs and o stacked rows what solving it takes: n² float32 for H and for its factor, both once more in the dtype of the tall
  products, n·o for the weights and their codes, and for the rows that are solved at once float32 targets, errors and slopes. See
  `_Costs._solving`.
- tuning: latents, their gradients and Adam's two moments, float32 each, and every tensor of a few windows' forward for the backward.
- head, where it is quantized: as solving, for the rows of the whole vocabulary.
- evaluation: both models whole and dense, the logits of a few windows, or positions of one, five times over (two log-probabilities and
  what KL makes of them), and the hidden states that the engine has not given up yet. For a large model this is the highest.
- allocation, where widths are chosen: block by block PROBE_TOKENS tokens for each unit and width.

On the CPU all of that is in the process, and what is outside the blocks as it is mapped to be written. Mapped files count as resident:
`mapped_bytes` are part of `host_bytes`, but the system can evict such pages when memory runs short.

Seconds are floating-point operations over the measured rate of a product, in the dtype of the forward or in float32, bytes over the
measured rate of an elementwise operation and of sha256, and columns and weights over the rates of a small layer solved with the run's own
config. They go by the stages of a run's record, with two differences: its scales, sweep and descent are one here, `solve`, and
`evaluation` is none there. Texts, imports and MLflow are not in it, nor the choice of widths.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gptq_core.block import tuning
from gptq_core.config import QuantizeConfig
from gptq_core.errors import InputError
from gptq_core.inference.evaluation import pieces
from gptq_core.method import solver
from gptq_core.method.descent import BLOCK
from gptq_core.method.factor import PANEL
from gptq_core.method.hessian import panels, products_dtype
from gptq_core.model import architecture
from gptq_core.model.selection import units_of
from gptq_core.planning.footprint import Footprint, footprints, resident
from gptq_core.planning.plan import Plan
from gptq_core.planning.rates import FLOAT, PROBED, Rates, measure
from gptq_core.work_sizes import PROBE_TOKENS, PROBED_WIDTHS, TOKENS_PER_FORWARD

STEP_TENSORS = 7
"""Float32 tensors of a column block, or of a span of groups, that one step of the sweep or of the descent makes, at most."""
CUDA_CONTEXT = 600_000_000
"""Bytes that CUDA's libraries and context take on a GPU before anything is put there; torch's own count leaves them out."""


@dataclass(frozen=True)
class Texts:
    """How much text a run reads."""

    windows: int
    seqlen: int
    evaluation_seqlen: int
    evaluation_windows: int | None
    """None: not known before the text is read; the seconds of the evaluation are then left out."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes and seconds."""

    blocks: int
    device: str
    dtype: str
    host_bytes: int
    """Highest resident set of the process."""
    mapped_bytes: int
    """The part of it that is mapped source files, which the system can take back."""
    device_bytes: int
    """Highest sum of tensors on the accelerator; 0 on the CPU."""
    stage_bytes: dict[str, int]
    """On the device, or in the process beside its own and the mapped files."""
    read_bytes: int
    """Of files, whether from the disk or from the system's cache: digest, tensors, and both models for the evaluation."""
    write_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage; empty: no rate was measured."""
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"total_seconds": sum(self.seconds.values()) if self.seconds else None}


def estimate(
    found: Plan, config: QuantizeConfig, texts: Texts, *, device: str = "auto", dtype: str = "auto", process_bytes: int, rates: bool = False
) -> Estimate:
    """The estimate for a plan. process_bytes: resident set of the process before any work, with all that it imports.

    device, dtype: as Quantization.open takes them; for a GPU that this machine does not have no rates are measured.
    """
    target, here = planned_device(device)
    costs = _Costs(found, config, texts, target, architecture.choose_dtype(dtype, found.model.config, target))
    stages, on_cpu = costs.stages(), target.type == "cpu"
    mapped = max(0, found.original_bytes - costs.weights * costs.stored.itemsize)
    host, device_bytes = process_bytes + mapped + max(stages.values()), 0
    if on_cpu and stages["evaluation"] + costs.read_again > max(stages.values()):
        mapped += costs.read_again
        host = process_bytes + mapped + stages["evaluation"]
    elif not on_cpu:
        # a model is read into the process before transformers moves it over
        host, device_bytes = process_bytes + mapped + costs.whole_model, max(stages.values()) + CUDA_CONTEXT
    return Estimate(
        blocks=found.selection.blocks,
        device=str(target),
        dtype=str(costs.dtype).removeprefix("torch."),
        host_bytes=host,
        mapped_bytes=mapped,
        device_bytes=device_bytes,
        stage_bytes=stages,
        read_bytes=3 * found.original_bytes + found.bytes,
        write_bytes=found.bytes + found.other_bytes + 8 * (texts.windows * texts.seqlen + costs.judged),
        seconds=costs.seconds(measure(config, target, costs.dtype)) if rates and here else {},
        notes=(ASSUMED,) if any(kind.assumed for kind in costs.kinds) else (),
    )


ASSUMED = "this architecture cannot be run on shapes alone: its activations are estimated from the sizes of its linears"


def planned_device(device: str) -> tuple[torch.device, bool]:
    """The device that a run would take, and whether this machine has it."""
    try:
        return architecture.choose_device(device), True
    except InputError:
        return torch.device(device), False


class _Costs:
    """The formulas. Sizes of a matrix problem are (n inputs, rows)."""

    def __init__(self, found: Plan, config: QuantizeConfig, texts: Texts, device: torch.device, dtype: torch.dtype) -> None:
        self.found, self.config, self.texts, self.device, self.dtype = found, config, texts, device, dtype
        text_config = found.model.config.get_text_config(decoder=True)
        self.hidden: int = text_config.hidden_size
        self.vocabulary: int = text_config.vocab_size
        self.tokens = texts.windows * texts.seqlen
        self.judged = (texts.evaluation_windows or 0) * texts.evaluation_seqlen
        self.shifted = config.target_shift > 0
        self.streams = 2 if self.shifted else 1
        decoder = found.model.decoder(dtype)  # in another one, norms and the like would hold float32 beside it
        self.kinds = footprints(decoder, texts.seqlen)
        self.at_once = max(1, TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD["cuda"]) // texts.seqlen)
        blocks: list[int] = [sum(value.numel() for value in block.state_dict().values()) for block in decoder.blocks]
        self.block = max(blocks)
        self.weights = sum(blocks)
        names = {name: tensor.numel() for name, tensor in decoder.model.state_dict().items()}
        tied = getattr(decoder.model, "all_tied_weights_keys", {})
        self.outside = sum(size for name, size in names.items() if name not in tied) - self.weights
        body = f"{decoder.model.base_model_prefix}."
        self.before = sum(size for name, size in names.items() if name.startswith(body)) - self.weights
        self.products = solver.products_dtype(dtype, device)
        self.chunk = solver.ROWS_AT_ONCE.get(device.type, solver.ROWS_AT_ONCE["cuda"])
        self.chunks_at_once = torch.get_num_threads() if device.type == "cpu" else 1
        self.stored = architecture.own_dtype(found.model.config) or torch.float32  # as plan.Presumed takes it
        judged_in = architecture.judging_dtype(found.model.config, device)
        self.judged_size = judged_in.itemsize
        self.whole_model = (self.weights + self.outside) * judged_in.itemsize
        # transformers maps the shards once more while it converts them
        self.read_again = 0 if self.stored == judged_in else found.original_bytes

    # -- memory -------------------------------------------------------------------------------------------------------

    def stages(self) -> dict[str, int]:
        hidden = self.tokens * self.hidden * self.dtype.itemsize
        stream = self.at_once * self.texts.seqlen * self.hidden * self.dtype.itemsize
        kept = hidden * self.streams
        found = {
            "capture": self.before * self.dtype.itemsize + self.block * self.dtype.itemsize + hidden + 4 * stream,
            "walk": kept + max(self._walk(kind, hidden) for kind in self.kinds),
        }
        if self.config.tuning_steps:
            found["tuning"] = kept + hidden + self._tuning(hidden)
        if heads := self._heads():
            outside = self.before * self.dtype.itemsize
            found["head"] = kept + outside + max(self._solving(n, rows) + self.dtype.itemsize * n * rows for n, rows in heads)
        if self.config.allocate:
            units = len(units_of(self.found.selection))
            probe = max(PROBE_TOKENS, self.texts.seqlen) * self.hidden * self.dtype.itemsize
            found["allocation"] = found["walk"] + units * PROBED_WIDTHS * probe
        windows, positions = pieces(self.vocabulary, self.texts.evaluation_seqlen)
        windows = min(windows, self.texts.evaluation_windows or windows)
        forward = max(kind.highest for kind in self.kinds) / self.texts.seqlen * windows * self.texts.evaluation_seqlen
        forward *= max(1.0, self.judged_size / self.dtype.itemsize)
        found["evaluation"] = kept + 2 * self.whole_model + 5 * windows * positions * self.vocabulary * FLOAT + forward
        return {name: int(size) for name, size in found.items()}

    def _walk(self, kind: Footprint, hidden: int) -> int:
        block = self.block * (self.dtype.itemsize * self.streams + (self.stored.itemsize if self.stored != self.dtype else 0))
        waiting = resident(kind, self.texts.windows, self.at_once, self.streams, heap=self.device.type == "cpu")
        problems = [(group.in_features, self._rows(group.names)) for group in kind.groups]
        written = 2 * hidden if self.config.residual_shift else 0
        solving = [self._solving(n, rows, self.hidden if self.shifted else 0) if rows else 0 for n, rows in problems]
        if not self.config.true_sequential:
            sums = sum(n * n * FLOAT * self.streams for n, _ in problems)
            return int(block + hidden + sums + max(solving) + kind.highest * min(self.at_once, self.texts.windows))
        at = [held + size + (written if number else 0) for number, (held, size) in enumerate(zip(waiting.at, solving))]  # noqa: B905
        solved = self.block * (1 + FLOAT * bool(self.config.tuning_steps))  # codes of the block, and latents
        return int(block + solved + max(*at, waiting.highest + written))

    def _solving(self, n: int, rows: int, residual: int = 0) -> int:
        """Bytes to solve n inputs and so many stacked rows, H included. residual: hidden size where targets are shifted.

        One after another: the Hessian's sum takes in a batch; the mean, which has its place, is factored beside the stacked weights;
        targets are shifted, with ΔC, its mean, a damped matrix, its factor and a copy of that; the operands of the tall products are made;
        the rows are solved; and the weights are dequantized.
        """
        config, square, matrix, size = self.config, FLOAT * n * n, n * rows, self.dtype.itemsize
        shifts = square + FLOAT * n * residual if residual else 0
        batch = self.at_once * self.texts.seqlen * n
        cast = batch * FLOAT if products_dtype(self.dtype, self.device) != self.dtype else 0
        adding = square + shifts + cast + (batch * size + cast if residual else 0)
        factoring = 2 * square + shifts + size * matrix + 2 * FLOAT * PANEL * n
        shifting = 5 * square + shifts + (size + 3 * FLOAT) * matrix if residual else 0
        descends = bool(config.refit or config.descent)
        permuted = square if descends and config.desc_act else 0
        coarse = self.products.itemsize * n * n * (1 + descends) if self.products != torch.float32 else 0
        blocks = n * solver.COLUMN_BLOCK * (FLOAT + self.products.itemsize)
        beside = size * matrix + (FLOAT * matrix if residual else 0)
        kept = matrix * (1 + FLOAT * bool(config.tuning_steps)) * (2 if rows > self.chunk else 1)  # the parts are put together
        flying = self._rows_in_flight(n, min(rows, self.chunk * self.chunks_at_once), descends)
        preparing = 2 * square + shifts + permuted + max(coarse, permuted) + blocks + beside
        held = square if coarse else 2 * square  # L stays where it is the operand of the tall products itself
        sweeping = held + shifts + permuted + coarse + blocks + beside + kept + flying
        writing = square + shifts + beside + (1 + size) * matrix
        return int(max(adding, factoring, shifting, preparing, sweeping, writing))

    def _rows_in_flight(self, n: int, rows: int, descends: bool) -> float:
        """Bytes of the rows that are solved at once, their codes aside, which stay.

        Of their whole length: the target, δ and the errors during the sweep; the slope, the errors or what has moved, and under desc_act
        the codes in another order during the descent; twice the latents' parts. Of a span's, near BLOCK columns or a group: what one
        step makes. And a group's scales and zeros.
        """
        size = n if self.config.group_size == -1 else self.config.group_size
        span, coarse = min(n, max(BLOCK, size)), self.products.itemsize
        fitting = n if self.config.static_groups or size == n else span  # min_max looks at all groups at once
        packed = coarse if self.products != torch.float32 else 0  # oneDNN copies an operand into a layout of its own
        swept = FLOAT + (1 + descends) * coarse + packed + FLOAT * max(STEP_TENSORS * span, fitting) / n
        descended = FLOAT + coarse + packed + 1 + STEP_TENSORS * FLOAT * span / n if descends else 0.0
        latents = 7 * FLOAT + coarse if self.config.tuning_steps else 0.0
        return n * rows * (max(swept, descended, latents) + 2 * FLOAT / size)

    def _rows(self, names: tuple[str, ...]) -> int:
        """Stacked rows of a group's linears that are quantized in the same way, at most."""
        found = self.found.selection
        rows: dict[str, int] = {}
        for name in names:
            layer = next(
                (
                    found.layers.get(f"{found.prefix}.{index}.{name}")
                    for index in range(found.blocks)
                    if f"{found.prefix}.{index}.{name}" in found.layers
                ),
                None,
            )
            if layer:
                rows[str(layer.config)] = rows.get(str(layer.config), 0) + layer.out_features
        return max(rows.values(), default=0)

    def _heads(self) -> list[tuple[int, int]]:
        layers = self.found.selection.layers.items()
        return [(layer.in_features, layer.out_features) for name, layer in layers if not name.startswith(f"{self.found.selection.prefix}.")]

    def _tuning(self, hidden: int) -> int:
        # inputs and targets once more in one piece; latents, gradients, two moments; each forward's weights and what led to them
        windows = min(tuning.WINDOWS_A_STEP, self.at_once, self.texts.windows)
        graph = max(kind.made for kind in self.kinds) * windows
        return int(2 * hidden + self.block * (self.dtype.itemsize + FLOAT * (1 + 4 + 5) + 1) + graph)

    # -- seconds ------------------------------------------------------------------------------------------------------

    def seconds(self, rates: Rates) -> dict[str, float]:
        config, times = self.config, self.found.selection.blocks / len(self.kinds)
        inside = [(g.in_features, self._rows(g.names)) for kind in self.kinds for g in kind.groups]
        problems = [(times, n, rows) for n, rows in inside if rows] + [(1, n, rows) for n, rows in self._heads()]
        forwards = self.streams + (not config.true_sequential) + bool(config.tuning_steps)
        made = sum(kind.made for kind in self.kinds) / len(self.kinds) / self.texts.seqlen * self.found.selection.blocks
        pushed = self._forward(self.texts.seqlen) * self.tokens / rates.product + 2 * made * self.tokens / rates.elementwise
        judging = rates.product if self.device.type == "cuda" else rates.exact
        in_hessians = rates.exact if products_dtype(self.dtype, self.device) == torch.float32 else rates.product
        found = {
            "read": self.found.original_bytes * (1 / rates.digest + 3 / rates.elementwise),
            "forward": forwards * pushed,
            "hessian": sum(count * self._hessian(n) for count, n, _ in problems) / in_hessians,
            "factor": sum(count * n**3 / 3 for count, n, _ in problems) / rates.exact,
            "solve": sum(count * self._solve(n, rows, rates) for count, n, rows in problems),
            "pack": sum(count * n * rows for count, n, rows in problems) * 8 / rates.elementwise,
            "write": self.found.bytes * (1 / rates.digest + 3 / rates.elementwise),
        }
        if self.shifted:
            sums = sum(2.0 * self.tokens * n * n for n, rows in inside if rows)
            targets = sum(n**3 / 3 + 4.0 * n * n * rows for n, rows in inside if rows)
            found["shift"] = times * (sums / in_hessians + targets / rates.exact)
        if steps := config.tuning_steps:
            tokens = min(tuning.WINDOWS_A_STEP, self.texts.windows) * self.texts.seqlen
            once = 3 * self._forward(self.texts.seqlen) * tokens / rates.product + 6 * made * tokens / rates.elementwise
            found["tuning"] = steps * (once + 40 * FLOAT * self.weights / rates.elementwise)
        if self.judged:
            head = 2 * self.hidden * self.vocabulary
            each = (self._forward(self.texts.evaluation_seqlen) + head) / judging + 2 * made / rates.elementwise
            logits = 20 * FLOAT * self.vocabulary / rates.elementwise
            found["evaluation"] = self.judged * (2 * each + logits) + 6 * self.whole_model / rates.elementwise
        return found

    def _forward(self, seqlen: int) -> float:
        """Operations a token: a product for each weight of the blocks, and attention on half the window."""
        return 2.0 * self.weights + 2.0 * seqlen * self.hidden * self.found.selection.blocks

    def _hessian(self, n: int) -> float:
        return 2.0 * self.tokens * sum((stop - start) * (n - start) for start, stop in panels(n, self.device))

    def _solve(self, n: int, rows: int, rates: Rates) -> float:
        """The measured rates hold for PROBED columns; what grows with n² is products alone."""
        passes = max(self.config.descent, 1) if self.config.refit or self.config.descent else 0
        tall = 1 + (1 + 1 + 2 * (passes - 1) if passes else 0)  # the sweep; the slope, half of H in the first pass, all of it later
        beyond = n * rows * max(n - PROBED, 0)
        coarse = rates.product if self.products == self.dtype else rates.exact
        latents = 2 * beyond / rates.exact if self.config.tuning_steps else 0
        threads = solver.threads_for(rows, self.device)
        return n * rates.column + n * rows * rates.weight / threads + tall * beyond / coarse + latents


# -- rates ----------------------------------------------------------------------------------------------------------------
