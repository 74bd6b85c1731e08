import json

import pytest

from gptq_core.errors import InputError
from tasks.config.run import TrackingConfig
from tasks.outcome.parts import MlflowLink
from tasks.tracking import outbox


@pytest.fixture
def tracking(tmp_path):
    return TrackingConfig(uri="postgresql://me:s3cret@host/db", outbox=str(tmp_path / "outbox"))


def entries(tmp_path):
    return [outbox.read(file) for file in outbox.files(tmp_path / "outbox")]


def test_an_entry_tells_where_when_and_why_and_no_secret(tracking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outbox.put(tracking, "run", "a/x.run.json", "http://u:s3cret@host refused") is None
    [entry] = entries(tmp_path)
    assert (entry.kind, entry.path, entry.directory) == ("run", f"{tmp_path}/a/x.run.json", str(tmp_path))
    assert entry.why == "http://u:***@host refused"
    assert entry.tracking["uri"] == "postgresql://me:***@host/db" and entry.since.endswith("Z")
    [file] = outbox.files(tmp_path / "outbox")
    assert file.name.startswith("x.run-") and "s3cret" not in file.read_text()


def test_a_second_try_keeps_since_when_and_that_it_is_to_be_registered(tracking, tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "_now", lambda: "2026-01-01T00:00:00Z")
    outbox.put(tracking, "run", tmp_path / "x.run.json", "first", register=True)
    monkeypatch.setattr(outbox, "_now", lambda: "2027-01-01T00:00:00Z")
    outbox.update(tracking, "run", tmp_path / "x.run.json", MlflowLink(error="second"))
    [entry] = entries(tmp_path)
    assert (entry.since, entry.why, entry.register) == ("2026-01-01T00:00:00Z", "second", True)
    outbox.update(tracking, "run", tmp_path / "x.run.json", MlflowLink())
    assert entries(tmp_path) == []
    outbox.clear(tracking, tmp_path / "x.run.json")  # nothing is there: nothing happens


def test_equal_names_in_two_folders_are_two_entries(tracking, tmp_path):
    for folder in "ab":
        outbox.put(tracking, "sweep", tmp_path / folder / "sweep.json", "away")
    assert sorted(entry.path for entry in entries(tmp_path)) == [f"{tmp_path}/{folder}/sweep.json" for folder in "ab"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"kind": "run"}',
        '{"more": 1}',
        b"\xff\xfe",
        json.dumps({"kind": "x", "path": "p", "directory": "d", "since": "s", "why": "w", "tracking": {}}),
    ],
)
def test_a_damaged_entry_is_one_line_and_a_new_try_mends_it(tracking, tmp_path, text):
    outbox.put(tracking, "run", tmp_path / "x.run.json", "away")
    [file] = outbox.files(tmp_path / "outbox")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="outbox entry .*: remove it") as error:
        outbox.read(file)
    assert "\n" not in str(error.value)
    assert outbox.put(tracking, "run", tmp_path / "x.run.json", "away") is None and entries(tmp_path)[0].why == "away"


def test_an_outbox_that_cannot_be_written_is_told_with_the_error(tmp_path):
    (tmp_path / "file").write_text("")
    tracking = TrackingConfig(outbox=str(tmp_path / "file" / "outbox"))
    link = outbox.update(tracking, "run", tmp_path / "x.run.json", MlflowLink(error="refused"))
    assert link.error.startswith("refused; tracking.outbox = ") and "track-pending will not know" in link.error
