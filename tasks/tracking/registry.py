"""Register what passed its gate as a version in MLflow's model registry. Nothing is copied: a version names the checkpoint's folder.

A version is one piece of work in one folder, known by its content key and its path, so that registering twice is registering once.
With a database its source is the folder. A tracking server refuses a source on a disk of its own: there it is the run, and the path
and the digest of the manifest stand in the tags, as they do everywhere.

The alias moves to a version that is better than the one that holds it, by the gate's measure, where both were judged on the same
windows. Judged on others, the two cannot be compared and the alias stays; it moves again once the holder's config is run with the
new text (its checkpoint is only evaluated), or once the alias is taken from it. A holder whose files this work has replaced
(output.overwrite) no longer counts; with {key} in output.dir nothing is replaced.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.checkpoint.reader import file_sha256
from gptq_core.checkpoint.writer import MANIFEST
from tasks.config.run import RunConfig, TrackingConfig
from tasks.outcome import record as records
from tasks.outcome.parts import Evaluation, MlflowLink, Registration
from tasks.outcome.record import RunRecord
from tasks.tracking import outbox
from tasks.tracking.mlflow_runs import attempt


@task(name="promote", cache_policy=NO_CACHE)
def promote(config: RunConfig, record: RunRecord) -> Registration:
    """Register the checkpoint of `record`, which passed `config.gate` with its register_as, and write the record with the result.

    If MLflow does not take it, that is the registration's `error` and no exception.
    """
    result = promote_in_mlflow(config, record)
    if record.evaluation is not None:
        result = outbox.update(config.tracking, "run", records.record_path(config.out), result, register=True)
    records.write(config.out, record.model_copy(update={"registry": result}))
    return result


def promote_in_mlflow(config: RunConfig, record: RunRecord, tracking: TrackingConfig | None = None) -> Registration:
    """promote, without Prefect, the outbox and the record on disk. tracking: where to, if not where the config says."""
    gate, link, tracking = config.gate, record.mlflow or MlflowLink(), tracking or config.tracking
    assert gate and gate.register_as  # what calls this has looked
    wanted = _Wanted(gate.register_as, gate.alias, gate.measure)
    nothing = Registration(name=wanted.name, alias=wanted.alias)
    if record.evaluation is None:  # a gate of sizes alone lets it pass
        return nothing.model_copy(update={"error": "the checkpoint is not evaluated"})
    if link.run_id is None:
        return nothing.model_copy(update={"error": "the run is not in MLflow" + (f": {link.error}" if link.error else "")})
    tags, run_id = version_tags(config.out, record, record.evaluation, gate.measure), link.run_id
    found, error = attempt(tracking, lambda: _promote(wanted, tags, run_id, tracking))
    return found or nothing.model_copy(update={"error": error})


@dataclass(frozen=True)
class _Wanted:
    """What the gate names: model and alias in the registry, and the number by which versions are compared."""

    name: str
    alias: str
    measure: str


def _promote(wanted: _Wanted, tags: dict[str, str], run_id: str, tracking: TrackingConfig) -> Registration:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking.address)
    holder = _holder(client, wanted)
    version = _version(client, wanted.name, tags, run_id, over_http=tracking.address.startswith("http"))
    result = Registration(name=wanted.name, alias=wanted.alias, version=str(version.version))
    if holder is not None and str(holder.version) == result.version:
        if f"gptq.alias.{wanted.alias}" not in holder.tags:  # cut off between the alias and its date
            _date(client, wanted, version)
        return result.model_copy(update={"champion": True})
    refusal = alias_refusal(tags, holder.tags if holder else None, wanted.measure)
    if refusal:
        where = f"version {holder.version} keeps the alias" if holder else "the alias is not given"
        return result.model_copy(update={"note": f"{where}: {refusal}"})
    client.set_registered_model_alias(wanted.name, wanted.alias, str(version.version))
    _date(client, wanted, version)
    replaced = holder and holder.tags.get("gptq.checkpoint") == tags["gptq.checkpoint"]
    note = f"the files of version {holder.version} were replaced by this run, so it loses the alias" if replaced else None
    return result.model_copy(update={"champion": True, "beaten": str(holder.version) if holder else None, "note": note})


def _date(client: Any, wanted: _Wanted, version: Any) -> None:
    """Note in the version when it took the alias, each time: MLflow keeps no history of an alias."""
    key, now = f"gptq.alias.{wanted.alias}", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    client.set_model_version_tag(wanted.name, str(version.version), key, f"{version.tags.get(key, '')} {now}".strip())


def version_tags(out: Path, record: RunRecord, evaluation: Evaluation, measure: str) -> dict[str, str]:
    """What a version is, where it lies and how good it is."""
    folder = os.path.abspath(out)
    known = {"gptq.kl": evaluation.kl, "gptq.perplexity_increase": evaluation.perplexity_increase}
    return {
        "gptq.key": record.key,
        "gptq.checkpoint": folder,
        "gptq.manifest_sha256": file_sha256(Path(folder) / MANIFEST),
        "gptq.run": record.id,
        "gptq.measure": measure,
        "gptq.evaluation": evaluation.digest,
        **{name: repr(float(value)) for name, value in known.items() if value is not None},
    }


def alias_refusal(own: dict[str, str], held: dict[str, str] | None, measure: str) -> str | None:
    """Why a version does not take the alias from the one that holds it; None: it does. held: None where no version holds it.

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


def _holder(client: Any, wanted: _Wanted) -> Any:
    """The version that holds the alias; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(wanted.name, wanted.alias)
    except MlflowException as error:
        # an alias that is not there is an invalid parameter to MLflow
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _version(client: Any, name: str, tags: dict[str, str], run_id: str, over_http: bool) -> Any:
    """The version of this work in this folder, with tags as they are now; made where there is none."""
    from mlflow.exceptions import MlflowException

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
