"""Hold a file, so that one process at a time works on what it stands for.

The lock is the kernel's own and goes with the process, however that ends. The file stays, and names the process that holds it or held it
last. It is opened without following a link, and a file with any other content is left as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from gptq_core.errors import InputError, OutputHeldError


def hold(path: Path, what: str) -> IO[bytes]:
    """Lock a file, made with its folder where it is missing, until the returned file is closed.

    what: the setting and its value, for the errors. Raises OutputHeldError, naming the holder, if another process has the lock, and
    InputError if the file cannot be opened or belongs to something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "r+b", buffering=0, opener=_made_without_links)
        locked = lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        raise InputError(f"{what}: {path} cannot be locked ({error.strerror}); choose another folder") from error
    if not locked:
        with file:
            raise OutputHeldError(f"{what} is held by {_holder(file)}; wait for it or choose another folder")
    if not re.fullmatch(rb"(process \d+\n)?", file.read(80)):
        file.close()
        raise InputError(f"{what}: {path} has to be a lock file and holds something else; move it away or choose another folder")
    file.seek(0)
    file.truncate()
    file.write(b"process %d\n" % os.getpid())
    return file


def _made_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _holder(file: IO[bytes]) -> str:
    try:
        return file.read(80).decode(errors="replace").strip() or "another process"
    except OSError:  # Windows lets the holder alone read it
        return "another process"
