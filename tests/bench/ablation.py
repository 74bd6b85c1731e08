"""What each step of the recipes gives and costs: the ladder from classic to max, and max without each of its steps.

    python tests/bench/ablation.py MODEL OUT --calibration TEXT --heldout TEXT [--bits 4,3,2] [--draws 3] [--rows classic,tuned]

MODEL is any local folder. TEXT is a file (.txt, .jsonl, .parquet), or FILE.safetensors:NAME for a row of token ids. A draw is another
set of calibration windows. Every number is of the checkpoint as written; KL and agreement over the whole held-out text. Into OUT go
results.jsonl (a line a run, appended: a second start, also with other rows, groups or widths, goes on), and, of all that is in it,
table.md and a figure for each group size.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from safetensors import safe_open

from gptq_core import Quantization, QuantizeConfig, Windows, calibration_windows, evaluate_pair, evaluation_windows
from gptq_core.config import RECIPES
from gptq_core.data.tokenizer import load_tokenizer

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of the backend

OFF = QuantizeConfig(bits=4, recipe="classic").model_dump()
STEPS = {
    "+ static groups and activation order": {"static_groups": True},
    "+ weighted signed search": {"scale_search": "weighted"},
    "+ refit": {"refit": True},
    "tuned: + descent": {"descent": 1},
    "+ target shift": {"target_shift": 1.0},
    "best: + residual shift": {"residual_shift": 0.5},
    "+ second pass": {"descent": 2},
    "max: + block tuning": {"tuning_steps": RECIPES["max"]["tuning_steps"]},
}


def rows() -> dict[str, dict]:
    """Name to fields: the ladder, then max before its tuning without one step."""
    found: dict[str, dict] = {"classic": {"recipe": "classic"}}
    fields = {"recipe": "classic"}
    for name, step in STEPS.items():
        fields = fields | step
        found[name] = fields
    untuned = {"recipe": "max", "tuning_steps": 0}
    for key in RECIPES["best"]:
        found[f"max untuned without {key}"] = untuned | {key: OFF[key]}
    found["max untuned with damp_percent auto"] = untuned | {"damp_percent": "auto"}
    return found


def windows(text: str, model: str, seqlen: int, samples: int, draw: int | None) -> Windows:
    """Calibration windows of a draw, or the held-out ones (draw None)."""
    file, _, name = text.rpartition(":")
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as opened:
            ids = opened.get_tensor(name).long()
        every = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
        part = every[:samples] if draw is None else every[draw * samples : (draw + 1) * samples]
        return Windows(part, Path(file).name, len(every))
    tokenizer = load_tokenizer(model)
    if draw is None:
        return evaluation_windows(text, tokenizer, seqlen, samples)
    return calibration_windows(text, tokenizer, samples, seqlen, draw)


def quantize(model: str, config: QuantizeConfig, calibration: Windows, out: Path) -> None:
    with Quantization.open(model, config, calibration, out, device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()


def measure(model: str, config: QuantizeConfig, calibration: Windows, heldout: Windows) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.process_time()
        quantize(model, config, calibration, out)
        seconds = time.process_time() - started
        found = evaluate_pair(model, str(out), heldout, device="cpu")
        shutil.rmtree(out)
    return {"cpu_seconds": seconds} | {key: found[key] for key in ("kl", "quantized_perplexity", "original_perplexity", "top1_agreement")}


def spread(values: list[float], digits: int) -> str:
    """Mean over the draws, ± half their range: with three draws no narrower interval is honest."""
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(results: list[dict]) -> str:
    """Of one setting. Cost: CPU seconds over those of classic on the same draw and width."""
    bits = sorted({r["bits"] for r in results}, reverse=True)
    lines = ["| | " + " | ".join(f"{b} bits: KL | perplexity | agreement | cost" for b in bits) + " |", "|---" * (1 + 4 * len(bits)) + "|"]
    base = {(r["bits"], r["draw"]): r["cpu_seconds"] for r in results if r["row"] == "classic"}
    for name in dict.fromkeys(r["row"] for r in results):
        cells = []
        for b in bits:
            runs = [r for r in results if (r["row"], r["bits"]) == (name, b)]
            if not runs:
                cells.append(" | | | ")
                continue
            kl, ppl, same = ([r[key] for r in runs] for key in ("kl", "quantized_perplexity", "top1_agreement"))
            costs = [r["cpu_seconds"] / base[b, r["draw"]] for r in runs if (b, r["draw"]) in base]
            cost = f"{statistics.median(costs):.2f}" if costs else ""
            cells.append(f"{spread(kl, 5)} | {spread(ppl, 3)} | {spread(same, 4)} | {cost}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worse_than_classic(results: list[dict]) -> list[str]:
    """Recipes whose KL lies above that of classic on every draw: the ones to be named where the recipes are described."""
    base = {(r["bits"], r["draw"]): r["kl"] for r in results if r["row"] == "classic"}
    found = []
    for (name, b), runs in itertools.groupby(results, key=lambda r: (r["row"], r["bits"])):
        ratios = [r["kl"] / base[b, r["draw"]] for r in runs if (b, r["draw"]) in base]
        if ratios and min(ratios) > 1:
            found.append(f"{name} at {b} bits is worse than classic on every draw: {statistics.mean(ratios):.2f} times its KL.")
    return found


def figure(results: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(r["row"] for r in results))
    bits = sorted({r["bits"] for r in results}, reverse=True)
    drawn, axes = plt.subplots(1, len(bits), figsize=(5 * len(bits), 0.32 * len(names) + 1.5), sharey=True, squeeze=False)
    for axis, b in zip(axes[0], bits, strict=True):
        for position, name in enumerate(names):
            kl = [r["kl"] for r in results if (r["row"], r["bits"]) == (name, b)]
            if kl:
                axis.barh(position, statistics.mean(kl), color="#4477aa")
                axis.plot(kl, [position] * len(kl), "k|", markersize=6)
        axis.set(title=f"{b} bits", xlabel="KL per token")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
    drawn.tight_layout()
    drawn.savefig(path)
    plt.close(drawn)


def report(results: list[dict], out: Path, head: str) -> None:
    """table.md and the figures of every (group size, symmetry) in the results."""
    order = list(rows())
    results = sorted(results, key=lambda r: (not r["sym"], -(r["group_size"] % 10**6), order.index(r["row"]), -r["bits"], r["draw"]))
    parts = [head]
    for (group, sym), found in itertools.groupby(results, key=lambda r: (r["group_size"], r["sym"])):
        runs = list(found)
        parts += [f"## Group size {group}, {'symmetric' if sym else 'asymmetric (gptq_v2)'}", table(runs), *worse_than_classic(runs)]
        figure(runs, out / f"{'' if sym else 'asym-'}group{group}.svg")
    (out / "table.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", help="names of rows (classic,tuned,best,max,...), comma-separated; all unless given")
    parser.add_argument("--group-sizes", default="128")
    parser.add_argument("--asymmetric", action="store_true", help="sym: false, format: gptq_v2")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--heldout-samples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bits = [int(b) for b in args.bits.split(",")]
    chosen = {name: fields for name, fields in rows().items() if not args.rows or name.partition(":")[0] in args.rows.split(",")}
    if unknown := set((args.rows or "").split(",")) - {""} - {name.partition(":")[0] for name in chosen}:
        parser.error(f"no rows {sorted(unknown)}; there are {list(rows())}")
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    key = ("row", "bits", "group_size", "sym", "draw")
    done = {tuple(r[name] for name in key) for r in results}
    heldout = windows(args.heldout, args.model, args.seqlen, args.heldout_samples, None)
    zero = {"sym": False, "format": "gptq_v2"} if args.asymmetric else {"sym": True}
    for draw in range(args.draws):
        calibration = windows(args.calibration, args.model, args.seqlen, args.samples, draw)
        for group, (name, fields), b in itertools.product(map(int, args.group_sizes.split(",")), chosen.items(), bits):
            what = dict(zip(key, (name, b, group, zero["sym"], draw), strict=True))
            if tuple(what.values()) in done:
                continue
            config = QuantizeConfig(bits=b, group_size=group, **zero, **fields)
            results.append(what | measure(args.model, config, calibration, heldout))
            with log.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print({key: round(value, 5) if isinstance(value, float) else value for key, value in results[-1].items()}, flush=True)
    head = (
        f"{Path(args.model).name}, {args.samples} × {args.seqlen} calibration tokens, mean ± half the range of the draws, "
        f"{heldout.count} × {args.seqlen} held-out tokens, original perplexity {results[0]['original_perplexity']:.3f}; "
        f"{datetime.date.today()}, {args.threads} thread of {platform.machine()}, torch {torch.__version__}."
    )
    report(results, args.out, head)


if __name__ == "__main__":
    main()
