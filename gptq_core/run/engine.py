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

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
import torch
from torch import Tensor

from gptq_core.block.group import Member, solve_group
from gptq_core.block.stream import BlockStream, HiddenStates, check_token_ids
from gptq_core.checkpoint import card
from gptq_core.checkpoint.carried import carried_files
from gptq_core.checkpoint.writer import OutputFolder
from gptq_core.config import QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.errors import InputError
from gptq_core.inference import backends
from gptq_core.model import architecture
from gptq_core.model.opened import Model, open_model
from gptq_core.model.selection import Selection
from gptq_core.run import assembly
from gptq_core.run.block_work import BlockWork
from gptq_core.run.identity import content_key, identity
from gptq_core.run.summary import LayerRecord, Summary, distribution, summarize


class BlockRecord(TypedDict):
    """What quantizing or replaying a block took and made."""

    block: int
    resumed: bool
    """It was on disk."""
    seconds: float
    layers: list[LayerRecord]


class Published(Summary):
    """The summary of a checkpoint, and where it is."""

    path: str
    manifest_sha256: str


class Quantization:
    """One model on its way into one output folder. Made by `open`, closed by `close` or `with`."""

    def __init__(self, stream: BlockStream, selected: Selection, config: QuantizeConfig, windows: Windows, output: OutputFolder) -> None:
        self.stream, self.selection, self.config, self.windows, self.output = stream, selected, config, windows, output
        self.block_count = stream.block_count
        self.meta: dict[str, Any] | None = None
        self.key = ""
        self.finished = False
        head = architecture.head_name(stream.decoder.model)
        self._head = head if head in selected.layers else None
        self._captured: HiddenStates | None = None
        self._original: HiddenStates | None = None  # the same batches in the original model, where targets are shifted
        self._position = -1  # the block that the states enter; -1: none, capture comes first
        # on a GPU a block is written while the next one is quantized; a CPU would only share its time between the two
        self._writes_beside = stream.device.type == "cuda"

    @classmethod
    def open(
        cls,
        model: Model,
        config: QuantizeConfig,
        windows: Windows,
        out: Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        overwrite: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> Quantization:
        """Check everything that can be checked without work, lock the output and find what is already done.

        meta: entries for `meta` in both JSON files, beside the library's own. Raises InputError (wrong model, config or output;
        nothing was touched) or OutputHeldError.
        """
        with ExitStack() as on_failure:  # whatever goes wrong, memory and lock are given back
            stream = BlockStream.open(open_model(model, revision), dtype=dtype, device=device)
            on_failure.callback(stream.close)
            check_token_ids(windows, stream.model.config, "calibration")
            if config.tuning_steps and windows.count < 2:
                raise InputError(
                    f"quantization.tuning_steps = {config.tuning_steps}: one calibration window cannot both drive and judge "
                    "the tuning; give calibration.samples of 2 or more"
                )
            selected = stream.model.select(config)
            carried_files(stream.source.folder)  # refuses links that lead out of the folder, while nothing is done yet
            output = OutputFolder(Path(out))
            on_failure.callback(output.close)
            run = cls(stream, selected, config, windows, output)
            run.meta = meta
            with stream.timed("read"):
                record = identity(stream.source, config, windows, stream.device, stream.dtype)
            run.key = content_key(record)
            run.finished = output.open(run.key, record | {"tokens": run._text()}, overwrite)
            on_failure.pop_all()
        return run

    def kernel(self, dtype: torch.dtype | None = None) -> backends.Kernel | None:
        """The kernel that `config.backend` names, for what this run writes, on its device; None: plain torch. See backends.choose."""
        planned = dict.fromkeys(
            backends.Layer.planned(layer.config, layer.in_features, layer.out_features) for layer in self.selection.layers.values()
        )
        own = architecture.own_dtype(self.stream.model.config)
        return backends.choose(self.config.backend, planned, self.stream.device, dtype, own)

    def __enter__(self) -> Quantization:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the memory. Finished blocks stay on disk."""
        self._captured = self._original = None
        self.stream.close()
        self.output.close()

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage so far."""
        return self.stream.timed.seconds

    @property
    def _states(self) -> HiddenStates:
        """The calibration batches; there from `capture` to `close`."""
        assert self._captured is not None
        return self._captured

    def _text(self) -> dict[str, Any]:
        """Where the calibration tokens came from, for the record: the same tokens by another name are the same work."""
        w = self.windows
        return {"source": w.source, "windows": w.count, "of": w.total_windows, "seqlen": w.seqlen}

    def _file(self, index: int) -> str:
        """Blocks are the final shards 1 … n; the rest of the model is the last one."""
        return f"model-{index + 1:05d}-of-{self.block_count + 1:05d}.safetensors"

    # -- one block after the other ------------------------------------------------------------------------------------

    def capture(self) -> dict[str, int]:
        """Run the model up to its first block on every calibration batch. Also the way back to the start after a failure."""
        if self.config.allocate:
            raise InputError(
                "quantization.allocate: the widths are not chosen yet; quantize with what "
                "allocate(model, config, windows).apply(config) returns"
            )
        self._position = -1
        self.output.wait()
        [self._captured] = self.stream.enter(self.windows)
        self._original = self._states.copy() if self.config.target_shift else None
        self._position = 0
        return {
            "batches": len(self._states.batches),
            "tokens": self.windows.tokens.numel(),
            "hidden_size": self._states.states[0].shape[-1],
        }

    def quantize_block(self, index: int) -> BlockRecord:
        """Quantize one decoder block and commit it to disk, or replay it if that is already done. On a GPU the block is on disk when
        the next one, or `assemble`, comes back; an error in writing it is raised there.

        Blocks go in order; after a failure the same call begins again from the first block, replaying what is on disk.
        """
        started = time.perf_counter()
        self._reach(index)
        record, resumed = self._advance(index)
        return {"block": index, "resumed": resumed, "seconds": time.perf_counter() - started, "layers": record["layers"]}

    def _reach(self, index: int) -> None:
        """Take the states to where they enter block `index`."""
        if not 0 <= self._position <= index:
            self.capture()
        while self._position < index:
            self._advance(self._position)

    def _advance(self, index: int) -> tuple[dict[str, Any], bool]:
        """Take the states, which stand before block `index`, past it; its record, and whether it was on disk."""
        record = self.output.block(index)
        if record and self._last_missing() < index:
            self._position = index + 1  # nothing after this block needs its outputs
            return record, True
        # until this block is through, the states belong to no block: after a failure the next call captures again
        self._position = -1
        resumed = record is not None
        if record is None:
            record = self._quantize(index)
        else:
            self._replay(index)
        self._position = index + 1
        return record, resumed

    def _last_missing(self) -> int:
        if self._head and not any(r["kind"] == "rest" for r in self.output.records):
            return self.block_count  # the head comes after the last block
        done = {r["block"] for r in self.output.records if r["kind"] == "block"}
        return max((i for i in range(self.block_count) if i not in done), default=-1)

    def _replay(self, index: int) -> None:
        stream = self.stream
        stored = safetensors.torch.load_file(self.output.partial / self._file(index))
        with stream.filled(index, assembly.unpacking(stored, self.selection, self.config.format, stream.dtype)) as block:
            with stream.timed("forward"):
                self._states.run(block, index)
        if self._original is None:
            stream.skip(index)
            return
        with stream.filled(index) as block, stream.timed("forward"):
            self._original.run(block, index)

    def _quantize(self, index: int) -> dict[str, Any]:
        with self.stream.timed("read"):
            tensors = self.stream.read_block(index)
        with self.stream.filled(index, tensors.__getitem__) as block:
            self.stream.read_ahead(index + 1)
            work = BlockWork(self.stream, self.selection, self.config, self._states, self._original, index, block, tensors)
            work.quantize()
            shard, record = work.packed()
            if not self._writes_beside:
                with self.stream.timed("write"):
                    return self.output.write_shard(self._file(index), shard, record)
            self.output.write_beside(self._file(index), shard, record, lambda seconds: self.stream.timed.add("write", seconds))
            return record

    def assemble(self) -> Published:
        """Write what is not in a block, the index and the JSON files, and publish the folder. Returns the summary record."""
        if self.finished:
            return self._published(self.output.records[-1]["summary"])
        self.output.wait()
        for index in range(self.block_count):
            if not self.output.block(index):  # its write failed after its own call had returned
                self.quantize_block(index)
        self.output.wait()
        source, decoder = self.stream.source, self.stream.decoder
        with self.stream.timed("write"):
            rest = assembly.outside_blocks(decoder, source)
            head = self._quantize_head(self._head, rest) if self._head else []
            self.output.write_shard(self._file(self.block_count), rest, {"kind": "rest", "layers": head})
            size = assembly.write_index(self.output)
            assembly.write_configs(self.output, source.folder, decoder, self.config, self.selection, self.meta)
            summary = summarize(self.output.records, self.config, self.selection, source.bytes(), size)
            details = self.output.records[0] | {"summary": summary, "model_type": decoder.model.config.model_type}
            self.output.write_text("README.md", card.render(details, None))
            self.output.publish(summary)
        return self._published(summary)

    def _quantize_head(self, name: str, rest: dict[str, Tensor]) -> list[LayerRecord]:
        """Replace the head's weight among the tensors outside the blocks by its packed form; its report.

        Its inputs are the outputs of the last quantized block, taken through what stands between the two.
        """
        stream = self.stream
        self._reach(self.block_count)
        with stream.outside_filled(without=[f"{name}.weight"]) as model:
            hessian = stream.head_hessian(self._states, model.get_output_embeddings())
        weight = stream.read(f"{name}.weight").to(stream.device, stream.dtype)
        [(_, solution, report)] = solve_group([Member(name, weight, self.selection.layers[name].config)], hessian, None, stream.timed)
        own = {n: rest.pop(n) for n in list(rest) if n.rpartition(".")[0] == name}
        rest |= assembly.packed(own, {name: solution}, self.selection)
        return [{**report, **distribution(solution, self.selection.layers[name].config.bits)}]

    def _published(self, summary: Summary) -> Published:
        manifest = (self.output.out / "manifest.jsonl").read_bytes()
        return {**summary, "path": str(self.output.out), "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
