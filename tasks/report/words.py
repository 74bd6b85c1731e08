"""Numbers as a person reads them."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

NONE = "–"


def size(count: float | None) -> str:
    """Bytes in the unit that reads best; a dash for what is not known."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def size_unit(largest: float) -> tuple[float, str]:
    """Divisor of bytes for an axis that reaches to `largest`, and the name of that unit."""
    return next(((10.0**power, unit) for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")) if largest >= 10**power), (1.0, "bytes"))


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def known(value: float | None) -> TypeGuard[float]:
    """Whether it is a number to show: records hold null, and NaN or Infinity where something overflowed."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """To `digits` significant ones; a dash for what was not measured."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def percent(value: float | None, digits: int = 1, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.{digits}%}".replace("%", " %") if known(value) else NONE


def count(items: int, what: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{items:,} {what}" + ("" if items == 1 else "s")
