"""Settings that stand in no file: `env:NAME` in a config is a variable of the environment, `block:NAME` a Prefect Secret block."""

from __future__ import annotations

import os
import re
from typing import Any

from gptq_core.errors import InputError

FORMS = "env:NAME (a variable of the environment) or block:NAME (a Prefect Secret block)"


def is_reference(value: str) -> bool:
    return bool(re.fullmatch(r"env:[A-Za-z_]\w*|block:[\w.-]+", value, re.ASCII))


def resolve(value: str) -> str:
    """What a reference stands for; any other value as it is. InputError: nothing stands there. No message holds what was found."""
    if not is_reference(value):
        return value
    kind, _, name = value.partition(":")
    found = os.environ.get(name) if kind == "env" else _block(name)
    if not found:
        raise InputError(
            f"{value}: "
            + (
                f"the environment has no {name}; set it where the run is started"
                if kind == "env"
                else f"the Secret block {name} is empty; give it a value"
            )
        )
    return found


def check(value: str) -> None:
    """What can be told without a server: the variable is there."""
    if value.startswith("env:"):
        resolve(value)


def _block(name: str) -> str:
    import httpx
    from prefect.blocks.system import Secret

    try:
        secret: Any = Secret.load(name)
        return str(secret.get() or "")
    except (ValueError, RuntimeError, httpx.HTTPError) as error:  # not there, or Prefect does not answer
        raise InputError(
            f"block:{name} cannot be loaded ({type(error).__name__}): make a Secret block of that name in the Prefect "
            "server that the run uses"
        ) from error
