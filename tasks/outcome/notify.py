"""Telling others what came of a run: a shell command or a webhook gets the summary as JSON. A hook that fails costs a note.

A hook is told once: the same outcome again (finished work on a schedule) is told only to the hook that it did not reach before.
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

Told = dict[str, dict[str, Any]]
"""Hook to {"told": digest of the summary, "error": None or one line}."""

NUMBERS = ("original_perplexity", "quantized_perplexity", "kl", "top1_agreement", "tokens", "digest", "recovery")


def events(record: dict[str, Any]) -> list[str]:
    """What happened, in the words of notify.when."""
    verdict = record.get("gate")
    failed = bool(record.get("evaluation_error")) or (verdict is not None and not verdict["passed"])
    return ["done", *(["failed"] if failed else ["passed"] if verdict else [])]


def summary(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """A finished run as its hooks get it: stable while nothing changes, and without secrets."""
    evaluation, assembly = record["evaluation"] or {}, record["assembly"]
    return {
        "events": events(record),
        "name": config.out.name,
        "checkpoint": os.path.abspath(config.out),
        "key": record["key"],
        "model": config.model.path,
        "revision": config.model.revision,
        "bits": config.quantization.bits,
        "group_size": config.quantization.group_size,
        "bytes": assembly.get("bytes"),
        "original_bytes": assembly.get("original_bytes"),
        "bits_per_weight": assembly.get("bits_per_weight"),
        "evaluation": {key: evaluation.get(key) for key in NUMBERS},
        "evaluation_error": record["evaluation_error"],
        "gate": record.get("gate"),
        "registry": record.get("registry"),
        "mlflow_run": (record["mlflow"] or {}).get("run_id"),
        "seconds": record["seconds"],
        "started": record["started"],
    }


def notify(hooks: NotifyConfig | None, happened: list[str], content: dict[str, Any], before: Told | None = None) -> Told:
    """Tell each hook that wants to know what `happened`. before: what came of the last time; returned with what is new."""
    told = dict(before or {})
    if hooks is None or not set(happened) & set(hooks.when):
        return told
    text = json.dumps(_finite(content), ensure_ascii=False)
    calls: dict[str, tuple[str | None, Callable[[str, str, float], str | None]]] = {
        "command": (hooks.command, _run),
        "webhook": (hooks.webhook, _post),
    }
    for name, (target, call) in calls.items():
        if target is None:
            continue
        digest = hashlib.sha256(f"{target}\n{text}".encode()).hexdigest()[:20]
        if told.get(name, {}).get("told") != digest or told[name]["error"]:
            told[name] = {"told": digest, "error": call(target, text, hooks.seconds)}
    return told


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
    """POST `text` to the webhook. What is told of an error holds no address: the address may be the secret."""
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
