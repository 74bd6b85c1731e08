"""References to secrets, so that no config holds one: `env:NAME` is an environment variable, `block:NAME` a Prefect Secret block."""

from __future__ import annotations

import os
import re
from typing import Any

from gptq_core.errors import InputError

FORMS = "env:NAME (an environment variable) or block:NAME (a Prefect Secret block)"


def is_reference(value: str) -> bool:
    """Whether `value` has the form env:NAME or block:NAME."""
    return bool(re.fullmatch(r"env:[A-Za-z_]\w*|block:[\w.-]+", value, re.ASCII))


def resolve(value: str) -> str:
    """The secret that a reference names; any other value unchanged. Raises InputError for a missing or empty one. No message shows it."""
    if not is_reference(value):
        return value
    kind, _, name = value.partition(":")
    found = os.environ.get(name) if kind == "env" else _block(name)
    if not found:
        raise InputError(
            f"{value}: "
            + (
                f"the environment variable {name} is not set or empty; set it where the run is started"
                if kind == "env"
                else f"the Secret block {name} is empty; give it a value"
            )
        )
    return found


def check(value: str) -> None:
    """Check as far as possible without a server: raises InputError for an environment variable that is not set."""
    if value.startswith("env:"):
        resolve(value)


def _block(name: str) -> str:
    import httpx
    from prefect.blocks.system import Secret

    try:
        secret: Any = Secret.load(name)
        return str(secret.get() or "")
    except (ValueError, RuntimeError, httpx.HTTPError) as error:  # no such block, or Prefect does not answer
        raise InputError(
            f"block:{name} cannot be loaded ({type(error).__name__}): create a Secret block of that name on the Prefect "
            "server that the run uses"
        ) from error
