"""A browser of the system, for the tests of pages. Playwright's driver comes with its wheel, its browsers do not."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = f"no browser found ({', '.join(NAMES)}): install one to run the tests of pages (on Debian: apt install chromium)"


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)
