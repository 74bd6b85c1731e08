"""Widths chosen under a budget against uniform ones and against random choices of the same size. One markdown table.

    python tests/bench/allocation.py MODEL CALIBRATION HELDOUT [--windows 64 --seqlen 256 --heldout 96 --budgets 3 3.5]

CALIBRATION and HELDOUT: text (.txt, .jsonl, .parquet), or FILE.safetensors:NAME for a row of token ids. A budget that is no whole
number of bits is held against the line, in log KL, between the uniform widths around it. Without arguments: the embedded model.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path
from statistics import mean

import torch
from ablation import quantize
from safetensors.torch import load_file

from gptq_core import Allocation, QuantizeConfig, Windows, allocate, calibration_windows, evaluate_pair, evaluation_windows
from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.model.selection import Selection
from gptq_core.planning.plan import plan
from gptq_core.search.allocation import choose

EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded"
WIDTHS = [2, 3, 4, 8]


def main(args: argparse.Namespace) -> None:
    calibration, heldout = read(args, args.calibration, args.windows), read(args, args.heldout_text, args.heldout)

    def measure(config: QuantizeConfig) -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            quantize(args.model, config, calibration, out)
            return evaluate_pair(args.model, str(out), heldout, device="cpu")["kl"]

    around = sorted({bits for budget in args.budgets for bits in neighbours(budget)})
    uniform = {bits: measure(QuantizeConfig(bits=bits, recipe=args.recipe)) for bits in around}
    first = wanted(args, args.budgets[0])
    screened = allocate(args.model, first, calibration, device="cpu")
    selection = plan(args.model, first).selection
    print(f"| bits a weight | uniform | random, mean of {args.random} | least | allocated | predicted | shares |")
    print("|---" * 7 + "|")
    for budget in args.budgets:
        config = wanted(args, budget)
        chosen = choose(config, selection, {unit.name: (unit.loss, unit.kl) for unit in screened.units})
        rivals = [measure(at_random(config, selection, chosen, seed).apply(config)) for seed in range(args.random)]
        shares = ", ".join(f"{bits}: {share:.0%}" for bits, share in chosen.shares.items())
        print(
            f"| {chosen.bits_per_weight:.3f} | {between(uniform, budget):.5f} | {mean(rivals):.5f} | {min(rivals):.5f} | "
            f"**{measure(chosen.apply(config)):.5f}** | {chosen.predicted_kl:.5f} | {shares} |",
            flush=True,
        )


def wanted(args: argparse.Namespace, budget: float) -> QuantizeConfig:
    return QuantizeConfig(bits=3, recipe=args.recipe, allocate={"bits": WIDTHS, "budget_bpw": budget})


def neighbours(budget: float) -> set[int]:
    return {max(bits for bits in WIDTHS if bits <= budget), min(bits for bits in WIDTHS if bits >= budget)}


def between(uniform: dict[int, float], budget: float) -> float:
    low, high = min(neighbours(budget)), max(neighbours(budget))
    share = (budget - low) / (high - low) if high > low else 0.0
    return math.exp((1 - share) * math.log(uniform[low]) + share * math.log(uniform[high]))


def at_random(config: QuantizeConfig, selection: Selection, chosen: Allocation, seed: int) -> Allocation:
    """The best choice within the budget for random effects: 4⁻ᵇⁱᵗˢ a weight, times a number between 0 and 1 for every unit."""
    chance = random.Random(seed)
    effects = {unit.name: unit.weights * chance.random() for unit in chosen.units}
    costs = {name: {bits: effect * 4.0**-bits for bits in WIDTHS} for name, effect in effects.items()}
    return choose(config, selection, {name: (cost, cost) for name, cost in costs.items()})


def read(args: argparse.Namespace, text: str, count: int) -> Windows:
    file, _, name = text.rpartition(":")
    if file.endswith(".safetensors"):
        stream = load_file(file)[name][: count * args.seqlen]
        return Windows(stream.view(count, args.seqlen).long(), name, count)
    tokenizer = load_tokenizer(args.model)
    if text == args.heldout_text:
        return evaluation_windows(text, tokenizer, args.seqlen, count)
    return calibration_windows(text, tokenizer, count, args.seqlen, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", "model"), ("calibration", "train.parquet"), ("heldout_text", "heldout.parquet")):
        parser.add_argument(name, nargs="?", default=str(EMBEDDED / default))
    for name, default in (("--windows", 64), ("--seqlen", 256), ("--heldout", 96), ("--random", 10)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.0, 3.5])
    parser.add_argument("--recipe", default="tuned")
    torch.set_num_threads(1)
    main(parser.parse_args())
