import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gptq_core.data import text
from gptq_core.data.text import read_documents
from gptq_core.data.windows import Windows, calibration_windows, evaluation_windows, split_windows
from gptq_core.errors import InputError


def letters(texts, verbose=True):
    """A tokenizer of one token a character after a beginning-of-sequence token of 0."""
    return {"input_ids": [[0, *(ord(c) for c in text)] for text in texts]}


TEXT = "".join(chr(97 + i % 26) for i in range(999))


def test_windows_are_distinct_pieces_of_the_packed_stream_drawn_by_the_seed():
    first, again, other = (calibration_windows([TEXT], letters, 5, 100, seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest != other.digest
    assert (first.count, first.seqlen, first.total_windows) == (5, 100, 10)
    stream = torch.tensor(letters([TEXT])["input_ids"][0]).view(10, 100)
    rows = [int((stream == window).all(1).nonzero()) for window in first.tokens]
    assert len(set(rows)) == 5


def test_documents_are_packed_without_padding():
    windows = calibration_windows(["abc", "defg"], letters, 9, 3, 0)
    assert sorted(windows.tokens.tolist()) == sorted([[0, 97, 98], [99, 0, 100], [101, 102, 103]])


def test_fewer_windows_than_asked_for_are_all_used():
    assert calibration_windows([TEXT], letters, 50, 100, 0).count == 10


def test_token_rows_are_taken_as_they_are():
    assert sorted(calibration_windows([[1, 2, 3], [4, 5, 6, 7]], letters, 9, 2, 0).tokens.flatten().tolist()) == [1, 2, 3, 4, 5, 6]


def test_evaluation_joins_documents_with_two_newlines_and_keeps_the_order():
    windows = evaluation_windows(["ab", "cd"], letters, 2)
    assert windows.tokens.tolist() == [[0, 97], [98, 10], [10, 99]]


def test_fewer_evaluation_windows_are_spread_over_the_text():
    windows = evaluation_windows([TEXT], letters, 10)
    fewer = evaluation_windows([TEXT], letters, 10, samples=4)
    assert torch.equal(fewer.tokens, windows.tokens[[0, 25, 50, 75]])
    assert fewer.total_windows == 100
    assert evaluation_windows([TEXT], letters, 10, samples=1000).count == 100


def test_split_keeps_the_tail_apart():
    calibration, evaluation = split_windows([TEXT], letters, 90, 10, 0, 20)
    stream = letters([TEXT])["input_ids"][0]
    assert evaluation.tokens.flatten().tolist() == stream[900:]
    assert calibration.count == 90
    assert sorted(calibration.tokens.flatten().tolist()) == sorted(stream[:900])


@pytest.mark.parametrize(
    ("dataset", "says"),
    [([""], "the text is empty"), (["abc"], "4 tokens, shorter than one window of 100"), (None, "quantization.dataset is required")],
)
def test_texts_that_do_not_suffice(dataset, says):
    with pytest.raises(InputError, match=says):
        calibration_windows(dataset, letters, 4, 100, 0)


def test_split_needs_a_window_of_each():
    with pytest.raises(InputError, match=r"evaluation\.dataset"):
        split_windows(["a" * 150], letters, 4, 100, 0, 100)


def test_windows_survive_a_file(tmp_path):
    windows = calibration_windows([TEXT], letters, 5, 100, 0)
    windows.save(tmp_path / "w.safetensors")
    loaded = Windows.load(tmp_path / "w.safetensors")
    assert torch.equal(loaded.tokens, windows.tokens)
    assert (loaded.digest, loaded.source, loaded.total_windows) == (windows.digest, windows.source, windows.total_windows)


def test_local_files_agree(tmp_path):
    documents = ["one", "zwei\nlines", "drei ✓"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents) + "\n\n")
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(documents[1], encoding="utf-8")
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == documents
    assert list(read_documents(str(tmp_path / "a.parquet"))) == documents
    assert list(read_documents(str(tmp_path / "a.txt"))) == [documents[1]]


def test_broken_files_are_named_with_their_line(tmp_path):
    cases = {
        "a.jsonl": (b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2"),
        "b.jsonl": (b'{"text": "x"}\n{"txt": "y"}\n', r"b\.jsonl line 2: no string under 'text'"),
        "c.txt": (b"ok \xff", r"c\.txt: byte 3 is not UTF-8"),
        "d.parquet": (b"not parquet", r"d\.parquet: not a parquet file"),
        "e.csv": (b"text", r"files of type \.csv are not read"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says):
            list(read_documents(str(tmp_path / name)))
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="no column 'text' among content"):
        list(read_documents(str(tmp_path / "f.parquet")))
    with pytest.raises(InputError, match="no such file, and not a known name"):
        list(read_documents("wikitext3"))


@pytest.mark.parametrize(
    ("values", "kind"), [([1, 2], "int64"), ([["a"]], "list<"), ([{"role": "user"}], "struct<"), ([b"a"], "binary"), ([None], "null")]
)
def test_a_text_column_of_another_type_is_named(values, kind, tmp_path):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.parquet: column 'text' holds {kind}.*must be string"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_text_columns_of_every_kind_of_string_are_read(tmp_path):
    for index, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(pa.table({"text": pa.array(["one", None, "two"], kind)}), tmp_path / f"{index}.parquet")
        assert list(read_documents(str(tmp_path / f"{index}.parquet"))) == ["one", "two"]


def test_damaged_pages_are_named(tmp_path):
    pq.write_table(pa.table({"text": [f"words {i}" * 20 for i in range(2000)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[40:4000] = bytes(3960)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet: damaged"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_lines_that_no_tokenizer_takes_are_named(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "whole"}\n{"text": "half an emoji \\ud83d"}\n')
    with pytest.raises(InputError, match=r"half\.jsonl line 2: character 14 is half of a surrogate pair"):
        list(read_documents(str(tmp_path / "half.jsonl")))
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"deep\.jsonl line 1: not JSON"):
        list(read_documents(str(tmp_path / "deep.jsonl")))


def test_evaluation_joins_all_rows_as_the_papers_do(tmp_path):
    """A third of WikiText's rows are empty; calibration has no use for them."""
    rows = ["", " = Title = \n", "", " A line . \n", "", ""]
    pq.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet")
    windows = evaluation_windows(str(tmp_path / "rows.parquet"), letters, 1)
    assert windows.tokens.flatten().tolist() == letters(["\n\n".join(rows)])["input_ids"][0]
    assert list(read_documents(str(tmp_path / "rows.parquet"))) == [rows[1], rows[3]]


def counting(texts, verbose=True, add_special_tokens=True):
    """`letters` without the first token where a text goes on; every call is one piece."""
    return {"input_ids": [[0] * add_special_tokens + [ord(c) for c in text] for text in texts]}


@pytest.mark.parametrize("breaks", ["\n", " ", ""])
def test_a_long_text_is_tokenized_in_pieces_which_give_the_same_tokens(breaks, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "WHOLE", 400)
    monkeypatch.setattr(text, "PIECE", 100)
    whole = breaks.join(TEXT[i : i + 30] for i in range(0, 900, 30))
    (tmp_path / "a.txt").write_text(whole)
    seen = []

    def spied(texts, **keys):
        seen.extend(texts)
        return counting(texts, **keys)

    windows = evaluation_windows(str(tmp_path / "a.txt"), spied, 1)
    assert windows.tokens.flatten().tolist() == counting([whole])["input_ids"][0]
    assert "".join(seen) == whole and 9 <= len(seen) <= 12 and max(map(len, seen)) <= 100
    assert all(piece.endswith(breaks) for piece in seen[:-1])
    seen.clear()
    calibration_windows(str(tmp_path / "a.txt"), spied, samples=1, seqlen=10, seed=0)
    assert len(seen) == 1, "no more of it than is drawn from"


def test_named_dataset_without_a_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(InputError, match="wikitext2.*give a local"):
        list(read_documents("wikitext2"))
