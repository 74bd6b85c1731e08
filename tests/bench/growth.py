"""What a run costs by depth, by tokens, and at the least: three questions on small models made here, with random weights.

    PYTHONPATH=. python tests/bench/growth.py [--blocks 4,8,16] [--windows 8,16,32,64] [--threads 2] [--rounds 3]

depth    seconds of each block of a model of hidden size 512, for several numbers of blocks: how far a line through them climbs from the
         first block to the last, as a share of their mean. The first block is left out of the line: it waits for what is done once
tokens   seconds of the whole run, and of the stages that see tokens (forward, hessian, shift), for several numbers of windows
fixed    a model so small that its work is nothing, from its folder to its checkpoint: the first run of a fresh process after its imports,
         the next one, and the imports of gptq_core and of what it uses. Prefect, MLflow and the rest of the flow are not in it

Medians over the rounds; in a round every number of blocks and windows comes once. Into --out go a dated .json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import Others, begun, head, write
from models import SHAPES, quantize, random_windows, write_llama

from gptq_core import QuantizeConfig
from gptq_core.config import RECIPES

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SEES_TOKENS = ("forward", "hessian", "shift")
FIXED_TOKENS = (4, 64)
"""Windows and their length for the smallest run."""
FRESH = """
import json, sys, time
started = time.perf_counter()
from gptq_core import Quantization, QuantizeConfig, Windows
Quantization
imported = time.perf_counter() - started
import torch
from pathlib import Path
from models import SHAPES, quantize, random_windows
model, out, recipe, threads, windows, seqlen = sys.argv[1:]
torch.set_num_threads(int(threads))
config, tokens = QuantizeConfig(bits=4, recipe=recipe), random_windows(SHAPES["tiny"], int(windows), int(seqlen))
runs = [quantize(Path(model), config, tokens, Path(f"{out}-{number}"))["seconds"] for number in range(2)]
print(json.dumps({"imports": imported, "first": runs[0], "second": runs[1]}))
"""


def fixed(folder: Path, recipe: str, threads: int, index: int) -> dict[str, float]:
    """Seconds of the imports and of two smallest runs, in a process of its own."""
    arguments = [folder / "tiny", folder / f"fixed-{index}", recipe, threads, *FIXED_TOKENS]
    command, own = [sys.executable, "-c", FRESH, *map(str, arguments)], os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the least squares; a level line through less than two points."""
    return tuple(statistics.linear_regression(x, y)) if len(x) > 1 else (0.0, statistics.fmean(y))


def depth(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs over one number of blocks: the median of each block, and how far their line climbs."""
    blocks = [statistics.median(seconds) for seconds in zip(*(run["blocks"] for run in runs), strict=True)]
    later = blocks[1:] or blocks
    slope, _ = line(list(range(len(later))), later)
    mean = statistics.fmean(later)
    return {"blocks": blocks, "mean": mean, "slope": slope, "climb": slope * (len(later) - 1) / mean}


def tokens(found: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of runs by number of windows: seconds, and what they are a token; the line seconds = fixed + rate · tokens and how far off it is."""
    rows = []
    for runs in found.values():
        count = runs[0]["tokens"]
        seeing = statistics.median(sum(run["stages"].get(stage, {"seconds": 0.0})["seconds"] for stage in SEES_TOKENS) for run in runs)
        rows.append({"tokens": count, "seconds": statistics.median(run["seconds"] for run in runs), "stages that see tokens": seeing})
    x = [float(row["tokens"]) for row in rows]
    lines = {}
    for name in ("seconds", "stages that see tokens"):
        y = [row[name] for row in rows]
        slope, start = line(x, y)
        off = max(abs(start + slope * a - b) / b for a, b in zip(x, y, strict=True))
        lines[name] = {"a token": slope, "at no token": start, "farthest off": off}
    return {"rows": rows, "lines": lines}


def document(results: dict[str, Any]) -> str:
    lines = ["## Depth", "", "| blocks | s a block, mean | climb from first to last | s of each block |", "|---" * 4 + "|"]
    for count, own in results["depth"].items():
        each = " ".join(f"{seconds:.2f}" for seconds in own["blocks"])
        lines.append(f"| {count} | {own['mean']:.3f} | {own['climb']:+.1%} | {each} |")
    lines += ["", "## Tokens", "", "| tokens | s | µs a token | stages that see tokens, s | µs a token |", "|---" * 5 + "|"]
    for row in results["tokens"]["rows"]:
        cells = [f"{row[name]:.3f} | {row[name] / row['tokens'] * 1e6:.1f}" for name in ("seconds", "stages that see tokens")]
        lines.append(f"| {row['tokens']} | {' | '.join(cells)} |")
    for name, own in results["tokens"]["lines"].items():
        told = "the whole run" if name == "seconds" else name
        lines.append(
            f"\nLine of {told}: {own['a token'] * 1e6:.1f} µs a token and {own['at no token']:.2f} s besides; "
            f"farthest off by {own['farthest off']:.1%}."
        )
    own = results["fixed"]
    lines += [
        "",
        "## Fixed",
        "",
        f"Imports {own['imports']:.2f} s; then the smallest run {own['first']:.2f} s, the next one {own['second']:.2f} s.",
    ]
    return head(results, "Growth") + "\n\n" + "\n".join(lines)


def once(model: Path, windows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, whose checkpoint is thrown away."""
    with tempfile.TemporaryDirectory(dir=model.parent) as own:
        given = random_windows(SHAPES[args.shape], windows, args.seqlen)
        return quantize(model, QuantizeConfig(bits=4, recipe=args.recipe), given, Path(own) / "out")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="4,8,16", type=numbers)
    parser.add_argument("--windows", default="8,16,32,64", type=numbers, help="with the smallest number of blocks")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--recipe", default="tuned", choices=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = {"recipe": args.recipe, "shape": args.shape, "seqlen": args.seqlen, "rounds": args.rounds}
    results, others = begun(setting, CPU), Others()
    by_depth: dict[int, list] = {count: [] for count in args.blocks}
    by_tokens: dict[int, list] = {count: [] for count in args.windows}
    smallest = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, shape in [("tiny", SHAPES["tiny"]), *((str(n), SHAPES[args.shape] | {"num_hidden_layers": n}) for n in args.blocks)]:
            (folder / name).mkdir()
            write_llama(folder / name, shape, CPU)
        for index in range(args.rounds):
            for count, runs in by_depth.items():
                runs.append(once(folder / str(count), min(args.windows), args))
            for count, runs in by_tokens.items():
                runs.append(once(folder / str(min(args.blocks)), count, args))
            smallest.append(fixed(folder, args.recipe, args.threads, index))
            print(f"round {index} done", flush=True)
    results |= {
        "depth": {count: depth(runs) for count, runs in by_depth.items()},
        "tokens": tokens(by_tokens),
        "fixed": {name: statistics.median(run[name] for run in smallest) for name in smallest[0]},
        "runs": {"depth": by_depth, "tokens": by_tokens, "fixed": smallest},
        "others": others.cores,
    }
    text = document(results)
    write(args.out, f"{args.shape}-{args.recipe}-t{args.threads}", results, text)
    print(text)


if __name__ == "__main__":
    main()
