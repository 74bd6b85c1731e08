"""What the cells of a sweep share: a sweep of K cells against K single runs, each a command, exact and screening.

    python tests/bench/sweep.py RUN.yaml OUT [--grid bits=2,3,4 --grid group_size=32,128]

Wall seconds and CPU seconds of whole commands with all their processes. Single runs one after another, as a person would start them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from tasks.config.sweep import load_sweep, parse_axis


def timed(*args: str) -> tuple[float, float]:
    """(wall, CPU) seconds of `python -m flows ARGS`, children included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "flows", *args], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", action="append")
    args = parser.parse_args()
    grid = args.grid or ["bits=2,3,4", "group_size=32,128"]
    axes = [f"--grid={axis}" for axis in grid]
    tracking = f"--set=tracking.uri=sqlite:///{args.out.absolute()}/mlflow.db"
    any_choice = "--set=choose.max_perplexity_increase=1000"
    args.out.mkdir(parents=True)
    cells = load_sweep(args.run, dict(map(parse_axis, grid)), {}).expanded()
    found = {"cells": len(cells)}
    found["exact"] = timed("sweep", args.run, *axes, f"--out={args.out}/exact", tracking, any_choice)
    found["again"] = timed("sweep", args.run, *axes, f"--out={args.out}/exact", tracking, any_choice)
    found["screening"] = timed("sweep", args.run, *axes, f"--out={args.out}/screening", "--mode=screening", tracking, any_choice)
    single = [
        timed(
            "quantize",
            args.run,
            f"--out={args.out}/single/{cell.name}",
            tracking,
            *(f"--set=quantization.{axis}={json.dumps(value)}" for axis, value in cell.settings.items()),
        )
        for cell in cells
    ]
    found["single runs"] = tuple(map(sum, zip(*single, strict=True)))
    for name in ("exact", "screening"):
        found[f"{name} / single runs"] = tuple(a / b for a, b in zip(found[name], found["single runs"], strict=True))
    for name, value in found.items():
        print(f"{name:24}", value if isinstance(value, int) else "wall {:8.2f}   CPU {:8.2f}".format(*value))


if __name__ == "__main__":
    main()
