"""What passed its gate, as a version in MLflow's model registry. Nothing is copied: a version tells where the checkpoint lies.

A version is one piece of work in one folder, known by its content key and its path, so that registering twice is registering once.
With a database its source is the folder. A tracking server refuses a source on a disk of its own: there it is the run, and the path
and the digest of the manifest stand in the tags, as they do everywhere.

The alias moves to a version that is better than the one that holds it, by the gate's measure, where both were judged on the same
windows. Judged on others, the two cannot be compared and the alias stays; it moves again once the holder's config is run with the
new text (its checkpoint is only evaluated), or once the alias is taken from it. A holder whose files this work has replaced
(output.overwrite) is none any more; with {key} in output.dir nothing is replaced.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.checkpoint.reader import file_sha256
from gptq_core.checkpoint.writer import MANIFEST
from tasks.config.run import GateConfig, RunConfig, TrackingConfig
from tasks.outcome import record as records
from tasks.outcome.gate import measured
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import guarded

MEASURES = ("kl", "perplexity_increase")


@task(name="promote", cache_policy=NO_CACHE)
def promote(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Register the checkpoint of `record`, which passed `config.gate` with its register_as, and note in the record what came of it.

    {"name", "version", "alias", "champion": whether the alias is this version's, "beaten": version that held it before, "note", "error"};
    what MLflow does not take ends in `error`, one line, and no exception.
    """
    outcome = promote_in_mlflow(config, record)
    if record["evaluation"] is not None:
        outbox.settle(config.tracking, "run", records.record_path(config.out), outcome, register=True)
    records.write(config.out, {**record, "registry": outcome})
    return outcome


def promote_in_mlflow(config: RunConfig, record: dict[str, Any], tracking: TrackingConfig | None = None) -> dict[str, Any]:
    """promote, without Prefect, the outbox and the record on disk. tracking: where to, if not where the config says."""
    gate, logged, tracking = config.gate, record.get("mlflow") or {}, tracking or config.tracking
    outcome = {
        "name": gate.register_as,
        "version": None,
        "alias": gate.alias,
        "champion": False,
        "beaten": None,
        "note": None,
        "error": None,
    }
    if record["evaluation"] is None:  # a gate of sizes alone lets it pass
        return outcome | {"error": "the checkpoint is not evaluated"}
    if logged.get("run_id") is None:
        return outcome | {"error": "the run is not in MLflow" + (f": {logged['error']}" if logged.get("error") else "")}
    found = guarded(tracking, lambda: _promote(config, record, logged["run_id"], tracking))
    return {key: found.get(key, value) for key, value in outcome.items()}


def _promote(config: RunConfig, record: dict[str, Any], run_id: str, tracking: TrackingConfig) -> dict[str, Any]:
    from mlflow import MlflowClient

    gate, tags = config.gate, version_tags(config, record)
    client = MlflowClient(tracking_uri=tracking.address)
    holder = _holder(client, gate.register_as, gate.alias)
    version = _version(client, config, tags, run_id, over_http=tracking.address.startswith("http"))
    outcome = {"version": str(version.version), "champion": False, "beaten": None, "note": None}
    if holder is not None and str(holder.version) == outcome["version"]:
        if f"gptq.alias.{gate.alias}" not in holder.tags:  # cut off between the alias and its date
            _date(client, gate, version)
        return outcome | {"champion": True}
    note = objection(tags, holder.tags if holder else None, gate.measure)
    if note:
        where = f"version {holder.version} keeps the alias" if holder else "the alias is not given"
        return outcome | {"note": f"{where}: {note}"}
    client.set_registered_model_alias(gate.register_as, gate.alias, outcome["version"])
    _date(client, gate, version)
    if holder and holder.tags.get("gptq.checkpoint") == tags["gptq.checkpoint"]:
        outcome["note"] = f"the files of version {holder.version} were replaced by this run, so it loses the alias"
    return outcome | {"champion": True, "beaten": str(holder.version) if holder else None}


def _date(client: Any, gate: GateConfig, version: Any) -> None:
    """MLflow keeps no history of an alias: a version tells when it took one, each time."""
    key, now = f"gptq.alias.{gate.alias}", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    client.set_model_version_tag(gate.register_as, str(version.version), key, f"{version.tags.get(key, '')} {now}".strip())


def version_tags(config: RunConfig, record: dict[str, Any]) -> dict[str, str]:
    """All that tells what a version is, where it lies and how good it is."""
    known, folder = measured(record), os.path.abspath(config.out)
    values = {f"gptq.{name}": repr(float(known[name])) for name in MEASURES if known[name] is not None}
    return {
        "gptq.key": record["key"],
        "gptq.checkpoint": folder,
        "gptq.manifest_sha256": file_sha256(Path(folder) / MANIFEST),
        "gptq.run": record["id"],
        "gptq.measure": config.gate.measure,
        "gptq.evaluation": record["evaluation"]["digest"],
        **values,
    }


def objection(own: dict[str, str], held: dict[str, str] | None, measure: str) -> str | None:
    """Why a version does not take the alias from the one that holds it; None: it does. held: None where nobody holds it.

    One that lies in the same folder and is another piece of work has lost its files to this one.
    """
    value, other = (float(tags.get(f"gptq.{measure}", "nan")) for tags in (own, held or {}))
    if not math.isfinite(value):
        return f"its {measure} is {value}"
    if held is None or held.get("gptq.checkpoint", "") == own["gptq.checkpoint"]:
        return None
    if held.get("gptq.evaluation") != own["gptq.evaluation"] or math.isnan(other):
        return f"not judged by {measure} on the same windows; run the holder's config with this text, or take the alias from it"
    return None if value < other else f"its {measure} is {other:.6g}, that of this one {value:.6g}"


def _holder(client: Any, name: str, alias: str) -> Any:
    """The version that holds the alias; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # an alias that is not there is an invalid parameter to MLflow
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _version(client: Any, config: RunConfig, tags: dict[str, str], run_id: str, over_http: bool) -> Any:
    """The version of this work in this folder, with tags as they are now; made where there is none."""
    from mlflow.exceptions import MlflowException

    name = config.gate.register_as
    same = [
        found
        for found in client.search_model_versions(f"name='{name}' and tags.`gptq.key` = '{tags['gptq.key']}'")
        if found.tags.get("gptq.checkpoint") == tags["gptq.checkpoint"]
    ]
    if same:
        version = min(same, key=lambda found: int(found.version))
        for key, value in tags.items():
            if version.tags.get(key) != value:
                client.set_model_version_tag(name, str(version.version), key, value)
        return version
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"runs:/{run_id}" if over_http else Path(tags["gptq.checkpoint"]).as_uri()
    # nothing is copied, so there is nothing to wait for
    return client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=0)
