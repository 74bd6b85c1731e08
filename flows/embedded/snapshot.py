"""Freeze the text that the embedded model is trained and measured on.

CPython's own documentation topics (`pydoc_data.topics`) and the docstrings of its standard library, one document a topic
and one a module. The text differs from one Python release to the next, so the snapshot travels with the repository and
this script documents how it was made; running it again with another Python gives other text.

    python -m flows.embedded.snapshot

Writes `train.parquet` and `heldout.parquet` (columns `name`, `text`) beside itself. A document is held out by the hash of
its name, so the split does not depend on order or on the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
HELD_OUT_ONE_IN = 12
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "pydoc_data", "__pycache__", "turtledemo"}


def topics() -> dict[str, str]:
    from pydoc_data.topics import topics as found

    return {f"topic/{name}": text.strip() for name, text in sorted(found.items())}


def docstrings_of(path: Path, module: str) -> str:
    """All docstrings of a source file, each under the dotted name of what it documents."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if doc := ast.get_docstring(node):
                parts.append(f"{name}\n\n{doc}")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(parts)


def modules() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if len(text := docstrings_of(path, name)) > 400:
            found[f"module/{name}"] = text
    return found


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def write(path: Path, documents: dict[str, str]) -> None:
    table = pa.table({"name": list(documents), "text": list(documents.values())})
    table = table.replace_schema_metadata({"source": f"CPython {platform.python_version()}", "licence": "PSF-2.0"})
    pq.write_table(table, path, compression="zstd", compression_level=22)
    print(f"{path.name}: {len(documents)} documents, {sum(map(len, documents.values()))} characters, {path.stat().st_size} bytes")


if __name__ == "__main__":
    documents = topics() | modules()
    write(HERE / "train.parquet", {n: t for n, t in documents.items() if not held_out(n)})
    write(HERE / "heldout.parquet", {n: t for n, t in documents.items() if held_out(n)})
