"""The descriptions of the schemas where people read them: comments of configs/, docs/reference.md, help of the command line.

`make reference` rewrites the files. In a YAML the comment beside a key comes from the schema; values, order and comments on lines of
their own are the file's.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic_core import PydanticUndefined

from gptq_core.config import RECIPES, QuantizeConfig
from gptq_core.schema import Schema
from tasks.config.evaluation import EvaluationRequest
from tasks.config.measures import PRESETS, ROOT, PerplexityMeasure, TasksMeasure
from tasks.config.run import RunConfig
from tasks.config.sweep import SweepConfig

PAGE = ROOT / "docs" / "reference.md"
WIDTH, COLUMN = 140, 35
KEY = re.compile(r"(?P<indent> *)(?P<off># )?(?P<key>[a-z_]+):(?P<value>( .*?)??)(  +#.*)?")
"""A line of a YAML with a key; `off`: it is commented out."""
FIRST: dict[str, type[Schema]] = {"run": RunConfig, "sweep": SweepConfig, "evaluate": EvaluationRequest}
SETS = sorted({key for fields in RECIPES.values() for key in fields}, key=list(QuantizeConfig.model_fields).index)
"""Keys of quantization that a recipe sets."""


def description(schema: type[Schema], key: str) -> str:
    """Description of a key as one line."""
    return " ".join((schema.model_fields[key].description or "").split())


def section(schema: type[Schema] | None, key: str) -> type[Schema] | None:
    """Schema of the keys below `key`, or None where it holds a value."""
    if schema is None or key not in schema.model_fields:
        return None
    annotation: Any = schema.model_fields[key].annotation
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Schema):
            return kind
    return None


def help_of(key: str) -> str:
    """Help of an option that sets `key`, such as quantization.bits, sweep.mode or evaluate.model: the first sentence."""
    first, _, leaf = key.partition(".")
    schema = FIRST.get(first) or section(RunConfig, first)
    if schema is None or leaf not in schema.model_fields:
        raise LookupError(f"{key} is not a key of a config")
    return re.split(r"(?<=\.) ", description(schema, leaf))[0]


def commented(text: str, schema: type[Schema]) -> str:
    """A YAML of this schema with the comments beside its keys made from it."""
    lines: list[str] = []
    inside: dict[int, type[Schema] | None] = {0: schema}
    for line in text.splitlines():
        found = KEY.fullmatch(line)
        if found and (owner := inside.get(len(found["indent"]))) and found["key"] in owner.model_fields:
            inside[len(found["indent"]) + 2] = section(owner, found["key"])
            start = f"{found['indent']}{found['off'] or ''}{found['key']}:{found['value']}"
            lines += textwrap.wrap(
                description(owner, found["key"]),
                WIDTH,
                initial_indent=f"{start:<{COLUMN - 2}}  # ",
                subsequent_indent=f"{'':{COLUMN}}# ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        elif not line.startswith(f"{'':{COLUMN}}# "):  # else the rest of a comment that is made again
            lines.append(line)
    return "\n".join(lines) + "\n"


def completed(text: str) -> str:
    """configs/quantize.yaml with a line for each key that a recipe sets: a missing one is put behind the one before it."""
    usual = QuantizeConfig(bits=4)
    lines = text.splitlines()
    for before, key in itertools.pairwise(SETS):
        if not any(line.startswith(f"  # {key}:") for line in lines):
            at = next(number for number, line in enumerate(lines) if line.startswith(f"  # {before}:"))
            lines.insert(at + 1, f"  # {key}: {yaml.safe_dump(getattr(usual, key)).splitlines()[0]}")
    return "\n".join(lines) + "\n"


def values(field: dict[str, Any]) -> str:
    """Values that a property of a JSON schema allows, in words."""
    if "anyOf" in field:
        return " or ".join(values(kind) for kind in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum") or [field["const"]])
    if field.get("type") == "array":
        return f"list of ({values(field['items'])})"
    words = {"boolean": "`true`, `false`", "null": "`null`", "string": "text", "integer": "integer", "number": "number"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {field[name]}" for name, word in bounds.items() if name in field)
    return f"{words.get(field.get('type', ''), 'mapping')} {limits}".strip()


def default(schema: type[Schema], key: str) -> str:
    """Default of a key, in words."""
    if schema is QuantizeConfig and key in SETS:
        return "by `recipe`"
    value = schema.model_fields[key].get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "its defaults" if isinstance(value, Schema) else f"`{json.dumps(value)}`"


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def table(schema: type[Schema]) -> Iterator[str]:
    """Markdown table of the keys of a schema."""
    yield from (row("key", "values", "default", "description"), row(*["---"] * 4))
    for key, field in schema.model_json_schema()["properties"].items():
        yield row(f"`{key}`", values(field), default(schema, key), description(schema, key))
    yield ""


def recipes() -> Iterator[str]:
    """Markdown table of what each recipe sets."""
    plain = QuantizeConfig(bits=4, recipe="classic")
    yield from ("#### What a recipe sets", "", row("key", *(f"`{name}`" for name in RECIPES)), row(*["---"] * (1 + len(RECIPES))))
    for key in SETS:
        yield row(f"`{key}`", *(f"`{json.dumps(fields.get(key, getattr(plain, key)))}`" for fields in RECIPES.values()))
    yield ""


def measures() -> Iterator[str]:
    """Markdown tables of the entries of evaluation.measures."""
    for measure in (PerplexityMeasure, TasksMeasure):
        [kind] = get_args(measure.model_fields["kind"].annotation)
        yield from (f"#### An entry of evaluation.measures with kind: {kind}", "", measure.__doc__ or "", "", *table(measure))


MORE = {"quantization": recipes, "evaluation": measures}


def part(schema: type[Schema], title: str, level: int = 2, path: str = "") -> Iterator[str]:
    """Markdown of a schema and of the sections in it."""
    yield from ("#" * level + f" {title}", "", *table(schema))
    if path in MORE:
        yield from MORE[path]()
    for key in schema.model_fields:
        if inner := section(schema, key):
            below = f"{path}.{key}" if path else key
            yield from part(inner, below, level + 1, below)


def page() -> str:
    """Content of docs/reference.md."""
    start = (
        "# Every key of a config",
        "",
        "Made by `make reference` from the docstrings of the schemas in `gptq_core/config.py` and `tasks/config/`: change it there.",
        "`configs/quantize.yaml` and `configs/sweep.yaml` are files to start from; `--set section.key=value` sets any key.",
        "",
    )
    parts = (part(RunConfig, "A run"), part(SweepConfig, "A sweep"), part(EvaluationRequest, "An evaluation of a checkpoint"))
    return "\n".join(itertools.chain(start, *parts))


def files() -> Iterator[tuple[Path, str]]:
    """Every file with text from the schemas, and what it must hold."""
    yield PAGE, page()
    configs: dict[Path, type[Schema]] = {ROOT / "configs" / "quantize.yaml": RunConfig, ROOT / "configs" / "sweep.yaml": SweepConfig}
    for preset in sorted(PRESETS.glob("*.yaml")):
        kind = yaml.safe_load(preset.read_text(encoding="utf-8"))["kind"]
        configs[preset] = TasksMeasure if kind == "tasks" else PerplexityMeasure
    for path, schema in configs.items():
        text = path.read_text(encoding="utf-8")
        yield path, commented(completed(text) if path.name == "quantize.yaml" else text, schema)


def main() -> None:
    """Write the files that are not current, and name them."""
    for path, text in files():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
