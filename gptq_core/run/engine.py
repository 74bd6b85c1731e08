"""Quantize a model into a checkpoint: the one place where model, method, format and hardware meet.

    with Quantization.open(model, config, windows, out) as run:
        run.capture()
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()

One decoder block is in memory at a time: read from its shards (the next one is fetched meanwhile), walked, packed, written
as a final shard, released. So memory does not grow with depth. Blocks already on disk are replayed: dequantized and run
forward, which restores the activations exactly, so that nothing but finished blocks is ever saved.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import platform
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import gptq_core
from gptq_core.block import walk
from gptq_core.block.group import Member, solve_group
from gptq_core.block.tuning import tune
from gptq_core.checkpoint import card, format
from gptq_core.checkpoint.reader import Checkpoint, file_sha256, resolve
from gptq_core.checkpoint.writer import OutputFolder
from gptq_core.config import QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.errors import InputError
from gptq_core.inference import backends
from gptq_core.kernels import dispatch
from gptq_core.method import solver
from gptq_core.method.hessian import Hessian, Shift
from gptq_core.model import architecture, capture, selection
from gptq_core.run import assembly
from gptq_core.run.summary import distribution, summarize
from gptq_core.runtime import heap
from gptq_core.runtime.timing import Stages
from gptq_core.work_sizes import TOKENS_PER_FORWARD

LARGE_GROUP = 4096
"""Inputs from which solving takes so much memory and time that the heap's free pages are given back before: the forward that follows
must fault them in again, which on a small model is a tenth of the whole run."""
DISCOVERY_TOKENS = 16
"""Tokens of the probe forward that discovers input groups."""


@functools.cache
def code_sha256() -> str:
    """sha256 of this library's own sources: another solver is other work, whatever the version says."""
    files = sorted(path for path in Path(gptq_core.__file__).parent.rglob("*") if path.suffix in (".py", ".c"))
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def content_key(identity: dict[str, Any]) -> str:
    """sha256 of what decides the bytes of a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Quantization:
    """One model on its way into one output folder. Made by `open`, closed by `close` or `with`."""

    def __init__(
        self,
        source: Checkpoint,
        model_config: transformers.PretrainedConfig,
        config: QuantizeConfig,
        windows: Windows,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.windows, self.device, self.dtype = config, windows, device, dtype
        self.source = source
        self.decoder = architecture.find_decoder(architecture.empty_model(model_config, dtype))
        self.block_count = len(self.decoder.blocks)
        self.timed = Stages(device)
        self.selection = selection.select(self.source, self.decoder, config)
        head = architecture.head_name(self.decoder.model)
        self._head = head if head in self.selection.layers else None
        self._batches: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._original: list[Tensor] = []  # the same batches in the original model, where targets are shifted
        self._calls: list[dict[int, capture.Call]] = []
        self._position = -1  # the block that self._hidden enters; -1: none, capture comes first
        self._prefetcher = ThreadPoolExecutor(max_workers=1)
        self._prefetched: dict[int, Future[dict[str, Tensor]]] = {}
        if device.type == "cpu":
            heap.keep()
        # on a GPU a block is written while the next one is quantized; a CPU would only share its time between the two
        self._writes_beside = device.type == "cuda"

    @classmethod
    def open(
        cls,
        model_path: str,
        config: QuantizeConfig,
        windows: Windows,
        out: Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        overwrite: bool = False,
    ) -> Quantization:
        """Check everything that can be checked without work, lock the output and find what is already done.

        Raises InputError (wrong model, config or output; nothing was touched) or OutputHeldError.
        """
        run = cls.look(model_path, config, windows, revision=revision, dtype=dtype, device=device)
        with ExitStack() as on_failure:
            on_failure.callback(run.close)  # whatever goes wrong from here on, memory and lock are given back
            run.output = OutputFolder(Path(out))
            record = run._identity()
            run.key = content_key(record)
            run.finished = run.output.open(run.key, record | {"tokens": run._text()}, overwrite)
            on_failure.pop_all()
        return run

    @classmethod
    def look(
        cls, model_path: str, config: QuantizeConfig, windows: Windows, *, revision: str | None, dtype: str, device: str
    ) -> Quantization:
        """What `open` checks before it touches the output. What comes back can capture, and has nowhere to write to."""
        source = Checkpoint(resolve(model_path, revision))
        target = architecture.choose_device(device)
        model_config = architecture.load_config(source.folder)
        vocabulary = model_config.get_text_config(decoder=True).vocab_size
        if (largest := int(windows.tokens.max())) >= vocabulary or int(windows.tokens.min()) < 0:
            raise InputError(
                f"token id {largest} in the calibration windows: the model's vocabulary ends at {vocabulary - 1}; "
                "use the model's own tokenizer"
            )
        if config.tuning_steps and windows.count < 2:
            raise InputError(
                f"quantization.tuning_steps = {config.tuning_steps}: one calibration window cannot both drive and judge "
                "the tuning; give calibration.samples of 2 or more"
            )
        return cls(source, model_config, config, windows, target, architecture.choose_dtype(dtype, model_config, target))

    def kernel(self, dtype: torch.dtype | None = None) -> backends.Kernel | None:
        """The kernel that `config.backend` names, for what this run writes, on its device; None: plain torch. See backends.choose."""
        planned = dict.fromkeys(
            backends.Layer.planned(layer.config, layer.in_features, layer.out_features) for layer in self.selection.layers.values()
        )
        own = architecture.load_config(self.source.folder).dtype
        return backends.choose(self.config.backend, planned, self.device, dtype, own)

    def __enter__(self) -> Quantization:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the memory. Finished blocks stay on disk."""
        self._prefetcher.shutdown(cancel_futures=True)
        self._hidden, self._original, self._prefetched = [], [], {}
        if self.device.type == "cpu":
            heap.let_go()
        if hasattr(self, "output"):
            self.output.close()

    # -- before any work ----------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What decides the bytes of the result: the content key is the sha256 of this record."""
        with self.timed("read"):
            model_sha256 = self.source.digest()
        # the dataset is represented by the digest of its tokens, backend concerns loading only
        config = self.config.model_dump(exclude={"dataset", "backend"})
        if self.config.dynamic:  # the first rule that matches decides, so their order counts: as pairs it does for JSON too
            config["dynamic"] = [[rule, changes] for rule, changes in self.config.dynamic.items()]
        return {
            "config": config,
            "model_sha256": model_sha256,
            "tokens_sha256": self.windows.digest,
            "versions": {
                "gptq_core": format.code_version(),
                "code_sha256": code_sha256(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": self.device.type,
                "machine": platform.machine(),
                "kernels": dispatch.implementation(self.device, self.dtype),
            },
        }

    def _text(self) -> dict[str, Any]:
        """Where the calibration tokens came from, for the record: the same tokens by another name are the same work."""
        w = self.windows
        return {"source": w.source, "windows": w.count, "of": w.total_windows, "seqlen": w.seqlen}

    def _file(self, index: int) -> str:
        """Blocks are the final shards 1 … n; the rest of the model is the last one."""
        return f"model-{index + 1:05d}-of-{self.block_count + 1:05d}.safetensors"

    # -- the work -----------------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """Run the model up to its first block on every calibration batch. Also the way back to the start after a failure."""
        if self.config.allocate:
            raise InputError(
                "quantization.allocate: the widths are not chosen yet; quantize with what "
                "allocate(model, config, windows).apply(config) returns"
            )
        self._position = -1
        if hasattr(self, "output"):
            self.output.settle()
        model, blocks = self.decoder.model, self.decoder.blocks
        block_names = set(self.decoder.block_tensor_names())
        outside = [n for n in architecture.tensor_names(model) if n not in block_names]
        body = {n for n in outside if n.startswith(f"{model.base_model_prefix}.")}  # the head is not needed to reach the blocks
        with self.timed("read"):
            architecture.fill(model, "", self._read, self.device, self.dtype, skip=set(architecture.tensor_names(model)) - body)
        batch = max(1, TOKENS_PER_FORWARD.get(self.device.type, TOKENS_PER_FORWARD["cuda"]) // self.windows.seqlen)
        self._batches = [b.to(self.device) for b in self.windows.tokens.split(batch)]
        with self.timed("forward"):
            architecture.fill(blocks[0], f"{self.decoder.prefix}.0", self._read_block(0).__getitem__, self.device, self.dtype)
            few = self._batches[0][:1, :DISCOVERY_TOKENS]
            self._as_tuple = capture.returns_tuple(model.base_model, blocks[0], few)
            architecture.empty(blocks[0])
            [self._probe], self._probe_calls = capture.capture(model.base_model, blocks, [few], self._as_tuple)
            self._hidden, self._calls = capture.capture(model.base_model, blocks, self._batches, self._as_tuple)
        self._original = list(self._hidden) if self.config.target_shift else []
        self._position = 0
        for child in architecture.outside(model, blocks):
            architecture.empty(child)
        return {"batches": len(self._batches), "tokens": self.windows.tokens.numel(), "hidden_size": self._hidden[0].shape[-1]}

    def quantize_block(self, index: int) -> dict[str, Any]:
        """Quantize one decoder block and commit it to disk, or replay it if that is already done. On a GPU the block is on disk when
        the next one, or `assemble`, comes back; an error in writing it is raised there.

        Blocks go in order; after a failure the same call begins again from the first block, replaying what is on disk.
        """
        started = time.perf_counter()
        if not 0 <= self._position <= index:
            self.capture()
        while self._position < index:
            self._advance(self._position)
        record, resumed = self._advance(index)
        return {"block": index, "resumed": resumed, "seconds": time.perf_counter() - started, "layers": record["layers"]}

    def _advance(self, index: int) -> tuple[dict[str, Any], bool]:
        """Take the activations, which stand before block `index`, past it; its record, and whether it was on disk."""
        record = self.output.block(index)
        if record and self._last_missing() < index:
            self._position = index + 1  # nothing after this block needs its outputs
            return record, True
        block, path = self.decoder.blocks[index], f"{self.decoder.prefix}.{index}"
        # until this block is through, the activations belong to no block: after a failure the next call captures again
        self._position = -1
        resumed = record is not None
        try:
            if resumed:
                self._prefetched.pop(index, None)
                self._replay(index, block, path)
            else:
                record = self._quantize(index, block, path)
        finally:
            architecture.empty(block)
        self._position = index + 1
        return record, resumed

    def _last_missing(self) -> int:
        if self._head and not any(r["kind"] == "rest" for r in self.output.records):
            return self.block_count  # the head comes after the last block
        done = {r["block"] for r in self.output.records if r["kind"] == "block"}
        return max((i for i in range(self.block_count) if i not in done), default=-1)

    def _replay(self, index: int, block: nn.Module, path: str) -> None:
        stored = safetensors.torch.load_file(self.output.partial / self._file(index))
        read = assembly.unpacking(stored, self.selection, self.config.format, self.dtype)
        with self.timed("read"):
            architecture.fill(block, path, read, self.device, self.dtype)
        with self.timed("forward"):
            walk.run(block, self._hidden, self._calls[index])
        if self._original:
            with self.timed("read"):
                architecture.fill(block, path, self._read_block(index).__getitem__, self.device, self.dtype)
            with self.timed("forward"):
                walk.run(block, self._original, self._calls[index])

    def _quantize(self, index: int, block: nn.Module, path: str) -> dict[str, Any]:
        with self.timed("read"):
            tensors = self._prefetched.pop(index).result() if index in self._prefetched else self._read_block(index)
            architecture.fill(block, path, tensors.__getitem__, self.device, self.dtype)
        if index + 1 < self.block_count and index + 1 not in self._prefetched:
            if self.device.type == "cpu":  # where a second block would count
                self.source.expect(self._block_sources(index + 1).values())
            else:
                self._prefetched[index + 1] = self._prefetcher.submit(self._read_block, index + 1)
        configs, linears = self.selection.in_block(index), architecture.linears_of(block)
        wanted = {name: linears[name] for name in configs}
        with self.timed("forward"):
            groups = self._groups(index, block, wanted)
        solutions: dict[str, solver.Solution] = {}
        reports: dict[str, dict[str, Any]] = {}

        original = self._twin(index, block, wanted)
        writers = original.writers if original else ()

        def solve(group: walk.InputGroup, hessian: Hessian, shift: Shift | None) -> None:
            if self.device.type == "cpu" and group.in_features >= LARGE_GROUP:
                heap.give_back()  # what the forward up to here has left
            members = [Member(f"{path}.{name}", wanted[name].weight, configs[name], name in writers) for name in group.names]
            for name, solution, report in solve_group(members, hessian, shift, self.timed):
                solutions[name], reports[name] = solution, report
                linear = wanted[name.removeprefix(f"{path}.")]
                tensors[f"{name}.weight"] = linear.weight.to("meta")  # its pages leave now, not with the block
                linear.weight.data = solution.weight(self.dtype)
                if linear.bias is not None:  # float16 on disk: what follows must see what a consumer will compute
                    linear.bias.data = linear.bias.half().to(self.dtype)

        tuned = self.config.tuning_steps > 0
        inputs = list(self._hidden) if tuned else []
        with self.timed("forward"):
            walk.walk(
                block,
                wanted,
                groups,
                self._hidden,
                self._calls[index],
                solve,
                self.config.true_sequential,
                original=original,
                timed=self.timed,
                once=not tuned,
            )
        tuning = None
        if tuned:
            with self.timed("tuning"):
                solutions, tuning = self._tune(index, block, wanted, solutions, inputs)
        with self.timed("pack"):
            for name, solution in solutions.items():
                reports[name] |= distribution(solution, self.selection.layers[name].config.bits)
            shard = assembly.packed(tensors, solutions, self.selection)
        record = {"kind": "block", "block": index, "layers": list(reports.values())} | ({"tuning": tuning} if tuning else {})
        if not self._writes_beside:
            with self.timed("write"):
                return self.output.write_shard(self._file(index), shard, record)
        self.output.write_beside(self._file(index), shard, record, lambda seconds: self.timed.add("write", seconds))
        return record

    def _groups(self, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> list[walk.InputGroup]:
        groups = walk.discover(block, linears, self._probe, self._probe_calls[index][1])
        unreached = set(linears) - {name for group in groups for name in group.names}
        if unreached:
            raise InputError(
                f"{self.decoder.prefix}.{index}.{min(unreached)}: a forward never reaches this linear, so it has no calibration inputs"
            )
        return groups

    def _twin(self, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> walk.Original | None:
        """A copy of the block that stays as it is, for the original model's hidden states; None where targets are not shifted."""
        if not self._original:
            return None
        writers: frozenset[str] = frozenset()
        if self.config.residual_shift:
            with self.timed("forward"):
                writers = walk.residual_writers(block, linears, self._probe, self._probe_calls[index][1])
        twin = copy.deepcopy(block)
        inner = architecture.linears_of(twin)
        return walk.Original(twin, {name: inner[name] for name in linears}, self._original, writers)

    def _call(self, index: int) -> capture.Call:
        """The block's call for the largest batch."""
        return self._calls[index][max(self._calls[index])]

    def _tune(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], solutions: dict[str, solver.Solution], inputs: list[Tensor]
    ) -> tuple[dict[str, solver.Solution], dict[str, Any]]:
        """Solutions after block tuning, with the weights and the hidden states that belong to them; and how it went."""
        path = f"{self.decoder.prefix}.{index}."
        inner = {name.removeprefix(path): solution for name, solution in solutions.items()}
        codes = {name: self.selection.layers[path + name].config.max_code for name in inner}
        steps = self.config.tuning_steps
        found, tuning = tune(block, inner, codes, torch.cat(inputs), torch.cat(self._original), self._call(index), steps)
        for name, solution in found.items():
            linears[name].weight.data = solution.weight(self.dtype)
        self._hidden = inputs
        walk.run(block, self._hidden, self._calls[index])
        return {path + name: solution for name, solution in found.items()}, dataclasses.asdict(tuning) | {"kept": tuning.kept}

    def assemble(self) -> dict[str, Any]:
        """Write what is not in a block, the index and the JSON files, and publish the folder. Returns the summary record."""
        if self.finished:
            return self.output.records[-1]["summary"] | self._published()
        self.output.settle()
        for index in range(self.block_count):
            if not self.output.block(index):  # its writing failed, which its own call could not tell
                self.quantize_block(index)
        self.output.settle()
        with self.timed("write"):
            rest, unused = assembly.outside_blocks(self.decoder, self.source)
            head = self._quantize_head(rest) if self._head else []
            self.output.write_shard(self._file(self.block_count), rest, {"kind": "rest", "layers": head})
            size = assembly.write_index(self.output)
            self._write_configs()
            summary = summarize(self.output.records, self.config, self.selection, self.source.bytes(), size, unused)
            self.output.write_text("README.md", card.render(self._details(summary), None))
            self.output.publish(summary)
        return summary | self._published()

    def _quantize_head(self, rest: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Replace the head's weight among the tensors outside the blocks by its packed form; its report.

        Its inputs are the outputs of the last quantized block, taken through what stands between the two.
        """
        model, name = self.decoder.model, self._head
        if not 0 <= self._position <= self.block_count:
            self.capture()
        while self._position < self.block_count:
            self._advance(self._position)
        head, outside = model.get_output_embeddings(), rest.keys() - {f"{name}.weight"}
        architecture.fill(model, "", self._read, self.device, self.dtype, skip=set(architecture.tensor_names(model)) - outside)
        hessian = Hessian(head.in_features, self.device)
        capture.finish(model, self.decoder.blocks, head, self._batches, self._hidden, self._as_tuple, hessian.add)
        weight = self._read(f"{name}.weight").to(self.device, self.dtype)
        [(_, solution, report)] = solve_group([Member(name, weight, self.selection.layers[name].config)], hessian, None, self.timed)
        own = {n: rest.pop(n) for n in list(rest) if n.rpartition(".")[0] == name}
        rest |= assembly.packed(own, {name: solution}, self.selection)
        return [report | distribution(solution, self.selection.layers[name].config.bits)]

    def _write_configs(self) -> None:
        assembly.write_configs(self.output, self.source.folder, self.decoder, self.config, self.selection)

    def _details(self, summary: dict[str, Any]) -> dict[str, Any]:
        return self.output.records[0] | {"summary": summary, "model_type": self.decoder.model.config.model_type}

    def _published(self) -> dict[str, Any]:
        manifest = (self.output.out / "manifest.jsonl").read_bytes()
        return {"path": str(self.output.out), "manifest_sha256": hashlib.sha256(manifest).hexdigest()}

    # -- reading and timing -------------------------------------------------------------------------------------------

    def _source_name(self, name: str) -> str:
        return architecture.source_name(self.decoder.model, name, self.source.__contains__) or name

    def _read(self, name: str) -> Tensor:
        source = self._source_name(name)
        return self.source.read_apart([source])[source]

    def _block_sources(self, index: int) -> dict[str, str]:
        names = architecture.tensor_names(self.decoder.blocks[index], f"{self.decoder.prefix}.{index}")
        return {name: self._source_name(name) for name in names}

    def _read_block(self, index: int) -> dict[str, Tensor]:
        sources = self._block_sources(index)
        found = self.source.read_apart(sources.values())
        if self.device.type == "cuda":  # from there a copy to the GPU does not keep anyone waiting
            found = {source: tensor.pin_memory() for source, tensor in found.items()}
        return {name: found[source] for name, source in sources.items()}

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage so far."""
        return self.timed.seconds


def key(model_path: str, config: QuantizeConfig, windows: Windows, *, device: str, dtype: str, revision: str | None) -> str:
    """sha256 of all that decides an allocation."""
    with Quantization.look(model_path, config, windows, revision=revision, dtype=dtype, device=device) as run:
        return content_key(run._identity())
