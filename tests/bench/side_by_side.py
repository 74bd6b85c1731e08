"""Our engine and its peers on one model: seconds of the quantize step, peak memory, and what the checkpoints are worth.

    python tests/bench/side_by_side.py MODEL --calibration TEXT --heldout TEXT --peer gptqmodel=ENV/bin/python [--peer ...]
    python tests/bench/side_by_side.py --wide --peer gptqmodel=ENV/bin/python [--peer ...]

MODEL is any local folder; TEXT is a file (.txt, .jsonl, .parquet), or FILE.safetensors:NAME for a row of token ids. --wide needs
neither: it makes a Llama of hidden size 2048 with random weights, for time and memory alone. A peer is named (gptqmodel, optimum,
optimum-block, llmcompressor, autoround) with the Python that has it; nothing is installed here. All get the same tokens, bits, group
size and threads; peers run in --dtype and ours in --own-dtype (auto: as each one chooses), each in a process of its own, in rounds,
so that what slows the machine down hits all of them. --ours names a Python that has what a user installs: that of the tests also has
Triton, which transformers loads on a CPU too, 70 MB.
The first round is discarded: GPTQModel compiles kernels in it. Into --out go a dated .json with every run and a .md with medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from ablation import windows
from machine import Others, machine, write
from safetensors.torch import save_file
from side_by_side_tables import document, main_table

from gptq_core import Windows, evaluate_pair
from gptq_core.config import RECIPES

HERE = Path(__file__).parent
OURS = "run_ours.py"
PEERS: dict[str, tuple[str, list[str]]] = {
    "gptqmodel": ("run_gptqmodel.py", []),
    "optimum": ("run_optimum.py", []),
    "optimum-block": ("run_optimum.py", ["--by-block"]),
    "llmcompressor": ("run_llmcompressor.py", []),
    "autoround": ("run_autoround.py", []),
}
"""Name to adapter and its own arguments."""
WIDE = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make_wide(folder: Path) -> Windows:
    """The wide model in bfloat16, as models are given out, with the tokenizer that peers insist on; 8 windows of 512 random tokens."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, dtype="bfloat16")).bfloat16()
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    own.save_pretrained(folder)
    return Windows(torch.randint(3, WIDE["vocab_size"], (8, 512)), "random ids", 8)


def environment(threads: int, ours: bool) -> dict[str, str]:
    """No hub, no GPU, so many threads. Our sources are those of this checkout, whatever is installed; peers see none of them."""
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    found |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return found | ({"PYTHONPATH": str(HERE.parents[1])} if ours else {})


