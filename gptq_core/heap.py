"""The C library's heap: free pages that it keeps go back to the system.

Tensors of a few MB lie there, and what a forward leaves between two that stay is kept for later; large ones of the solver, mapped on
their own, then come on top of it.
"""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Give back all free pages of the heap, holes inside it too. Does nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
