"""The parts of a page. The template knows how each of them looks, and nothing about runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"
    tone: str = "plain"
    """plain; lead: the first thing that is read; warning."""


@dataclass(frozen=True)
class Tiles:
    """Single numbers: label, value, and a smaller line below."""

    tiles: list[tuple[str, str, str]]
    kind: str = "tiles"


@dataclass(frozen=True)
class Table:
    """Cells are texts; the first of a row names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    marked: frozenset[int] = frozenset()
    """Rows that stand out."""
    kind: str = "table"


@dataclass(frozen=True)
class Items:
    items: list[str]
    kind: str = "items"


@dataclass(frozen=True)
class Code:
    """Text as it is. name: also to be saved under this name."""

    label: str
    text: str
    name: str | None = None
    kind: str = "code"


@dataclass(frozen=True)
class Figure:
    """A plot by plotly, and the same in words and as a table for a reader who cannot see it."""

    key: str
    title: str
    description: str
    plot: dict[str, Any]
    """plotly's `data` and `layout`."""
    table: Table
    kind: str = "figure"


Part = Text | Tiles | Table | Items | Code | Figure


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    parts: list[Part]


@dataclass(frozen=True)
class Page:
    title: str
    kicker: str
    """What kind of report it is, above the title."""
    sections: list[Section]
    label: str | None = None
    """What must be read with every number of the page, such as that they come from a screening."""
    figures: list[Figure] = field(init=False)

    def __post_init__(self) -> None:
        found = [part for section in self.sections for part in section.parts if isinstance(part, Figure)]
        object.__setattr__(self, "figures", found)
