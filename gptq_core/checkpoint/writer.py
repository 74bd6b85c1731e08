"""Durable output: block files, manifest, and the folder that appears when all is done.

Work happens in `<out>.partial` under a kernel lock on `<out>.lock`. A decoder block's file is a final shard: written to a
temporary name, fsynced, renamed into place, and only then named, with its sha256, by one line of `manifest.jsonl`. So after a
kill −9 the manifest lists exactly what is finished. Publishing renames the folder to `<out>`; its manifest is the last thing
written. Nothing in the folder depends on the clock: a resumed run gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from gptq_core.checkpoint.finite import check_finite
from gptq_core.checkpoint.reader import file_sha256
from gptq_core.errors import CorruptCheckpointError, InputError
from gptq_core.runtime.lock import hold

MANIFEST = "manifest.jsonl"


class OutputFolder:
    """One output folder, from lock to publication. Holds the lock until closed; the kernel frees it when the process dies."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.records: list[dict[str, Any]] = []
        self._beside = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        for path in (self.out, self.partial):
            if path.exists() and not path.is_dir():
                raise InputError(f"output.dir = {str(out)!r}: {path} is a file; choose another folder")
        self._lock = hold(out.with_name(out.name + ".lock"), f"output.dir = {str(out)!r}")

    def close(self) -> None:
        """Wait for pending writes, and release the lock."""
        self._beside.shutdown()
        self._lock.close()

    # -- what is there ------------------------------------------------------------------------------------------------

    def open(self, key: str, run: dict[str, Any], overwrite: bool) -> bool:
        """Find out where work stands for this key: True when `out` already holds its finished result.

        Otherwise `<out>.partial` is resumed or begun. Work of another key is never thrown away unless `overwrite` says so.
        """
        finished = self._read(self.out)
        if finished and finished[-1]["kind"] == "complete" and finished[0]["key"] == key:
            self.records = finished
            self._check_sizes()
            return True
        if self.out.exists() and any(self.out.iterdir()) and not overwrite:
            raise InputError(
                f"output.dir = {str(self.out)!r} already holds something else{_difference(finished, run)}; "
                "choose another folder, or set output.overwrite: true (--overwrite)"
            )
        begun = self._read(self.partial)
        if begun and begun[0]["key"] == key:
            # files are verified: a block whose file is gone or changed counts as missing
            self.records = [record for record in begun if "file" not in record or self._intact(record)]
            self._rewrite(self.records)  # also drops a last line that a crash left incomplete
            return False
        if begun and len(begun) > 1 and not overwrite:
            raise InputError(
                f"{self.partial} holds {len(begun) - 1} finished blocks of another run{_difference(begun, run)}; "
                "finish that run, remove the folder, choose another output, or set output.overwrite: true (--overwrite)"
            )
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        self.records = [{"kind": "run", "key": key, **run}]
        self._rewrite(self.records)
        return False

    def _check_sizes(self) -> None:
        for record in self.records:
            for name, size in record.get("files", {}).items():
                path = self.out / name
                if not path.is_file() or path.stat().st_size != size:
                    raise CorruptCheckpointError(
                        f"{path}: missing or not the {size} bytes its manifest names; run again with output.overwrite: true (--overwrite)"
                    )

    @staticmethod
    def _read(folder: Path) -> list[dict[str, Any]]:
        path = folder / MANIFEST
        if not path.is_file():
            return []
        # every complete line ends in a newline: what follows the last one is a write that a crash cut off
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: a line cannot be read ({error}): remove {folder}, and its work is done again") from error

    def _intact(self, record: dict[str, Any]) -> bool:
        path = self.partial / record["file"]
        return path.is_file() and bool(file_sha256(path) == record["sha256"])

    def block(self, index: int) -> dict[str, Any] | None:
        """The record of a finished block."""
        return next((record for record in self.records if record["kind"] == "block" and record["block"] == index), None)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_shard(self, file: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
        """Commit one shard and its manifest line. Returns the record as written."""
        path = self.partial / file
        for name, tensor in tensors.items():
            check_finite(tensor, name, path)
        replace_file(path, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        record = record | {"file": file, "files": {file: path.stat().st_size}, "sha256": file_sha256(path), "tensors": list(tensors)}
        kept = [r for r in self.records if not (r["kind"] == record["kind"] and r.get("block") == record.get("block"))]
        replaces = len(kept) < len(self.records)
        self.records = [*kept, record]
        if replaces:
            self._rewrite(self.records)
        else:
            self._append(record)
        return record

    def write_beside(self, file: str, tensors: dict[str, Tensor], record: dict[str, Any], took: Callable[[float], None]) -> None:
        """`write_shard` in another thread, one shard at a time; calls `took` with its seconds. Raises the error of the write before."""
        self.wait()

        def write() -> None:
            started = time.perf_counter()
            self.write_shard(file, tensors, record)
            took(time.perf_counter() - started)

        self._writing = self._beside.submit(write)

    def wait(self) -> None:
        """Wait for the write that `write_beside` began. Raises its error, once."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def write_text(self, file: str, text: str) -> None:
        self._commit(file, text.encode())

    def copy(self, folder: Path, path: Path) -> None:
        """Copy a file of `folder`, by its path in it."""
        replace_file(self.partial / path, folder / path)

    def publish(self, summary: Mapping[str, object]) -> dict[str, Any]:
        """Write the last manifest line, with every file's size and sha256, and rename the folder to its final name."""
        paths = (path.relative_to(self.partial).as_posix() for path in self.partial.rglob("*") if path.is_file())
        names = sorted(name for name in paths if name not in (MANIFEST, "README.md"))
        shards = {r["file"]: r["sha256"] for r in self.records if "file" in r}
        record = {
            "kind": "complete",
            "summary": summary,
            "files": {name: (self.partial / name).stat().st_size for name in names},
            "sha256": {name: shards.get(name) or file_sha256(self.partial / name) for name in names},
        }
        # blocks may have been redone out of order; the final manifest always reads the same
        ordered = sorted((r for r in self.records if r["kind"] != "complete"), key=lambda r: (r["kind"] != "run", r.get("block", 1 << 30)))
        self.records = [*ordered, record]
        self._rewrite(self.records)
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
            os.rename(self.partial, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.partial, self.out)
        _sync_folder(self.out.parent)
        return record

    def _append(self, record: dict[str, Any]) -> None:
        with (self.partial / MANIFEST).open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        self._commit(MANIFEST, "".join(map(_line, records)).encode())

    def _commit(self, name: str, data: bytes) -> None:
        replace_file(self.partial / name, data)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def replace_file(path: Path, content: bytes | dict[str, Tensor] | Path) -> None:
    """Put bytes, tensors as safetensors, or a copy of a file at a path so that a reader or a crash sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, dict):
        safetensors.torch.save_file(content, temporary, {"format": "pt"})
    elif isinstance(content, Path):
        shutil.copyfile(content, temporary)  # in pieces
    else:
        temporary.write_bytes(content)
    os.chmod(temporary, 0o644)  # safetensors writes 0600
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _difference(records: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """How the run that wrote a folder differs from the requested one, in words."""
    if not records:
        return ""
    there = records[0]
    changed = [
        f"{name} {there['config'].get(name)!r} there, {value!r} asked for"
        for name, value in run["config"].items()
        if there.get("config", {}).get(name) != value
    ]
    for what, field in (("model", "model_sha256"), ("calibration text", "tokens_sha256")):
        if there.get(field) != run[field]:
            changed.append(f"another {what}")
    for name, value in run["versions"].items():
        if (before := there.get("versions", {}).get(name)) != value:
            changed.append(f"{name} {_short(before)} there, {_short(value)} now")
    return f" ({'; '.join(changed)})" if changed else ""


def _short(value: Any) -> str:
    """A digest by its first digits."""
    text = str(value)
    return text[:8] if len(text) == 64 else text
