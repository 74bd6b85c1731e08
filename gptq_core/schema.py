"""Base class of every config, and validation errors as one line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Schema(BaseModel):
    """A frozen pydantic model. It refuses unknown keys and suggests the nearest known one; docstrings below fields become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.4)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r}: {hint}")
        return data


def explain(error: ValidationError, under: str = "") -> str:
    """A pydantic error as one line: each problem as `key = value: rule`, with dotted keys that start at `under`."""
    problems = []
    for item in error.errors():
        # pydantic puts the branch of a union into the location; users know only the keys
        keys = [str(part) for part in item["loc"] if not str(part).startswith(("list[", "str", "function-"))]
        where = ".".join(([under] if under else []) + keys)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            problems.append(f"{where} is required: add it to the config or give it on the command line")
        elif item["type"] == "value_error" and isinstance(item["input"], dict):
            problems.append(f"{where}: {message}" if where else message)
        else:
            value = repr(item["input"])
            problems.append(f"{where} = {value if len(value) < 80 else value[:77] + '...'}: {message[0].lower() + message[1:]}")
    return "; ".join(dict.fromkeys(problems))
