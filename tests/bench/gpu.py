"""A GPU run that needs no download: a model of Llama's shape with random bf16 weights, random tokens, 4 bits, group 128, by stage.

    PYTHONPATH=. python tests/bench/gpu.py                                   # Llama-3-8B's shape, 128 x 2048 tokens, three recipes
    PYTHONPATH=. python tests/bench/gpu.py --shape 1b --recipes tuned
    PYTHONPATH=. python tests/bench/gpu.py --device cpu --shape tiny --windows 4 --seqlen 64 --quick

gptq_core alone is needed, with what it imports; neither Prefect nor MLflow. The model is written once, every weight drawn anew, into memory
(/dev/shm) where it has room, else where temporary files go: the results say which, since the writing of a checkpoint is in the time. Each
recipe is a process of its own, timed from its open to the published checkpoint. The making of the GPU's context is told apart; what
libraries load and compile when they are first used is in the time. The rates of the card (bf16 and fp32 products, a copy) and the digest of
files are measured before; floors.py has the formulas. --blocks N makes a model of so many blocks only: the time of the whole one is then
extrapolated, and labelled. Into --out go a dated .json and .md, anew after every recipe.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers
from floors import Rates, measure, rates_line, table
from machine import Others, begun, head, write
from models import SHAPES, quantize, random_windows, roomy, write_llama
from peers.measured import resident

from gptq_core import QuantizeConfig
from gptq_core.config import RECIPES
from gptq_core.model import architecture

HERE = Path(__file__).parent


def one_recipe(model: Path, recipe: str, shape: dict[str, Any], args: argparse.Namespace, rates: Rates) -> dict[str, Any]:
    """One run, in a process of its own: its times, and its highest memory. Bytes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = architecture.choose_device(args.device)
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, recipe=recipe)
    windows = random_windows(shape, args.windows, args.seqlen)
    started = time.perf_counter()
    torch.zeros(1, device=device)
    context = time.perf_counter() - started
    try:
        found = {"context": context} | quantize(model, config, windows, model.parent / recipe, device=args.device, rates=rates)
    finally:
        for path in model.parent.glob(f"{recipe}*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    found["peak_bytes"] = {"host": resident("VmHWM")}  # mapped shards, as far as they were read, are in it
    if device.type == "cuda":
        peaks = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
        found["peak_bytes"] |= peaks
    return found


def concluded(found: dict[str, Any], blocks: int, of: int) -> dict[str, Any]:
    """With tokens a second, the products achieved beside their floor, and what a model of all its blocks would take."""
    floors = [stage["floor"] for stage in found["stages"].values() if "floor" in stage]
    products = [floor for floor in floors if floor["unit"] == "FLOP"]
    found["tokens_a_second"] = found["tokens"] / found["seconds"]
    found["flop"] = sum(floor["amount"] for floor in products)
    found["flop_a_second"] = found["flop"] / found["seconds"]
    found["flop_floor_seconds"] = sum(floor["seconds"] for floor in products)
    found["floor_seconds"] = sum(floor["seconds"] for floor in floors)
    if blocks < of:
        found["extrapolated_seconds"] = found["seconds"] + found["all_blocks"] * (of - blocks) / blocks
    return found


def document(results: dict[str, Any], rates: Rates) -> str:
    setting, runs = results["setting"], results["runs"]
    columns = [
        "recipe",
        "s",
        "tokens/s",
        "TFLOP",
        "TFLOP/s",
        "floor of the products, s",
        "floor, s",
        "GPU allocated, GB",
        "reserved, GB",
        "host, GB",
    ]
    extrapolated = any("extrapolated_seconds" in run for run in runs.values())
    if extrapolated:
        columns.insert(2, f"EXTRAPOLATED to {setting['of']} blocks, s")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for recipe, run in runs.items():
        memory = [f"{run['peak_bytes'][kind] / 1e9:.1f}" if kind in run["peak_bytes"] else "" for kind in ("allocated", "reserved", "host")]
        cells = [
            recipe,
            f"{run['seconds']:.1f}",
            f"{run['tokens_a_second']:.0f}",
            f"{run['flop'] / 1e12:.2f}",
            f"{run['flop_a_second'] / 1e12:.2f}",
            f"{run['flop_floor_seconds']:.2f}",
            f"{run['floor_seconds']:.2f}",
        ]
        cells += memory
        if extrapolated:
            cells.insert(2, f"{run['extrapolated_seconds']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{recipe}: {told}" for recipe, told in results["failures"].items()]
    lines.append(
        f"\n{results['model_bytes'] / 1e9:.2f} GB of model written in {results['model_seconds']:.1f} s, in {results['files']}. "
        + rates_line(rates)
    )
    for recipe, run in runs.items():
        around = ", ".join(f"{part} {run[part]:.1f} s" for part in ("open", "capture", "all_blocks", "assemble")).replace("_", " ")
        around += f"; before it the context of the device {run['context']:.1f} s" if "gpu" in results["machine"] else ""
        lines += [f"\n## {recipe}", f"\n{around}.\n", table(run["stages"], run["seconds"])]
    return head(results, f"Llama {setting['shape']}") + "\n\n" + "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--recipes", default="classic,tuned,best", type=lambda text: text.split(","))
    parser.add_argument("--blocks", type=int, help="only so many; the time of all is extrapolated")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; without it, as torch chooses")
    parser.add_argument("--folder", type=Path, help="for the model and the checkpoints, which are removed at the end")
    parser.add_argument("--quick", action="store_true", help="measure the rates on little work, to see that all is in place")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    args = parser.parse_args()
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"no recipes {sorted(unknown)}; there are {', '.join(RECIPES)}")
    if args.blocks is not None and not 1 <= args.blocks <= SHAPES[args.shape]["num_hidden_layers"]:
        parser.error(f"--blocks {args.blocks}: {args.shape} has 1 to {SHAPES[args.shape]['num_hidden_layers']}")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = architecture.choose_device(args.device)
    whole = SHAPES[args.shape]
    shape = whole | {"num_hidden_layers": args.blocks or whole["num_hidden_layers"]}
    blocks, of = shape["num_hidden_layers"], whole["num_hidden_layers"]
    setting = {
        "shape": args.shape,
        "blocks": blocks,
        "of": of,
        "windows": args.windows,
        "seqlen": args.seqlen,
        "bits": args.bits,
        "group_size": args.group_size,
    }
    results, others = begun(setting, device), Others()
    rates = measure(device, {torch.bfloat16}, args.quick)
    results |= {"rates": rates.record(), "runs": {}, "failures": {}}
    parameters = architecture.empty_model(transformers.LlamaConfig(**shape), torch.bfloat16).num_parameters()
    folder = roomy(4 * parameters, args.folder)  # the model at two bytes a weight, and less than that for one checkpoint
    try:
        started, model = time.perf_counter(), folder / "model"
        model.mkdir()
        results["model_bytes"] = write_llama(model, shape, device)
        results |= {"model_seconds": time.perf_counter() - started, "files": "memory" if folder.is_relative_to("/dev/shm") else "a folder"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for recipe in args.recipes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    found = pool.submit(one_recipe, model, recipe, shape, args, rates).result()
                    results["runs"][recipe] = concluded(found, blocks, of)
                    print(f"{recipe}: {found['seconds']:.2f} s", flush=True)
                except (BrokenProcessPool, torch.cuda.OutOfMemoryError) as error:
                    results["failures"][recipe] = str(error).splitlines()[0]
                    print(f"{recipe}: {results['failures'][recipe]}", flush=True)
            results["others"] = others.cores
            write(args.out, f"{args.shape}-w{args.bits}g{args.group_size}-{device.type}", results, document(results, rates))
    finally:
        shutil.rmtree(folder)
    print(document(results, rates))


if __name__ == "__main__":
    main()
