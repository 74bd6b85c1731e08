"""The server that Prefect starts for a run of the command line: it is for that run alone.

By default it has no password and answers pages of any origin, on the database that workers use too: whoever is on this machine, and
every page that a browser has open, could read secrets, make deployments and cancel runs.
"""

from __future__ import annotations

import os
import secrets
import tomllib
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def guard_own_server() -> None:
    """Give the server that Prefect will start a password that this process alone knows, and no origin of pages.

    To be called before Prefect is imported, which reads the environment then. Where a server of the person's own is configured Prefect
    starts none, and nothing is set.
    """
    if server_is_configured():
        return
    auth = os.environ.setdefault("PREFECT_SERVER_API_AUTH_STRING", f"run:{secrets.token_urlsafe(24)}")
    os.environ["PREFECT_API_AUTH_STRING"] = auth
    os.environ.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "http://127.0.0.1:0")  # no page has this one


def server_is_configured() -> bool:
    """Whether PREFECT_API_URL is set, in the environment or in Prefect's active profile."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    file = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        profiles = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or one that Prefect itself will complain about
        return False
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    found = profiles.get("profiles", {}).get(active, {})
    return isinstance(found, dict) and bool(found.get("PREFECT_API_URL"))


def keep_loopback_from_proxies() -> None:
    """Have no proxy of the environment asked for addresses of this machine: it would look for them on its own."""
    for name in ("NO_PROXY", "no_proxy"):
        there = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
        os.environ[name] = ",".join([*there, *(host for host in LOOPBACK if host not in there)])
