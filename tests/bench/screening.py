"""A screening of several configurations against an exact run of each: what it costs, and whether it ranks them alike. One table.

    python tests/bench/screening.py MODEL --calibration TEXT --heldout TEXT [--bits 2,3,4] [--group-sizes 32,128] [--recipes tuned]

MODEL is any local folder. TEXT is a file (.txt, .jsonl, .parquet), or FILE.safetensors:NAME for a row of token ids. Cost is CPU
time of this process: of the screening as a whole, which judges its cells itself, and of every exact run with its evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from ablation import quantize, windows

from gptq_core import QuantizeConfig, Windows, evaluate_pair, screen


def exact(model: str, config: QuantizeConfig, calibration: Windows, heldout: Windows) -> tuple[float, float, float]:
    """KL of the checkpoint, and CPU seconds of making and of judging it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.process_time()
        quantize(model, config, calibration, out)
        made = time.process_time()
        kl = evaluate_pair(model, str(out), heldout, device="cpu")["kl"]
        return kl, made - started, time.process_time() - made


def agreeing(one: list[float], other: list[float]) -> tuple[int, int]:
    """Pairs that both put in the same order, of how many."""
    pairs = list(itertools.combinations(range(len(one)), 2))
    return sum((one[a] < one[b]) == (other[a] < other[b]) for a, b in pairs), len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-sizes", default="32,128")
    parser.add_argument("--recipes", default="tuned")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--heldout-samples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lenient", action="store_true", help="strict: false, linears that a group size does not divide are left")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    calibration = windows(args.calibration, args.model, args.seqlen, args.samples, 0)
    heldout = windows(args.heldout, args.model, args.seqlen, args.heldout_samples, None)
    configs = {
        f"{recipe}, {bits} bits, group {group}": QuantizeConfig(bits=bits, group_size=group, recipe=recipe, strict=not args.lenient)
        for recipe in args.recipes.split(",")
        for group in map(int, args.group_sizes.split(","))
        for bits in map(int, args.bits.split(","))
    }
    started = time.process_time()
    found = screen(args.model, configs, calibration, heldout, device="cpu")
    screening = time.process_time() - started
    print("| | bits a weight | KL, screening | KL, exact | solves (wall s) | exact run (s) | its evaluation (s) |\n" + "|---" * 7 + "|")
    runs = []
    for name, config in configs.items():
        runs.append(exact(args.model, config, calibration, heldout))
        kl, made, judged = runs[-1]
        cell = found[name]
        print(
            f"| {name} | {cell.bits_per_weight:.3f} | {cell.kl:.5f} | {kl:.5f} | {cell.seconds:.1f} | {made:.1f} | {judged:.1f} |",
            flush=True,
        )
    made, judged = (sum(run[at] for run in runs) for at in (1, 2))
    same, pairs = agreeing([cell.kl for cell in found.values()], [run[0] for run in runs])
    print(
        f"\n{Path(args.model).name}, {calibration.count} × {args.seqlen} calibration and {heldout.count} × {args.seqlen} held-out, "
        f"{args.threads} thread: screening {screening:.1f} s; {len(runs)} exact runs {made:.1f} s, their evaluations {judged:.1f} s: "
        f"{(made + judged) / screening:.2f} times the screening, {made / screening:.2f} without the evaluations. "
        f"{same} of {pairs} pairs in the same order."
    )


if __name__ == "__main__":
    main()
