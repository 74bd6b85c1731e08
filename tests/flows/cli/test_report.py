"""`python -m flows report`, with records made by hand: no server, no model."""

import json
import os

import pytest
from report_records import run, sweep
from typer.testing import CliRunner

from flows.cli.app import app
from tasks.outcome import record as records
from tasks.outcome.record import RunRecord
from tasks.report.writing import written


def call(*args):
    return CliRunner().invoke(app, ["report", *(str(arg) for arg in args)])


@pytest.fixture
def home(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records.write(tmp_path / name, RunRecord.model_validate(run(out=str(tmp_path / name))))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(sweep()))
    return tmp_path


def test_a_run_and_a_sweep_have_their_report_beside_them(home):
    for name, made in (("a", "a.report.html"), ("s", "s/report.html")):
        result = call(home / name)
        assert result.exit_code == 0 and result.stdout == f"report: {home / made}\n", result.output
        assert "</html>" in (home / made).read_text()
    assert call("show", home / "a", "--out", home / "new" / "x.html").exit_code == 0 and (home / "new" / "x.html").is_file()


def test_options_may_come_first_and_open_asks_the_browser(home, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert call("--open", home / "a").exit_code == 0 and opened == [(home / "a.report.html").as_uri()]


def test_two_runs_are_compared_and_a_sweep_is_refused(home):
    result = call("compare", home / "a", home / "b.run.json")
    assert result.exit_code == 0 and result.stdout == f"report: {home / 'a-and-b.report.html'}\n"
    assert "side by side" not in result.stderr and "Comparison of two runs" in (home / "a-and-b.report.html").read_text()
    result = call("compare", home / "a", home / "s")
    assert result.exit_code == 2 and "is a sweep: compare two runs" in result.stderr


def test_what_is_wrong_is_said_in_one_line(home):
    result = call(home / "nothing")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    (home / "file").write_text("")
    result = call(home / "a", "--out", home / "file" / "x.html")
    assert result.exit_code == 2 and "cannot be written" in result.stderr and "--out FILE" in result.stderr


def test_a_record_that_was_damaged_by_hand_is_told(home):
    path = records.record_path(home / "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blocks": [{"block": 0, "layers": [{"name": 3}]}]}))
    result = call(home / "a")
    assert result.exit_code == 2 and f"run record {path} is damaged" in result.stderr and result.stderr.count("\n") == 1


class Told:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def stage(self, name, total=None):
        from contextlib import nullcontext

        return nullcontext(lambda done, text="": None)


def test_a_record_that_cannot_be_drawn_costs_a_note(home, monkeypatch):
    told, record = Told(), RunRecord.model_validate(run(out=str(home / "c")))

    def fails(*_args):
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.report.layer_figures.errors", fails)
        assert written(record, told) is None and told.notes[0].startswith("no report: KeyError") and len(told.notes) == 1
    assert written(record, told) == home / "c.report.html" and len(told.notes) == 1
    assert os.listdir(home).count("c") == 0
