"""Notifications: a shell command or a webhook gets the numbers of a finished run or sweep as JSON. A hook that fails costs a note.

The same notification is sent once: if the outcome is the same again (finished work on a schedule), only a hook whose last call failed
is called.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from gptq_core.errors import InputError, one_line
from tasks.config.run import NotifyConfig, RunConfig
from tasks.config.secrets import resolve
from tasks.outcome.parts import HookCall, HookCalls, Json
from tasks.outcome.record import RunRecord

NUMBERS = ("original_perplexity", "quantized_perplexity", "kl", "top1_agreement", "tokens", "digest", "recovery")


def happened(record: RunRecord) -> list[str]:
    """The events of a run, in the words of notify.when."""
    failed = bool(record.evaluation_error) or (record.gate is not None and not record.gate.passed)
    return ["done", *(["failed"] if failed else ["passed"] if record.gate else [])]


def notification(config: RunConfig, record: RunRecord) -> Json:
    """A finished run as its hooks get it: the same while nothing changes, and without secrets."""
    evaluation, assembly = record.evaluation, record.assembly
    return {
        "events": happened(record),
        "name": config.out.name,
        "checkpoint": os.path.abspath(config.out),
        "key": record.key,
        "model": config.model.path,
        "revision": config.model.revision,
        "bits": config.quantization.bits,
        "group_size": config.quantization.group_size,
        "bytes": assembly.bytes,
        "original_bytes": assembly.original_bytes,
        "bits_per_weight": assembly.bits_per_weight,
        "evaluation": {key: getattr(evaluation, key) if evaluation else None for key in NUMBERS},
        "evaluation_error": record.evaluation_error,
        "gate": record.gate and record.gate.model_dump(mode="json"),
        "registry": record.registry and record.registry.model_dump(mode="json"),
        "mlflow_run": record.mlflow and record.mlflow.run_id,
        "seconds": record.seconds,
        "started": record.started,
    }


def notify(hooks: NotifyConfig | None, events: list[str], content: Json, before: HookCalls | None = None) -> HookCalls:
    """Call each hook whose `when` names one of the events. before: the calls of the last time; returned with the new ones."""
    calls = dict(before or {})
    if hooks is None or not set(events) & set(hooks.when):
        return calls
    text = json.dumps(_finite(content), ensure_ascii=False)
    targets: dict[str, tuple[str | None, Callable[[str, str, float], str | None]]] = {
        "command": (hooks.command, _run),
        "webhook": (hooks.webhook, _post),
    }
    for name, (target, call) in targets.items():
        if target is None:
            continue
        digest = hashlib.sha256(f"{target}\n{text}".encode()).hexdigest()[:20]
        last = calls.get(name)
        if last is None or last.told != digest or last.error:
            calls[name] = HookCall(told=digest, error=call(target, text, hooks.seconds))
    return calls


def _run(command: str, text: str, seconds: float) -> str | None:
    """Run `command` in the shell with `text` on its stdin; one line where it fails."""
    with tempfile.TemporaryFile() as errors:
        try:
            # a session of its own, so that all it has started ends with it
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        except (OSError, ValueError) as error:
            return f"notify.command cannot be started: {error}"
        try:
            process.communicate(text.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"notify.command took longer than notify.seconds = {seconds:g}"
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            return f"notify.command ended with code {process.returncode}: {one_line(lines[-1], 200) if lines else 'no message'}"
    return None


def _post(webhook: str, text: str, seconds: float) -> str | None:
    """POST `text` to the webhook. Errors do not name the address, which may be the secret; None: it was taken."""
    try:
        with httpx.stream(
            "POST", resolve(webhook), content=text.encode(), headers={"Content-Type": "application/json"}, timeout=seconds
        ) as answer:
            return None if answer.is_success else f"notify.webhook answered {answer.status_code}"
    except InputError as error:
        return f"notify.webhook = {error}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        return f"notify.webhook does not answer: {type(error).__name__}"


def _finite(value: Any) -> Any:
    """As JSON can hold it: inf and nan as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
