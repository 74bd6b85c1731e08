"""The solver alone, given H: ours beside a plain loop as the paper writes it, and beside the matrix products that it cannot do without.

    PYTHONPATH=. python tests/bench/solver.py [--sizes 1024,2048,4096,8192] [--threads 2] [--rounds 3]

For each size a layer of size × size (--rows: other numbers of outputs) and a Hessian of twice as many tokens. What is timed:

factor      from H to what the columns are processed with: ours damping, order and one Cholesky; the loop's damping, Cholesky, inverse and
            Cholesky
sweep       from that and the weight to codes. The loop fits min-max scales as it comes to each group; so does `classic`, in the same time.
            `static` fits them before. `tuned` searches scales before, sweeps, and descends afterwards; the three are told apart

All of them once in every round, beside a square float32 product of that size; medians over the rounds, ratios within a round. Products of
the sweep: in² · rows FLOP for the tall ones, in · 128 · rows for the small ones beside and inside the column blocks. Growth: seconds over
rows · in², and how they grow from each size to the next. Into --out go a dated .json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floors import sweep_flop
from machine import Others, begun, head, write
from torch import Tensor

from gptq_core import QuantizeConfig
from gptq_core.method.factor import factorize
from gptq_core.method.hessian import Hessian
from gptq_core.method.solver import solve
from gptq_core.runtime.timing import Stages

HERE = Path(__file__).parent
CPU = torch.device("cpu")
DAMPING = 0.1


def textbook_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def textbook_sweep(weight: Tensor, factor: Tensor, bits: int, group_size: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """Rounded weight and loss of each row of a weight (out, in): Algorithm 1 of Frantar et al. 2022 (arXiv 2210.17323), column by column
    in blocks, symmetric min-max scales on the weights as they are when a group is reached."""
    left, rounded, losses = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    middle = 2 ** (bits - 1)
    for begin in range(0, weight.shape[1], block):
        end = min(begin + block, weight.shape[1])
        part, own = left[:, begin:end].clone(), factor[begin:end, begin:end]
        chosen, errors, lost = (torch.zeros_like(part) for _ in range(3))
        for i in range(end - begin):
            if (begin + i) % group_size == 0:
                group = part[:, i : i + group_size] if group_size <= block else left[:, begin : begin + group_size]
                scale = (2 * group.abs().amax(1) / (2 * middle - 1)).clamp(min=1e-10)
            column = part[:, i]
            chosen[:, i] = scale * (torch.clamp(torch.round(column / scale) + middle, 0, 2 * middle - 1) - middle)
            error = (column - chosen[:, i]) / own[i, i]
            part[:, i:] -= error.unsqueeze(1) @ own[i, i:].unsqueeze(0)
            errors[:, i], lost[:, i] = error, error**2
        rounded[:, begin:end], losses[:, begin:end] = chosen, lost
        left[:, end:] -= errors @ factor[begin:end, end:]
    return rounded, losses.sum(1)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def problem(rows: int, columns: int) -> tuple[Tensor, Hessian]:
    """A weight, and the Hessian of correlated inputs with a wide spectrum."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=draws) * torch.rand(columns, generator=draws)
    inputs += torch.randn(2 * columns, 1, generator=draws)
    hessian = Hessian(columns, CPU)
    hessian.add(inputs)
    return torch.randn(rows, columns, generator=draws), hessian


def one_round(weight: Tensor, hessian: Tensor, tokens: int, bits: int, group_size: int) -> dict[str, float]:
    """Seconds of everything once; and `loss`, ours (classic) over the loop's."""
    rows, columns = weight.shape
    square = torch.randn(columns, columns)
    found = {"gemm": timed(lambda: square @ square)[0] / (2 * columns**3) * sum(sweep_flop(columns, rows))}
    found["textbook factor"], upper = timed(lambda: textbook_factor(hessian))
    found["textbook sweep"], (_, loss) = timed(lambda: textbook_sweep(weight, upper, bits, group_size))
    common = {"bits": bits, "group_size": group_size, "damp_percent": DAMPING}
    configs = {
        "classic": QuantizeConfig(**common, recipe="classic", act_group_aware=False),
        "static": QuantizeConfig(**common, recipe="classic", static_groups=True),
        "tuned": QuantizeConfig(**common, recipe="tuned"),
    }
    for name, config in configs.items():
        found["factor"], factor = timed(lambda config=config: factorize(hessian, config, "bench", tokens))
        stages = Stages(CPU)
        found[name], solution = timed(lambda c=config, f=factor, s=stages: solve(weight, f, c, s))
        found |= {f"{name}: {stage}": seconds for stage, seconds in stages.seconds.items()}
        if name == "static":  # as the engine calls it for a model in bfloat16, on a CPU that multiplies in it
            halved = Stages(CPU)
            solve(weight, factor, config, halved, torch.bfloat16)
            found["static, bfloat16 products: sweep"] = halved.seconds["sweep"]
        if name == "classic":
            found["loss"] = float(solution.loss.double().sum() / loss.double().sum())
    return found


