"""What each stage of a run must cost: operations or bytes by formula, over rates measured on the same machine in the same run.

For a linear of n inputs and r outputs, the linears of an input group stacked, and T calibration tokens:

forward   2 · weights · T, and attention on half of each window: 2 · seqlen · heads · head_dim · T; per stream
hessian   T n² per group: the symmetric half
shift     2 T n² for ΔC and 2 T n · hidden for ΔR; n³/3 + 4 n² r to solve for the targets
factor    n³/3 per group
scales    8 operations a weight and candidate (scale, round, clamp, unscale, subtract, square, weigh, sum); min-max: 2 a weight
sweep     n² r for the tall products, n B r for the small ones with R_bb⁻ᵀ and inside column blocks of B = 128
descent   n² r for the first slopes, n² r for the last pass and 2 n² r for every other one, n B r a pass inside the blocks
pack      codes read once to pack and once to count, packed words written
read      every shard digested once, as many at a time as there are cores, or the largest alone where that takes longer; reading itself can
          be hidden behind the work
write     every written byte digested once

Tall products count at the rate of their operands' dtype, what is inside the blocks at that of float32, and an elementwise operation as half
a multiply and add of a float32 product. Nothing is charged for what fills and empties memory between the products: norms, rotations, casts,
copies. Tuning has no floor.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from os import sched_getaffinity
from typing import Any

import torch

from gptq_core import Quantization
from gptq_core.kernels.constants import coarse_candidates, fine_offsets
from gptq_core.method import solver
from gptq_core.method.hessian import products_dtype
from gptq_core.model import architecture
from gptq_core.planning.footprint import footprints
from gptq_core.planning.rates import least

COLUMN_BLOCK = 128
OPERATIONS_A_CANDIDATE = 8
SUSPECT = 3.0
"""Times its floor from which a stage is to be explained."""


@dataclass(frozen=True)
class Rates:
    """Of this machine, in units a second."""

    products: dict[str, float]
    """FLOP of a square matrix product, by dtype."""
    elementwise: float
    """Elementwise float32 operations, one a lane and clock: half of a float32 product's."""
    copy: float
    """Bytes read and written by a copy of what fits no cache."""
    digest: float
    """Bytes of one sha256."""
    digests: float
    """Bytes of as many at once as there are cores."""

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """One stage's least: so many units of which a rate is known."""

    amount: float
    unit: str
    rate: str
    seconds: float


