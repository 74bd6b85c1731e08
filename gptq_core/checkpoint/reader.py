"""Read a model folder one tensor at a time.

Only safetensors are read: a pickle can run code when it is loaded. Headers are parsed once; a tensor's bytes are read on
access, so a model may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_core.checkpoint.carried import PATTERNS
from gptq_core.checkpoint.finite import check_finite
from gptq_core.errors import CorruptCheckpointError, InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(path_or_id: str, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself, or the hub's snapshot of a repository id.

    Raises InputError when the folder does not exist and the hub (or its cache) does not have it.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path_or_id.count("/") != 1 or path_or_id.startswith("."):
        raise InputError(f"model.path = {path_or_id!r}: no such folder; give a folder with config.json and *.safetensors, or a hub id")
    from huggingface_hub import errors, snapshot_download

    try:
        wanted = ["*.safetensors", *PATTERNS]
        found = snapshot_download(path_or_id, revision=revision, allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"])
        return Path(found)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.path = {path_or_id!r}: no such folder, and the hub cannot give it ({reason}); "
            "give a local folder, or check the id, the revision and the network"
        ) from error


class Checkpoint:
    """The tensors of one model folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face model")
        self._files = {file: safe_open(folder / file, "pt") for file in self._shards()}
        self._stamps = {file: _stamp((folder / file).stat()) for file in self._files}
        self._starts: dict[str, dict[str, int]] = {}
        self._where = {name: file for file, opened in self._files.items() for name in opened.keys()}
        # one safe_open handle is shared by the prefetch thread and the main one
        self._lock = threading.Lock()

    def _shards(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index}: not an index of shards ({error}); download it again") from error
        elif (self.folder / SINGLE).is_file():
            shards = [SINGLE]
        else:
            shards = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not shards:
            pickles = [path.name for pattern in PICKLES for path in self.folder.glob(pattern)]
            if pickles:
                raise InputError(
                    f"{self.folder}: only pickle weights ({pickles[0]}), which can run code and are never loaded; "
                    "convert them to safetensors first"
                )
            raise InputError(f"{self.folder}: no *.safetensors; give a folder that holds the model's weights")
        for shard in shards:
            if Path(shard).name != shard or not (self.folder / shard).is_file():
                raise InputError(f"{self.folder}: the index names {shard!r}, which is not a file of this folder; download it again")
            try:
                safe_open(self.folder / shard, "pt")
            except SafetensorError as error:
                raise InputError(f"{self.folder / shard}: not a readable safetensors file ({error}); download it again") from error
        return shards

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shards(self) -> dict[str, list[str]]:
        """Tensor names by file."""
        return {file: [name for name, where in self._where.items() if where == file] for file in self._files}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU, memory-mapped: bytes are read on first access, and stay mapped as long as this object lives.

        Raises CorruptCheckpointError, as read_apart does, where it holds numbers that are not finite.
        """
        return check_finite(self._mapped(name), name, self.folder / self._file(name))

    def read_apart(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored, on the CPU, each in memory of its own, which is released with it.

        Raises InputError where a file is no longer the one that was opened.
        """
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            path = self.folder / self._file(name)
            with path.open("rb") as opened:
                if _stamp(os.fstat(opened.fileno())) != self._stamps[path.name]:
                    raise InputError(f"{path}: was changed while the model was read; begin again, with a folder that stays as it is")
                found[name] = check_finite(_read(opened, self._start(opened, name), self._mapped(name)), name, path)
        return found

    def expect(self, names: Iterable[str]) -> None:
        """Let the system read these tensors from the disk into its cache in the background, where it supports that."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            path = self.folder / self._file(name)
            with path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), self._start(opened, name), self._mapped(name).nbytes, os.POSIX_FADV_WILLNEED)

    def _mapped(self, name: str) -> Tensor:
        file = self._file(name)
        with self._lock:
            tensor: Tensor = self._files[file].get_tensor(name)
        return tensor

    def _start(self, opened: io.BufferedReader, name: str) -> int:
        """Offset of a tensor's bytes in its file, which safe_open does not report."""
        file = self._where[name]
        if file not in self._starts:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            self._starts[file] = {name: 8 + size + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
        return self._starts[file][name]

    def _file(self, name: str) -> str:
        if name not in self._where:
            raise CorruptCheckpointError(f"{self.folder}: no tensor {name!r}; the folder is incomplete or of another architecture")
        return self._where[name]

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype as safetensors spells it, shape), without reading the data."""
        piece = self._files[self._where[name]].get_slice(name)
        return piece.get_dtype(), tuple(piece.get_shape())

    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.folder / file).stat().st_size for file in self._files)

    def digest(self) -> str:
        """sha256 over config.json and every shard's sha256."""
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(_unchanged_sha256, [self.folder / "config.json", *(self.folder / file for file in self._files)]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(opened: io.BufferedReader, start: int, like: Tensor) -> Tensor:
    """Read a tensor into pages of its own; on the heap they would be kept after its release."""
    if not like.numel():
        return torch.empty_like(like)
    pages = mmap.mmap(-1, like.nbytes)
    opened.seek(start)
    opened.readinto(pages)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


known_sha256: dict[str, str] = {}
"""Digests by path, size and time of change: a process hashes a shard once, and may pass its digests to another process."""


def _unchanged_sha256(path: Path) -> str:
    status = path.stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    if stamp not in known_sha256:
        known_sha256[stamp] = file_sha256(path)
    return known_sha256[stamp]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
