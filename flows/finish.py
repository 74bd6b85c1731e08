"""The last steps of a run: register what passed the gate, and call the hooks. Neither can cost the run.

A sweep registers its recommended cell by `register`, and notifies once by `call_hooks`.
"""

from __future__ import annotations

from flows.artifacts import LATER
from tasks.config.run import NotifyConfig, RunConfig
from tasks.outcome import record as records
from tasks.outcome.notify import happened, notification, notify
from tasks.outcome.parts import HookCalls, Json, Registration
from tasks.outcome.record import RunRecord
from tasks.run import Reporter
from tasks.tracking.registry import promote


def register_and_notify(config: RunConfig, record: RunRecord, report: Reporter) -> None:
    """Register and notify, as config.gate and config.notify say; the record gets the results and is written."""
    record.registry = register(config, record, report)
    record.notified = call_hooks(config.notify, happened(record), notification(config, record), record.notified, report)
    records.write(config.out, record)


def register(config: RunConfig, record: RunRecord, report: Reporter) -> Registration | None:
    """Register the checkpoint; None where gate or evaluation failed, or the gate names no model to register."""
    gate = record.gate
    if not (gate and gate.passed and config.gate and config.gate.register_as) or record.evaluation_error:
        return None
    with report.stage("register"):
        found = promote(config, record)
    for text in (found.note, found.error and f"not registered: {found.error}; {LATER}"):
        if text:
            report.note(text)
    return found


def call_hooks(hooks: NotifyConfig | None, events: list[str], content: Json, before: HookCalls | None, report: Reporter) -> HookCalls:
    """notify, with a note for each hook that failed."""
    calls = notify(hooks, events, content, before)
    for call in calls.values():
        if call.error:
            report.note(call.error)
    return calls
