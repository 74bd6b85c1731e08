"""Our engine, in the same frame as the peers. Its one step goes from the folder of the model to that of the checkpoint: reading, packing
and writing are inside, and `stages` says how long each stage was."""

from __future__ import annotations

from pathlib import Path

from measured import Steps, arguments

from gptq_core import Quantization, QuantizeConfig, Windows
from gptq_core.engine import code_sha256

args, steps = arguments(recipe={"required": True}), Steps()
config = QuantizeConfig(bits=args.bits, group_size=args.group_size, recipe=args.recipe)
windows = Windows(args.tokens, "side by side", len(args.tokens))
with steps("quantize"):
    with Quantization.open(args.model, config, windows, Path(args.out), dtype=args.dtype, device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()
steps.answer("gptq-pipeline", stages=run.stage_seconds, code_sha256=code_sha256())
