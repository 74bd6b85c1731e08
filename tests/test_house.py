"""The house stays small, its tests stand where their modules stand, and its words are plain."""

import ast
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for room in ("gptq_core", "tasks", "flows") for path in (ROOT / room).rglob("*.py"))
FILE, FUNCTION = 400, 60
EXCEPTIONS = {
    "gptq_core/block/walk.py:walk": "the hooks and the loop of one staged forward share what is solved, counted and called",
    "gptq_core/kernels/triton_loops.py:_search": "one Triton program whose best candidate stays in registers; 20 lines are arguments",
}
"""Path, or path:function, and the reason why it is longer."""
JARGON = re.compile(r"\b(?:told|tells|nobody|anew)\b", re.IGNORECASE)
NOT_YET_PLAIN = ("tasks/report/",)
"""Rooms whose words are still to be mended; the list only gets shorter."""


def functions(path: str) -> dict[str, int]:
    """Lines of each function from its decorators on; of one name the longest."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = max(found.get(node.name, 0), node.end_lineno - first + 1)
    return found


def too_long(path: str) -> dict[str, int]:
    """What exceeds its limit in a file, the file itself among it."""
    found = {f"{path}:{name}": lines for name, lines in functions(path).items() if lines > FUNCTION}
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    return found | ({path: lines} if lines > FILE else {})


def test_no_file_over_400_lines_and_no_function_over_60():
    found = {name: lines for path in MODULES for name, lines in too_long(path).items()}
    assert not {name: lines for name, lines in found.items() if name not in EXCEPTIONS}, "shorten it, or say in EXCEPTIONS why not"
    assert not set(EXCEPTIONS) - set(found), "short enough now: no exception any more"


def test_a_test_sits_where_its_module_sits():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        room, *folders = path.relative_to(ROOT / "tests").parent.parts or [""]
        if room in ("gptq_core", "tasks", "flows"):
            assert (ROOT / room).joinpath(*folders).is_dir(), f"{path}: no package of that name"
            places = [
                Path(module).parent for module in MODULES if module.startswith(room) and Path(module).stem == path.stem[len("test_") :]
            ]
            here = Path(room, *folders)
            assert not places or here in places, f"{path}: its module is in {' or '.join(map(str, places))}"


def prose(path: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, docstring and other literal of a file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    yield from ((token.start[0], token.string) for token in generate_tokens(StringIO(source).readline) if token.type == COMMENT)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_plain_words():
    found = {
        f"{path}:{line}: {word}"
        for path in MODULES
        if not path.startswith(NOT_YET_PLAIN)
        for line, text in prose(path)
        for word in JARGON.findall(text)
    }
    assert not found, "say who does what: writes, says, names, again, no one"