def summarized(rounds: list[dict[str, float]], rows: int, columns: int) -> dict[str, Any]:
    """Medians, and of ratios the medians of those within a round."""
    found: dict[str, Any] = {"rows": rows, "columns": columns, "seconds": {n: statistics.median(r[n] for r in rounds) for n in rounds[0]}}

    def middle(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(value, rounds))

    found["loss, ours over the loop's"] = found["seconds"].pop("loss")
    found["gemm_flop_rate"] = sum(sweep_flop(columns, rows)) / found["seconds"]["gemm"]
    found["loop over ours"] = {
        "sweep": middle(lambda r: r["textbook sweep"] / r["classic"]),
        "sweep, static": middle(lambda r: r["textbook sweep"] / r["static"]),
        "sweep, static, bfloat16 products": middle(lambda r: r["textbook sweep"] / r["static, bfloat16 products: sweep"]),
        "factor": middle(lambda r: r["textbook factor"] / r["factor"]),
        "factor and sweep": middle(lambda r: (r["textbook factor"] + r["textbook sweep"]) / (r["factor"] + r["classic"])),
        "factor and all of tuned": middle(lambda r: (r["textbook factor"] + r["textbook sweep"]) / (r["factor"] + r["tuned"])),
    }
    found["over its products"] = {
        "sweep": middle(lambda r: r["classic"] / r["gemm"]),
        "sweep, static": middle(lambda r: r["static: sweep"] / r["gemm"]),
    }
    found["nanoseconds a row and column²"] = found["seconds"]["static: sweep"] / rows / columns**2 * 1e9
    return found


def document(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    names = [f"{own['rows']} × {own['columns']}" for own in sizes]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(sizes)) + "|"]

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(map(value, sizes)) + " |")

    for name in sizes[0]["seconds"]:
        told = {"gemm": "products of the sweep, at the rate of a square one"}.get(name, name)
        row(f"{told}, s", lambda own, name=name: f"{own['seconds'][name]:.3f}")
    row("square product, GFLOP/s", lambda own: f"{own['gemm_flop_rate'] / 1e9:.0f}")
    for kind, about in (("loop over ours", "the loop's time over ours"), ("over its products", "our time over its products")):
        for name in sizes[0][kind]:
            row(f"{about}: {name}", lambda own, kind=kind, name=name: f"{own[kind][name]:.2f}")
    growth, loss = "nanoseconds a row and column²", "loss, ours over the loop's"
    row(f"static: sweep, {growth}", lambda own: f"{own[growth]:.5f}")
    row(f"classic: {loss}", lambda own: f"{own[loss]:.4f}")
    if results["exponents"]:
        powers = ", ".join(f"{exponent:.2f}" for exponent in results["exponents"])
        lines += ["", f"From each size to the next the static sweep grows as (rows · in²) to the power of: {powers}."]
    return head(results, "Solver") + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048,4096,8192", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--rows", type=int, help="outputs; without it as many as inputs")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="divides 128 or is a multiple of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="one more comes before them and is discarded")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "solver")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results, others = begun({"bits": args.bits, "group_size": args.group_size, "rounds": args.rounds}, CPU), Others()
    results["sizes"] = []
    for columns in sorted(set(args.sizes)):
        weight, hessian = problem(args.rows or columns, columns)
        mean = hessian.mean()
        rounds = [one_round(weight, mean, hessian.tokens, args.bits, args.group_size) for _ in range(1 + args.rounds)][1:]
        results["sizes"].append(summarized(rounds, *weight.shape) | {"runs": rounds})
    results["others"] = others.cores
    results["exponents"] = [
        math.log(larger["seconds"]["static: sweep"] / size["seconds"]["static: sweep"])
        / math.log(larger["rows"] * larger["columns"] ** 2 / (size["rows"] * size["columns"] ** 2))
        for size, larger in itertools.pairwise(results["sizes"])
    ]
    text = document(results)
    write(args.out, f"w{args.bits}g{args.group_size}-t{args.threads}", results, text)
    print(text)


if __name__ == "__main__":
    main()
