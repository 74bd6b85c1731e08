"""Documents from wherever calibration and evaluation text lives.

A local file (.txt: one document; .jsonl: the "text" of each line; .parquet: its "text" column), a list of strings, or a named
hub dataset through `datasets`. Local files are read by a reader that names the file and the line of what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptq_core.errors import InputError

TEXT_COLUMN = "text"


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
    """Yield the documents of a dataset in their order, empty ones left out.

    `evaluation` selects the split of a named hub dataset. Raises InputError for a missing or malformed file, an unknown name,
    or a hub that cannot be reached.
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
    return (text for text in documents if text.strip())


def _from_txt(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def _from_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # malformed JSON and malformed UTF-8 alike
                raise InputError(f"{path} line {number}: not JSON ({error}); each line must be an object with {TEXT_COLUMN!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get(TEXT_COLUMN), str):
                raise InputError(f"{path} line {number}: no string under {TEXT_COLUMN!r}; each line must be an object that has one")
            yield row[TEXT_COLUMN]


def _from_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a parquet file ({error})") from error
    if TEXT_COLUMN not in file.schema_arrow.names:
        raise InputError(f"{path}: no column {TEXT_COLUMN!r} among {', '.join(file.schema_arrow.names)}; rename the text column")
    for batch in file.iter_batches(columns=[TEXT_COLUMN]):
        yield from (text for text in batch.column(0).to_pylist() if text)


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
