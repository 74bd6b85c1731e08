"""One run of the engine, by stage: seconds beside the least that each stage could take on this machine (floors.py has the formulas).

    PYTHONPATH=. python tests/bench/stages.py MODEL --calibration TEXT [--recipe tuned] [--threads 2]
    PYTHONPATH=. python tests/bench/stages.py --wide

MODEL, TEXT and --wide are those of side_by_side.py. The rates of the machine are measured before the run, with the same threads. A stage of
more than three times its floor is bold. Into --out go a dated .json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from ablation import windows
from floors import measure, rates_line, table
from machine import Others, begun, head, write
from models import quantize
from side_by_side import make_wide

from gptq_core import QuantizeConfig
from gptq_core.config import RECIPES
from gptq_core.model import architecture

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--wide", action="store_true", help="in place of MODEL: a wide model with random weights")
    parser.add_argument("--calibration")
    parser.add_argument("--recipe", default="tuned", choices=RECIPES)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="measure the rates on little work, to see that all is in place")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "stages")
    args = parser.parse_args()
    if args.wide == bool(args.model) or bool(args.model) != bool(args.calibration):
        parser.error("give MODEL with --calibration, or --wide alone")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = architecture.choose_device(args.device)
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, recipe=args.recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.model.resolve() if args.model else folder / "wide"
        calibration = windows(args.calibration, str(model), args.seqlen, args.samples, 0) if args.model else make_wide(model)
        dtype = architecture.choose_dtype(args.dtype, architecture.load_config(model), device)
        setting = {
            "model": model.name,
            "recipe": args.recipe,
            "bits": args.bits,
            "group_size": args.group_size,
            "windows": calibration.count,
            "seqlen": calibration.seqlen,
            "dtype": str(dtype).removeprefix("torch."),
        }
        results, others = begun(setting, device), Others()
        rates = measure(device, {dtype}, args.quick)
        found = quantize(model, config, calibration, folder / "out", device=args.device, dtype=args.dtype, rates=rates)
    results |= {"others": others.cores, "rates": rates.record(), "run": found}
    text = "\n\n".join([head(results, f"Stages: {model.name}, {args.recipe}"), table(found["stages"], found["seconds"]), rates_line(rates)])
    write(args.out, f"{model.name}-{args.recipe}-w{args.bits}g{args.group_size}-t{args.threads}", results, text)
    print(text)


if __name__ == "__main__":
    main()
