"""Documents from wherever calibration and evaluation text lives.

A local file (.txt: one document; .jsonl: the "text" of each line; .parquet: its "text" column), a list of strings, or a named
hub dataset through `datasets`. Local files are read by a reader that names the file and the line of what is wrong, and no more of them
than is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptq_core.errors import InputError

TEXT_COLUMN = "text"
WHOLE = 4 << 20
"""Characters up to which a text is tokenized as a whole; a longer one in pieces, since tokenizing takes some 170 bytes a character."""
PIECE = 1 << 20
"""Characters of a piece of a longer text."""


@dataclass(frozen=True)
class HubText:
    """Where a named dataset is found on the hub; script datasets no longer load, so these are parquet or JSON repositories."""

    repository: str
    configuration: str | None
    calibration_split: str
    evaluation_split: str
    data_files: dict[str, str] | None = None
    evaluation_documents: int | None = None
    """How many documents of the evaluation split papers evaluate on; None: all."""


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "c4": HubText(
        "allenai/c4",
        None,
        "train",
        "validation",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        evaluation_documents=1100,
    ),
}
HUB["c4-new"] = HUB["c4"]  # Optimum's second name for the same files


def read_documents(dataset: str | list[str], evaluation: bool = False) -> Iterator[str]:
    """Yield the documents of a dataset in their order; a .txt longer than WHOLE in pieces.

    `evaluation` selects the split of a named hub dataset, and keeps empty documents: the papers join all rows of a text.
    Raises InputError for a missing or malformed file, an unknown name, or a hub that cannot be reached.
    """
    if isinstance(dataset, list):
        documents: Iterator[str] = iter(dataset)
    elif dataset in HUB:
        documents = _from_hub(dataset, evaluation)
    else:
        path = Path(dataset).expanduser()
        if dataset == "ptb" and not path.is_file():
            raise InputError("dataset 'ptb': the hub has it as a script alone, which is not run; give its test text as a .txt file")
        if not path.is_file():
            raise InputError(
                f"dataset {dataset!r}: no such file, and not a known name ({', '.join(HUB)}); "
                "give a .txt, .jsonl or .parquet file or one of these names"
            )
        readers = {".txt": _from_txt, ".jsonl": _from_jsonl, ".parquet": _from_parquet}
        if path.suffix not in readers:
            raise InputError(f"dataset {dataset!r}: files of type {path.suffix or 'none'} are not read; convert it to {', '.join(readers)}")
        documents = readers[path.suffix](path)
    return documents if evaluation else (text for text in documents if text.strip())


def separator(dataset: object) -> str:
    """What the papers put between two documents of a text; nothing where they are pieces of one."""
    return "" if isinstance(dataset, str) and dataset not in HUB and Path(dataset).suffix == ".txt" else "\n\n"


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined, in pieces that can be tokenized one after the other: one where they are no longer than WHOLE.

    Pieces end behind a line, else behind a word: tokenizers seldom join across either.
    """
    waiting = ""
    longer = False
    for text in texts:
        waiting += text
        longer = longer or len(waiting) > WHOLE
        while longer and len(waiting) > PIECE:
            end = max(waiting.rfind("\n", 0, PIECE), waiting.rfind(" ", 0, PIECE) if "\n" not in waiting[:PIECE] else -1) + 1 or PIECE
            yield waiting[:end]
            waiting = waiting[end:]
    if waiting:
        yield waiting


def _from_txt(path: Path) -> Iterator[str]:
    characters = WHOLE if path.stat().st_size <= WHOLE else PIECE
    try:
        with path.open(encoding="utf-8") as file:
            yield from iter(lambda: file.read(characters), "")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {_undecodable(path)} is not UTF-8; convert the file to UTF-8") from error


def _undecodable(path: Path) -> int:
    """Where the first byte lies that is not UTF-8."""
    done = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return done + error.start
            done += len(line)
    return done


def _from_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # malformed JSON and malformed UTF-8 alike; nested too deeply
                raise InputError(f"{path} line {number}: not JSON ({error}); each line must be an object with {TEXT_COLUMN!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get(TEXT_COLUMN), str):
                raise InputError(f"{path} line {number}: no string under {TEXT_COLUMN!r}; each line must be an object that has one")
            if (place := _half_a_character(row[TEXT_COLUMN])) is not None:
                raise InputError(f"{path} line {number}: character {place} is half of a surrogate pair; write the whole character")
            yield row[TEXT_COLUMN]


def _half_a_character(text: str) -> int | None:
    """Where a text holds a lone surrogate, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _from_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    if TEXT_COLUMN not in schema.names:
        raise InputError(f"{path}: no column {TEXT_COLUMN!r} among {', '.join(schema.names)}; rename the text column")
    kind = schema.field(TEXT_COLUMN).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(check(values) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)):
        raise InputError(f"{path}: column {TEXT_COLUMN!r} holds {kind} (must be string); write the texts as strings")
    try:
        for batch in file.iter_batches(columns=[TEXT_COLUMN]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({str(error).splitlines()[0]}); write or download it again") from error


def _from_hub(name: str, evaluation: bool) -> Iterator[str]:
    import datasets

    where = HUB[name]
    split = where.evaluation_split if evaluation else where.calibration_split
    try:
        rows = datasets.load_dataset(
            where.repository, where.configuration, split=split, data_files=where.data_files, streaming=where.data_files is not None
        )
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"dataset {name!r} ({where.repository}) cannot be read from the hub or its cache: {reason}; "
            "give a local .txt, .jsonl or .parquet file instead"
        ) from error
    for row in islice(rows, where.evaluation_documents if evaluation else None):
        yield row[TEXT_COLUMN]
