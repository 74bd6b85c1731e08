"""The main job: a causal language model in, a GPTQ checkpoint out, evaluated and tracked.

    prepare_dataset -> (allocate ->) capture_calibration -> quantize_block x N -> assemble -> evaluate -> log

The checkpoint is published before it is evaluated: an evaluation that fails costs its numbers and never the checkpoint. Work
that is finished is not done twice: then the flow reports what its record holds, and only what is missing is made up for.
"""

import time
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows import progress
from flows.artifacts import Board
from gptq_core.calibration import Windows
from gptq_core.checkpoint.card import rewrite as write_card
from gptq_core.config import kernel_name
from gptq_core.errors import GPTQError
from tasks import record as records
from tasks.allocate import allocate
from tasks.config import RunConfig
from tasks.data import prepare_dataset
from tasks.evaluate import Progress, evaluate
from tasks.prepare import open_quantization, stored_allocation
from tasks.quantize import Handle, assemble, capture_calibration, quantize_block
from tasks.tracking import log


class EvaluationFailedError(GPTQError):
    """The checkpoint is complete and its evaluation failed."""


@flow(name="quantize", flow_run_name="quantize-{config.out.name}")
def quantize(config: RunConfig) -> dict[str, Any]:
    """Quantize, evaluate and track as `config` says; return the run record."""
    report, board, started = progress.reporter(), Board("quantize"), time.perf_counter()
    with report.stage("prepare dataset"):
        data = prepare_dataset(config)
    calibration = Windows.load(data["calibration"]["file"])
    allocation = _allocate(config, calibration, data["calibration"]["file"], report)
    with open_quantization(config, calibration) as job:
        record = _record(config, job.key, data, allocation)
        record["unchanged"] = job.finished
        if job.finished:
            report.note(f"{config.out}: unchanged, nothing to do")
        else:
            record["blocks"] = _quantize(job, report, board)
        with report.stage("assemble"):
            record["assembly"] = assemble(Handle(job))
        if not job.finished:
            record["stage_seconds"] = {"prepare": data["seconds"], **job.stage_seconds}
            if allocation:
                record["stage_seconds"]["allocate"] = allocation["seconds"]
        records.write(config.out, record)
        if record["evaluation"] is None:
            board.progress(90, "evaluate")
            _evaluate(config, record, report)
            write_card(config.out, record["evaluation"])
    if record["seconds"] is None:
        record |= {"seconds": time.perf_counter() - started, "finished_ms": int(time.time() * 1000),
                   "peak_memory_bytes": records.peak_memory(), "prefect_flow_run_id": flow_run.get_id()}
    with report.stage("log"):
        record["mlflow"] = log(config, record)
    if record["mlflow"]["error"]:
        report.note(f"computed, not recorded in MLflow: {record['mlflow']['error']}")
    board.table(results(record), f"{config.model.path} at {config.quantization.bits} bits")
    board.progress(100, "done")
    if record["evaluation_error"]:
        raise EvaluationFailedError(
            f"the checkpoint {config.out} is complete, but its evaluation failed ({record['evaluation_error']}): "
            "run the same command again to evaluate it")
    return record


def _allocate(config: RunConfig, calibration: Windows, file: str, report: progress.Reporter) -> dict[str, Any] | None:
    """The widths of the linears, as they were chosen before or chosen now; None where none are asked for."""
    if config.quantization.allocate is None:
        return None
    stored = stored_allocation(config, calibration)
    if stored:
        return stored
    with open_quantization(config, calibration) as job, report.stage("allocate bits", job.block_count) as advance:
        # open only so that no other run writes there meanwhile
        return allocate(config, file, Progress(lambda done, total: advance(done)))


def _quantize(job: Any, report: progress.Reporter, board: Board) -> list[dict[str, Any]]:
    handle, blocks = Handle(job), []
    board.progress(0, "capture_calibration")
    with report.stage("capture calibration"):
        capture_calibration(handle)
    with report.stage("quantize blocks", job.block_count) as advance:
        for index in range(job.block_count):
            block = quantize_block(handle, index)
            blocks.append(block)
            worst = max((layer["relative_error"] or 0.0 for layer in block["layers"]), default=0.0)
            text = (f"block {index + 1}/{job.block_count}: {len(block['layers'])} layers, worst relative error {worst:.4f}, "
                    f"{block['seconds']:.1f} s{', from disk' if block['resumed'] else ''}")
            advance(index + 1, text)
            board.progress(90 * (index + 1) / job.block_count, text)
    return blocks


def _evaluate(config: RunConfig, record: dict[str, Any], report: progress.Reporter) -> None:
    held_out = record["evaluation_data"]
    with report.stage("evaluate", held_out["windows"]) as advance:
        state = evaluate(str(config.out), held_out["file"], config.model.path, config.model.revision, config.model.device,
                         config.evaluation.kl, Progress(lambda done, total: advance(done)), config.quantization.backend, return_state=True)
    if state.is_completed():
        record["evaluation"] = state.result()
        record["stage_seconds"]["evaluate"] = record["evaluation"]["seconds"]
    else:
        error = state.result(raise_on_failure=False)
        record["evaluation_error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _record(config: RunConfig, key: str, data: dict[str, Any], allocation: dict[str, Any] | None) -> dict[str, Any]:
    """The stored record if it is of this very work and text, else a new one; it keeps what the work already told."""
    stored = records.read(config.out)
    same_work = stored is not None and stored.get("key") == key
    if same_work and stored.get("evaluation") and stored["seconds"] is not None:
        same_text = stored["evaluation"]["digest"] == data["evaluation"]["digest"]
        same_runner = stored["evaluation"].get("backend", "torch") == (kernel_name(config.quantization.backend) or "torch")
        if same_text and same_runner and (stored["evaluation"]["kl"] is not None) == config.evaluation.kl:
            return stored
    record = records.new(config, key)
    if same_work:
        record |= {"blocks": stored["blocks"], "stage_seconds": stored["stage_seconds"]}
    return record | {"calibration_data": data["calibration"], "evaluation_data": data["evaluation"], "allocation": allocation}


def results(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run that a person looks for first."""
    evaluation, assembly = record["evaluation"] or {}, record["assembly"]
    rows = {
        "original perplexity": evaluation.get("original_perplexity"), "quantized perplexity": evaluation.get("quantized_perplexity"),
        "KL per token (nats)": evaluation.get("kl"), "same top token": evaluation.get("top1_agreement"),
        "original bytes": assembly["original_bytes"], "quantized bytes": assembly["bytes"], "bits per weight": assembly["bits_per_weight"],
        "allocation": records.allocated(record), "seconds": record["seconds"],
    }
    return {key: value for key, value in rows.items() if value is not None}
