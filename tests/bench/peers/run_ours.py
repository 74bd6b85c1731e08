"""Our engine, in the same frame as the peers. Loading looks at the model's folder and makes an empty model, saving writes what is in no
block; the weights are read, packed and written block by block, inside quantize. `stages` says how long each stage of that was."""

from __future__ import annotations

from pathlib import Path

from measured import Steps, arguments

from gptq_core import Quantization, QuantizeConfig, Windows
from gptq_core.run.engine import code_sha256

args, steps = arguments(recipe={"required": True}), Steps()
config = QuantizeConfig(bits=args.bits, group_size=args.group_size, recipe=args.recipe)
windows = Windows(args.tokens, "side by side", len(args.tokens))
with steps("load"):
    run = Quantization.open(args.model, config, windows, Path(args.out), dtype=args.dtype, device="cpu")
with run:
    before = run.stage_seconds
    with steps("quantize"):
        for index in range(run.block_count):
            run.quantize_block(index)
    stages = {stage: seconds - before.get(stage, 0.0) for stage, seconds in run.stage_seconds.items()}
    with steps("save"):
        run.assemble()
steps.answer("gptq-pipeline", stages=stages, code_sha256=code_sha256())
