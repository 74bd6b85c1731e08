"""Read a model folder one tensor at a time.

Only safetensors are read: a pickle can run code when it is loaded. Headers are parsed once; a tensor's bytes are touched when
it is asked for, so a model larger than memory is no obstacle.
"""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.path = {path_or_id!r}: no such folder, and the hub cannot give it ({reason}); "
                         "give a local folder, or check the id, the revision and the network") from error  # fmt: skip


class Checkpoint:
    """The tensors of one model folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face model")
        self._files = {file: safe_open(folder / file, "pt") for file in self._shards()}
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
                raise InputError(f"{self.folder}: only pickle weights ({pickles[0]}), which can run code and are never loaded; "
                                 "convert them to safetensors first")  # fmt: skip
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
        """The tensor as stored, on the CPU."""
        file = self._file(name)
        with self._lock:
            return self._files[file].get_tensor(name)

    def read_together(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored, on the CPU: each through a mapping of the file of its own, so that its pages leave with it."""
        found: dict[str, Tensor] = {}
        for name in names:
            with safe_open(self.folder / self._file(name), "pt") as opened:
                found[name] = opened.get_tensor(name)
        return found

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


known_sha256: dict[str, str] = {}
"""Digests by path, size and time of change: one process reads a shard once, and may hand what it knows to another one."""


def _unchanged_sha256(path: Path) -> str:
    status = path.stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    if stamp not in known_sha256:
        known_sha256[stamp] = file_sha256(path)
    return known_sha256[stamp]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
