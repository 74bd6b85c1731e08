"""The kernels, in Triton or in C, beside their torch twins on the same device, for column blocks and layers of real models.

    PYTHONPATH=. python tests/bench/inner_loops.py [--rows 1024,4096,6144,28672] [--columns 4096] [--threads 1]

For each number of stacked outputs: one column block of the sweep (128 columns), its books, one of the descent, and the search for all
scales of a layer of --columns inputs, 4 bits, group 128, symmetric; and, where bfloat16 products are given to C, the Hessian of 2048 tokens
beside the one in float32. Milliseconds of the device between the ends of one call, the median of some; how often both come to the same (of
books and a Hessian: to bfloat16), since sums are taken in another order. A thread of the CPU, since the solver gives each a part of the
rows. Where nothing but the twin runs, the table says so. Into --out go a dated .json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import Others, begun, head, write
from torch import Tensor

from gptq_core.kernels import descent, dispatch, rounding, scale_search
from gptq_core.method.hessian import Hessian
from gptq_core.model import architecture

HERE = Path(__file__).parent
BLOCK, MAX_CODE, TOKENS = 128, 15, 2048
Problem = tuple[str, Callable[[], tuple[Tensor, ...]], Callable[..., Any], Callable[[tuple[Tensor, ...], Any], Tensor]]
"""Name, what makes its arguments anew, the public function, and what of arguments and result is to be compared."""


def problems(rows: int, inputs: int, device: torch.device) -> Iterator[Problem]:
    draws = torch.Generator(device).manual_seed(0)
    groups = inputs // BLOCK

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, device=device)

    now, found = normal(BLOCK, rows), normal(groups, rows).abs().mul_(0.02).add_(0.25)
    zeros, group = torch.full_like(found, 8.0), torch.randint(groups, (BLOCK,), generator=draws, device=device)
    seen = normal(4 * BLOCK, BLOCK)
    damped = seen.T @ seen / len(seen)
    damped.diagonal().add_(0.1)
    feedback = torch.linalg.cholesky(damped, upper=True)
    feedback = (feedback / feedback.diagonal().unsqueeze(1)).contiguous()
    yield (
        f"sweep, {BLOCK} × {rows}",
        lambda: (now.clone(), feedback, found, zeros, group, MAX_CODE),
        rounding.round_columns,
        lambda _given, codes: codes,
    )
    codes = torch.randint(MAX_CODE + 1, (BLOCK, rows), generator=draws, device=device).to(torch.uint8)
    target, here, diagonal = normal(inputs, rows), torch.arange(BLOCK, device=device), normal(BLOCK).abs()
    yield (
        f"books, {BLOCK} × {rows}",
        lambda: (
            codes,
            now.clone(),
            target,
            here,
            found,
            zeros,
            group,
            diagonal,
            torch.empty_like(target, dtype=torch.uint8),
            torch.empty_like(now),
            torch.empty_like(now),
            now.new_zeros(rows),
        ),
        rounding.write_back,
        lambda given, _none: given[9].bfloat16(),
    )
    slope = damped @ normal(BLOCK, rows).mul_(0.05)
    yield (
        f"descent, {BLOCK} × {rows}",
        lambda: (codes.clone(), slope.clone(), found[0], zeros[0], MAX_CODE, damped),
        descent.descend_columns,
        lambda given, _change: given[0],
    )
    weights, importance = normal(groups, BLOCK, rows), normal(groups, BLOCK).square()
    yield (
        f"scales, {groups} × {BLOCK} × {rows}",
        lambda: (weights, importance, MAX_CODE, None),
        scale_search.search,
        lambda _given, result: result[0],
    )


def sums(inputs: int, device: torch.device) -> Iterator[Problem]:
    """The one problem that no outputs have a part in."""
    tokens = torch.randn(TOKENS, inputs, generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()

    def add(hessian: Hessian) -> Tensor:
        hessian.add(tokens)
        return hessian.mean().bfloat16()

    if device.type == "cpu" and dispatch.compiles_products():
        yield f"hessian, {TOKENS} × {inputs}", lambda: (Hessian(inputs, device),), add, lambda _given, mean: mean


def once(problem: Problem, device: torch.device) -> tuple[float, Tensor]:
    """Milliseconds of one call, and what it chose."""
    _, make, work, chosen = problem
    given = make()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work(*given)
        end.record()
        end.synchronize()
        return start.elapsed_time(end), chosen(given, result)
    started = time.perf_counter()
    result = work(*given)
    return 1000 * (time.perf_counter() - started), chosen(given, result)


def compare(problem: Problem, device: torch.device, times: int) -> dict[str, Any]:
    """Both in turns; the first of each is discarded: it compiles."""
    kernel, twin = [], []
    for _ in range(1 + times):
        spent, ours = once(problem, device)
        kernel.append(spent)
        with mock.patch.multiple(dispatch, kernels=lambda *_tensors: None, compiles_products=lambda: False):
            spent, theirs = once(problem, device)
        twin.append(spent)
    return {
        "what": problem[0],
        "kernel": statistics.median(kernel[1:]),
        "twin": statistics.median(twin[1:]),
        "first": kernel[0],
        "alike": float((ours == theirs).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1024,4096,6144,28672", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--columns", type=int, default=4096, help="inputs of the layer, a multiple of 128")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kernels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = architecture.choose_device(args.device)
    results, others = begun({"columns": args.columns, "times": args.times}, device), Others()
    results |= {"kernels": dispatch.implementation(device, torch.bfloat16), "calls": []}
    for rows in args.rows:
        results["calls"] += [compare(problem, device, args.times) for problem in problems(rows, args.columns, device)]
    results["calls"] += [compare(problem, device, args.times) for problem in sums(args.columns, device)]
    results["others"] = others.cores
    lines = ["| one call | kernel, ms | twin, ms | twin over kernel | the same | first call, ms |", "|---" * 6 + "|"]
    for own in results["calls"]:
        times = f"{own['kernel']:.3f} | {own['twin']:.3f} | {own['twin'] / own['kernel']:.1f}"
        lines.append(f"| {own['what']} | {times} | {own['alike']:.4%} | {own['first']:.1f} |")
    name = results["kernels"]
    note = "No kernel runs on this device: both columns are the twin." if name == "torch" else f"Kernels: {name}."
    text = "\n\n".join([head(results, "Kernels"), note, "\n".join(lines)])
    write(args.out, device.type, results, text)
    print(text)


if __name__ == "__main__":
    main()
