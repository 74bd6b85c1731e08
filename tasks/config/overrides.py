"""Values from the command line, `--set KEY.PATH=VALUE`: YAML, but for keys that hold a text, which is taken as it was typed."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from gptq_core.errors import InputError
from gptq_core.schema import Schema
from tasks.config.run import RunConfig, where


def parse_setting(setting: str) -> tuple[str, Any]:
    """`key.path=value` as a dotted key and its YAML value."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {setting}: expected key.path=value, such as quantization.group_size=64")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: the value is not valid YAML ({where(error)})") from error
    kinds = _kinds_of(key.strip())
    # a folder such as 2024-11-28, a revision of digits: YAML makes dates and numbers of them where the key holds a text
    return key.strip(), value.strip() if str in kinds and not isinstance(found, str | list | dict) and type(found) not in kinds else found


def _kinds_of(key: str) -> set[Any]:
    """The types that a dotted key of a run takes; empty for a key that is none."""
    kinds: set[Any] = {RunConfig}
    for part in key.split("."):
        schemas = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Schema) and part in kind.model_fields]
        kinds = _parts(schemas[0].model_fields[part].annotation) if schemas else set()
    return kinds


def _parts(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, those inside lists and dicts left out."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_parts, get_args(annotation)))
    return {get_origin(annotation) or annotation}
