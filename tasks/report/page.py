"""Write a page as one HTML file that holds styles, plotly, data and figures; its policy forbids any request to a network.

Figures are drawn where the file is opened, from JSON in it. Without JavaScript the tables below them show the same numbers.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from gptq_core.checkpoint.writer import replace_file
from tasks.report.parts import Page
from tasks.report.plots import DARK

HERE = Path(__file__).parent
NUMERIC = re.compile(r"[+\-−]?\d")


@cache
def _templates() -> Environment:
    found = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.tests["numeric"] = lambda text: bool(NUMERIC.match(text))
    return found


def html(page: Page) -> str:
    """The whole file. Everything that comes from `page` is escaped; styles and scripts are the project's own and plotly's."""
    figures = {figure.key: figure.plot for figure in page.figures}
    own = {name: (HERE / name).read_text(encoding="utf-8") for name in ("style.css", "draw.js")}
    return (
        _templates()
        .get_template("page.html")
        .render(
            page=page, figures=figures, dark=DARK, style=own["style.css"], draw=own["draw.js"], plotly=get_plotlyjs() if figures else ""
        )
    )


def write(path: Path, page: Page) -> Path:
    """Replace the file at `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, html(page).encode())
    return path