def execute(command: list[str], ours: bool, threads: int, cwd: Path, timeout: float) -> dict[str, Any]:
    """One run: what the adapter answered, and the cores that others used meanwhile. RuntimeError: it failed; its last lines were shown."""
    others, started = Others(), time.perf_counter()
    try:
        done = subprocess.run(command, env=environment(threads, ours), cwd=cwd, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"stopped after {timeout:.0f} s") from error
    seconds, busy = time.perf_counter() - started, others.cores
    if done.returncode or not done.stdout.strip().splitlines()[-1:]:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        raise RuntimeError(f"failed, exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"others": busy, "process_seconds": seconds}


class Bench:
    """The runs of one start, and the results as they grow."""

    def __init__(self, args: argparse.Namespace, model: Path, calibration: Windows, heldout: Windows | None, folder: Path) -> None:
        self.args, self.model, self.heldout, self.folder = args, model, heldout, folder
        save_file({"tokens": calibration.tokens.contiguous()}, folder / "tokens.safetensors")
        self.commands = {f"ours: {recipe}": self._command(args.ours, OURS, ["--recipe", recipe]) for recipe in args.recipes}
        self.commands |= {name: self._command(python, *PEERS[name]) for name, python in args.peer}
        ours = f"ours: {'tuned' if 'tuned' in args.recipes else args.recipes[0]}"
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "machine": machine(),
            "ours": ours,
            "setting": {
                "model": model.name,
                "bits": args.bits,
                "group_size": args.group_size,
                "threads": args.threads,
                "dtype": args.dtype,
                "own_dtype": args.own_dtype,
                "windows": calibration.count,
                "seqlen": calibration.seqlen,
                "calibration": calibration.source,
                "tokens_sha256": calibration.digest,
                "rounds": args.rounds,
                "warmup": args.warmup,
            },
            "heldout": heldout.count * (heldout.seqlen - 1) if heldout else 0,
            "engines": list(self.commands),
            "versions": {},
            "runs": [],
            "quality": {},
            "failures": {},
        }

    def _command(self, python: str, script: str, own: list[str]) -> list[str]:
        settings = {name: getattr(self.args, name) for name in ("bits", "group_size", "threads")}
        settings["dtype"] = self.args.own_dtype if script == OURS else self.args.dtype
        flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
        return [python, str(HERE / "peers" / script), str(self.model), str(self.folder / "tokens.safetensors"), "out", *flags, *own]

    def round(self, index: int) -> None:
        """Every engine once, from another one on each time. index: below 0 to warm up."""
        names = [name for name in self.commands if name not in self.results["failures"]]
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            with tempfile.TemporaryDirectory(dir=self.folder) as own:  # peers leave logs where they are started
                try:
                    found = execute(self.commands[name], name.startswith("ours"), self.args.threads, Path(own), self.args.timeout)
                except RuntimeError as error:
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                    self.results["failures"][name] = str(error)
                    continue
                if index == 0 and self.heldout:
                    self.results["quality"][name] = evaluate_pair(str(self.model), f"{own}/out", self.heldout, device="cpu")
            self.results["versions"][name] = found.pop("versions")
            self.results["runs"].append({"engine": name, "round": index, **found})
            step = found["quantize"]
            print(
                f"round {index}, {name}: {step['cpu_seconds']:.1f} CPU s, {step['seconds']:.1f} s, {step['peak_bytes'] / 1e6:.0f} MB",
                flush=True,
            )

    def write(self) -> None:
        """Both files, after every round: a bench that is stopped leaves what it has."""
        setting = self.results["setting"]
        name = f"{setting['model']}-w{setting['bits']}g{setting['group_size']}-t{setting['threads']}"
        write(self.args.out, name, self.results, document(self.results))


def python(text: str) -> str:
    if not (found := shutil.which(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a PYTHON that can be run")
    return str(Path(found).absolute())  # not resolved: the link inside an environment is what makes it one


def peer(text: str) -> tuple[str, str]:
    name, _, own = text.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=PYTHON with a NAME of {', '.join(PEERS)}")
    return name, python(own)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--wide", action="store_true", help="in place of MODEL: a wide model with random weights")
    parser.add_argument("--calibration")
    parser.add_argument("--heldout", help="without it, time and memory alone")
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--ours", type=python, default=sys.executable, metavar="PYTHON", help="with what our engine needs, not itself")
    parser.add_argument("--recipes", default="classic,tuned", type=lambda text: text.split(","))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "auto"), help="of the peers")
    parser.add_argument("--own-dtype", default="auto", choices=("float32", "bfloat16", "auto"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before, discarded")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--heldout-samples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "side_by_side")
    args = parser.parse_args()
    if args.wide == bool(args.model) or bool(args.model) != bool(args.calibration):
        parser.error("give MODEL with --calibration, or --wide alone")
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"no recipes {sorted(unknown)}; there are {', '.join(RECIPES)}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.wide:
            model, heldout = folder / "wide", None
            calibration = make_wide(model)
        else:
            model = args.model.resolve()
            calibration = windows(args.calibration, str(model), args.seqlen, args.samples, 0)
            heldout = windows(args.heldout, str(model), args.seqlen, args.heldout_samples, None) if args.heldout else None
        bench = Bench(args, model, calibration, heldout, folder)
        for index in range(-args.warmup, args.rounds):
            bench.round(index)
            if index >= 0:
                bench.write()
    print(main_table(bench.results))


if __name__ == "__main__":
    main()
