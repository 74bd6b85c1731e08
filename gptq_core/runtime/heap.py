"""The C library's heap. Tensors of a few MB lie there, and a forward takes and frees hundreds of them.

glibc gives what is free at the heap's end back to the system as soon as it is more than twice the largest tensor so far, and the next
tensor faults the same pages in again, one by one: that is a third of a small model's run where page faults are expensive, as in virtual
machines. So while a model is quantized free pages are kept. Large tensors of the solver, which are mapped on their own, come on top.

Nothing here does anything where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import sys

ON_HEAP = 32 << 20
"""Bytes from which glibc always maps an allocation of its own: its DEFAULT_MMAP_THRESHOLD_MAX. Below, it learns to use the heap."""
KEPT = 1 << 30
"""Free bytes at the heap's end that stay: more than the tensors of a forward that lie there."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def keep() -> None:
    """Keep free pages from now on, in the whole process."""
    _set(_MMAP_THRESHOLD, ON_HEAP)
    _set(_TRIM_THRESHOLD, KEPT)


def let_go() -> None:
    """Give all free pages back, and set the thresholds that glibc itself arrives at once it has seen tensors of ON_HEAP bytes."""
    _set(_TRIM_THRESHOLD, 2 * ON_HEAP)
    give_back()


def give_back() -> None:
    """Give back all free pages, holes inside the heap too."""
    if library := _glibc():
        library.malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    if library := _glibc():
        library.mallopt(parameter, value)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":  # elsewhere there is no library to load by the name of None, or another one
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # others have a mallopt too, with numbers of their own