def measure(device: torch.device, dtypes: set[torch.dtype], small: bool = False) -> Rates:
    """The rates, in some seconds. `small`: on less work, for a look whether all is in place."""
    gpu = device.type == "cuda"
    side = 256 if small else 8192 if gpu else 2048
    products = {}
    for dtype in sorted(dtypes | {torch.float32}, key=str):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 / least(lambda left=left, right=right: left @ right, device)
    source = torch.ones((1 << 20) if small else (1 << 30) if gpu else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / least(lambda: target.copy_(source), device)
    data, cores = bytes(1 << 24), len(sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        digest = len(data) / least(lambda: sha256(data).digest(), device)
        digests = cores * len(data) / least(lambda: list(pool.map(lambda _: sha256(data).digest(), range(cores))), device)
    return Rates(products, products["float32"] / 2, copied, digest, digests)


def sweep_flop(n: int, rows: int) -> tuple[float, float]:
    """Matrix products of the sweep over a layer of n inputs: the tall ones, and those inside and beside column blocks."""
    return float(n * n * rows), float(n * COLUMN_BLOCK * rows)


def floors(run: Quantization, rates: Rates) -> dict[str, Floor]:
    """By stage, of a run that is complete; the formulas stand at the top."""
    config = run.config
    inputs, sums, tall = (
        str(dtype).removeprefix("torch.")
        for dtype in (
            run.stream.dtype,
            products_dtype(run.stream.dtype, run.stream.device),
            solver.products_dtype(run.stream.dtype, run.stream.device),
        )
    )
    tokens, groups = run.windows.tokens.numel(), _groups(run)
    amounts = {"forward": (_forward(run), inputs), "hessian": (tokens * sum(n * n for n, _, _ in groups), sums)}
    rounds = max(config.descent, 1) if config.refit or config.descent else 0
    if config.target_shift:
        written = sum(2 * tokens * n * rows for n, rows, writes in groups if writes and config.residual_shift)
        amounts["shift: products"] = (written + sum(2 * tokens * n * n for n, _, _ in groups), sums)
        amounts["shift: targets"] = (sum(n**3 / 3 + 4 * n * n * rows for n, rows, _ in groups), "float32")
    amounts["factor"] = (sum(n**3 / 3 for n, _, _ in groups), "float32")
    weights = sum(n * rows for n, rows, _ in groups)
    candidates = len(coarse_candidates(config.sym)) + len(fine_offsets())
    tried = OPERATIONS_A_CANDIDATE * candidates if config.scale_search == "weighted" else 2
    amounts["scales"] = (tried * weights, "elementwise")
    swept = [sweep_flop(n, rows) for n, rows, _ in groups]
    amounts |= {"sweep: tall": (sum(far for far, _ in swept), tall), "sweep: inside": (sum(near for _, near in swept), "float32")}
    if rounds:
        amounts["descent: tall"] = (sum(2 * rounds * far for far, _ in swept), tall)
        amounts["descent: inside"] = (sum(rounds * near for _, near in swept), "float32")
    amounts["pack"] = ((2 + config.bits / 8) * weights, "copy")
    shards = [(run.stream.source.folder / file).stat().st_size for file in run.stream.source.shards()]
    alone = max(shards) / rates.digest > sum(shards) / rates.digests
    amounts["read"] = (max(shards), "digest") if alone else (sum(shards), "digests")
    files = [size for record in run.output.records if record["kind"] in ("block", "rest") for size in record["files"].values()]
    amounts["write"] = (sum(files), "digest")
    known = rates.products | {"elementwise": rates.elementwise, "copy": rates.copy, "digest": rates.digest, "digests": rates.digests}
    units = {"elementwise": "operations", "copy": "bytes", "digest": "bytes", "digests": "bytes"}
    found = {stage: Floor(float(amount), units.get(rate, "FLOP"), rate, amount / known[rate]) for stage, (amount, rate) in amounts.items()}
    return _joined(found)


def _groups(run: Quantization) -> list[tuple[int, int, bool]]:
    """(inputs, stacked rows, written to the residual stream) of every input group of every block that is quantized.

    Whether a group writes to the stream is told by its shape: one linear with as many outputs as the stream is wide.
    """
    prefix, layers = run.stream.decoder.prefix, run.selection.layers
    hidden = run.stream.decoder.model.config.get_text_config(decoder=True).hidden_size
    found = []
    # a decoder of its own, since that of the run may have parts on its device
    empty = architecture.find_decoder(architecture.empty_model(copy.deepcopy(run.stream.decoder.model.config), run.stream.dtype))
    kinds = {group.names for kind in footprints(empty, run.windows.seqlen) for group in kind.groups}
    for index in range(run.block_count):
        for names in kinds:
            members = [layers[full] for name in names if (full := f"{prefix}.{index}.{name}") in layers]
            if members:
                rows = [layer.out_features for layer in members]
                found.append((members[0].in_features, sum(rows), rows == [hidden]))
    return found


def _forward(run: Quantization) -> float:
    config = run.stream.decoder.model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(linear.weight.numel() for block in run.stream.decoder.blocks for linear in architecture.linears_of(block).values())
    attention = run.windows.seqlen * config.num_attention_heads * head_dim * run.block_count
    streams = 1 + (run.config.target_shift > 0) + (not run.config.true_sequential)
    return 2.0 * run.windows.tokens.numel() * (weights + attention) * streams


def _joined(found: dict[str, Floor]) -> dict[str, Floor]:
    """Parts of a stage, "stage: part", as one."""
    stages: dict[str, list[Floor]] = {}
    for name, part in found.items():
        stages.setdefault(name.partition(":")[0], []).append(part)
    return {
        name: Floor(
            sum(part.amount for part in parts),
            parts[0].unit,
            " + ".join(dict.fromkeys(part.rate for part in parts)),
            sum(part.seconds for part in parts),
        )
        for name, parts in stages.items()
    }


def stage_records(seconds: dict[str, float], found: dict[str, Floor]) -> dict[str, dict[str, Any]]:
    """Each stage's seconds beside its floor; of one that has none, the seconds alone."""
    stages = {name: {"seconds": value} for name, value in seconds.items()}
    for name, floor in found.items():
        own = stages.setdefault(name, {"seconds": 0.0})
        own["floor"] = asdict(floor)
        own["ratio"] = own["seconds"] / floor.seconds
    return stages


def table(stages: dict[str, dict[str, Any]], wall: float) -> str:
    """Markdown; what is more than SUSPECT times its floor is bold. Stages of several threads may sum up to more than the wall."""
    lines = ["| stage | s | of the wall | floor, s | ratio | what the floor counts | achieved |", "|---" * 7 + "|"]
    for name, own in sorted(stages.items(), key=lambda item: -item[1]["seconds"]):
        cells = [name, f"{own['seconds']:.3f}", f"{own['seconds'] / wall:.0%}", "", "", "", ""]
        if floor := own.get("floor"):
            ratio = f"{own['ratio']:.1f}"
            achieved = f"{floor['amount'] / own['seconds'] / 1e9:.1f} G/s" if own["seconds"] else ""
            cells[3:] = [
                f"{floor['seconds']:.3f}",
                f"**{ratio}**" if own["ratio"] > SUSPECT else ratio,
                f"{floor['amount']:.3g} {floor['unit']} ({floor['rate']})",
                achieved,
            ]
        lines.append(f"| {' | '.join(cells)} |")
    least_of_all = sum(own["floor"]["seconds"] for own in stages.values() if "floor" in own)
    counted = sum(own["seconds"] for own in stages.values())
    lines.append(f"| outside the stages | {wall - counted:.3f} | {(wall - counted) / wall:.0%} | | | | |")
    lines.append(f"| all | {wall:.3f} | 100% | {least_of_all:.3f} | {wall / least_of_all:.1f} | | |")
    return "\n".join(lines)


def rates_line(rates: Rates) -> str:
    products = ", ".join(f"{name} product {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.products.items())
    return (
        f"Measured in this run: {products}, elementwise {rates.elementwise / 1e9:.1f} G/s, copy {rates.copy / 1e9:.1f} GB/s, sha256 "
        f"{rates.digest / 1e9:.2f} GB/s, on all cores {rates.digests / 1e9:.2f} GB/s."
    )
