"""What follows a run's numbers: registering what passed the gate, and telling the hooks. Neither can cost the run.

A sweep registers its recommended cell by `register`, and tells its own summary once by `tell`.
"""

from __future__ import annotations

from typing import Any

from flows.artifacts import LATER
from tasks.config.run import NotifyConfig, RunConfig
from tasks.outcome import record as records
from tasks.outcome.notify import Told, events, notify, summary
from tasks.run import Reporter
from tasks.tracking.registry import promote


def finish(config: RunConfig, record: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Register and tell, as config.gate and config.notify say; the record with what came of it, as it lies on disk."""
    record = register(config, record, report)
    record["notified"] = tell(config.notify, events(record), summary(config, record), record.get("notified"), report)
    records.write(config.out, record)
    return record


def register(config: RunConfig, record: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """The record with `registry`: what `promote` returns; None where gate or evaluation failed, or nothing is to be registered."""
    verdict, found = record.get("gate"), None
    if verdict and verdict["passed"] and config.gate and config.gate.register_as and not record["evaluation_error"]:
        with report.stage("register"):
            found = promote(config, record)
        for text in (found["note"], found["error"] and f"not registered: {found['error']}; {LATER}"):
            if text:
                report.note(text)
    return {**record, "registry": found}


def tell(hooks: NotifyConfig | None, happened: list[str], content: dict[str, Any], before: Told | None, report: Reporter) -> Told:
    """notify, with a note for each hook that was not reached."""
    told = notify(hooks, happened, content, before)
    for outcome in told.values():
        if outcome["error"]:
            report.note(outcome["error"])
    return told
