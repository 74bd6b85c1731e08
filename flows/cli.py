"""The command line. Everything heavy is imported inside the commands: the help page and a wrong key answer at once.

Exit codes: 0 done; 1 failed; 2 wrong usage or config; 75 the output is held by another run; 130 interrupted.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

DONE, FAILED, WRONG, HELD, INTERRUPTED = 0, 1, 2, 75, 130

class PrefectAwayError(Exception):
    """Prefect's server does not answer."""


app = typer.Typer(
    help="Quantize Hugging Face causal language models with GPTQ: one command from a model to an evaluated, tracked checkpoint.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 75 the output is held by another run, 130 interrupted.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path | None, typer.Option(help="Folder of the checkpoint. Default: output.dir.", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint of another config that is there.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set any key of the config; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def option(kind: Any, help: str, names: tuple[str, ...] = (), panel: str = "Common keys") -> Any:
    """An option that is None unless given, so that it overrides the file only then."""
    return Annotated[kind | None, typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)]


@app.command()
def demo(out: Out = None, set_: Set = None, overwrite: Overwrite = False) -> None:
    """Quantize the embedded model: no hub, no settings, less than a minute."""
    with outcome():
        from flows.demo import demo_config

        run(demo_config(settings(set_, {"output.dir": str(out) if out else None, "output.overwrite": overwrite or None})))


@app.command()
def quantize(
    config: Annotated[Path | None, typer.Argument(help="YAML of the run; see configs/quantize.yaml.", show_default=False)] = None,
    set_: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    model: option(str, "Folder of the model, or its id on the hub.") = None,
    dataset: option(str, "Calibration text: .txt, .jsonl, .parquet, wikitext2 or c4.") = None,
    bits: option(int, "Bits a weight: 2, 3, 4 or 8.") = None,
    group_size: option(int, "Columns that share a scale; -1: the whole row.") = None,
    format: option(str, "gptq or gptq_v2.") = None,
    sym: option(bool, "Zero point fixed, or fitted a group.", ("--sym/--asym",)) = None,
    desc_act: option(bool, "Columns by decreasing activation, or as they are.", ("--desc-act/--no-desc-act",)) = None,
    damp_percent: option(float, "Share of the mean diagonal added to the Hessian.") = None,
    samples: option(int, "Windows of calibration text.", panel="Text") = None,
    seqlen: option(int, "Tokens in a window, of calibration and evaluation.", panel="Text") = None,
    seed: option(int, "Seed of the choice of windows.", panel="Text") = None,
    eval_dataset: option(str, "Held-out text. Default: the end of the calibration text.", panel="Text") = None,
    device: option(str, "cpu, cuda, cuda:N or auto.") = None,
) -> None:
    """Quantize a model as CONFIG says; options and [bold]--set[/bold] override it, or stand alone."""
    with outcome():
        from tasks.config import from_dict, load

        overrides = settings(set_, {
            "model.path": model, "model.device": device, "quantization.dataset": dataset, "quantization.bits": bits,
            "quantization.group_size": group_size, "quantization.format": format, "quantization.sym": sym,
            "quantization.desc_act": desc_act, "quantization.damp_percent": damp_percent, "calibration.samples": samples,
            "calibration.seqlen": seqlen, "calibration.seed": seed, "evaluation.seqlen": seqlen, "evaluation.dataset": eval_dataset,
            "output.dir": str(out) if out else None, "output.overwrite": overwrite or None,
        })
        run(load(config, overrides) if config else from_dict({}, overrides))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML of the run; see configs/quantize.yaml.", show_default=False)],
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """What a run would make, who will load it and what it takes: from the model's headers, nothing is computed or written."""
    with outcome():
        from tasks.config import load
        from tasks.prepare import foresee, shortages

        request = load(config, settings(set_, {}))
        found = foresee(request, rates=True)
        short = shortages(request, found)
        if as_json:
            show_json({"loads": [verdict.record() for verdict in found.verdicts], "quantized_layers": list(found.selection.layers),
                       "left": found.selection.left, "bits_per_weight": found.bits_per_weight, "bytes": found.bytes,
                       "original_bytes": found.original_bytes, **found.estimate.record(), "fits": not any(s.certain for s in short),
                       "shortages": list(map(str, short)), "notes": [*found.notes, *found.estimate.notes]})
        else:
            from flows.screen import show_plan

            show_plan(found, short)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML of a sweep (see configs/sweep.yaml), or of a run.", show_default=False)],
    grid: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="An axis of the grid; may be repeated.")] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: dir.", show_default=False)] = None,
    mode: option(str, "exact, or screening: all cells from one pass, without checkpoints.", panel="Options") = None,
    max_parallel: option(int, "Cells at a time.", panel="Options") = None,
    runner: option(str, "local, or ray.", panel="Options") = None,
    address: option(str, "Of the Ray cluster.", panel="Options") = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run many configurations beside each other and recommend one: --grid bits=3,4 --grid group_size=32,128."""
    with outcome():
        from tasks.sweep import load_sweep, parse_axis

        overrides = settings(set_, {"dir": str(out) if out else None, "mode": mode, "max_parallel": max_parallel, "runner": runner,
                                    "ray_address": address, "output.overwrite": overwrite or None})
        run_sweep(load_sweep(config, dict(parse_axis(axis) for axis in grid or []), overrides), as_json)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    dataset: option(str, "Held-out text. Default: that of the run that made the checkpoint.", panel="Options") = None,
    model: option(str, "The original to compare with. Default: that of the run.", panel="Options") = None,
    seqlen: option(int, "Tokens in a window.", panel="Options") = None,
    samples: option(int, "At most this many windows.", panel="Options") = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    backend: option(str, "Who runs the linears: torch, or a kernel of GPTQModel. Default: as in the run.", panel="Options") = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a checkpoint as it lies on disk, and its KL from the original where that is known."""
    with outcome():
        from flows.request import EvaluationRequest, prepare_evaluation, runner

        request = validated(EvaluationRequest, checkpoint=str(checkpoint), dataset=dataset, model=model, seqlen=seqlen, samples=samples,
                            device=device, backend=backend)
        prepare_evaluation(request)
        runner(request)
        quiet()
        from flows.evaluate import evaluate as flow

        with watched():
            result = flow(request)
        show_json(result) if as_json else show_rows(result)


@app.command()
def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Format, bits, groups and sizes of a checkpoint, and a table of its layers."""
    with outcome():
        from gptq_core.checkpoint.inspection import inspect_checkpoint

        found = inspect_checkpoint(checkpoint)
        if as_json:
            show_json(found)
        else:
            from flows.screen import show_inspection

            show_inspection(found)


@app.command()
def dequantize(checkpoint: Checkpoint, out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)]) -> None:
    """Write a quantized checkpoint back as a dense one, for tools that do not read GPTQ."""
    with outcome():
        from gptq_core.dequantize import dequantize_checkpoint

        typer.echo(f"dense checkpoint: {dequantize_checkpoint(checkpoint, out)}")


@app.command()
def serve(
    file: Annotated[Path, typer.Option(help="Where the deployments are described.")] = Path("prefect.yaml"),
    name: Annotated[list[str] | None, typer.Option(help="Serve only this deployment; may be repeated.", show_default=False)] = None,
) -> None:
    """Run the deployments of prefect.yaml on their schedules, without a worker, until interrupted. Needs a Prefect server that stays."""
    with outcome():
        from flows.serve import read, server

        deployments = read(file, name)
        os.environ.setdefault("DO_NOT_TRACK", "1")
        address = server()
        from flows.serve import serve as run_deployments

        typer.echo(f"serving {', '.join(deployment.name for deployment in deployments)} for {address}; Ctrl-C ends it", err=True)
        with watched("check PREFECT_API_URL, or start a server there with `prefect server start`"):
            run_deployments(deployments)


def run(config: Any) -> None:
    """Check everything that costs nothing, then start Prefect and the flow, then tell what came out."""
    from tasks import record as records
    from tasks.prepare import check, placed

    config = placed(config)
    check(config)  # without Prefect; the flow tells its notes
    quiet()
    from flows.quantize import quantize as flow
    from flows.screen import show_run
    from tasks.gate import GateFailedError, demand

    before = records.read(config.out)
    try:
        with watched():
            record = flow(config)
    except GateFailedError:
        record = records.read(config.out)
    except PrefectAwayError:
        record = records.read(config.out)
        if record is None or record == before or record["mlflow"] is None:
            raise
        typer.echo("computed, not recorded in Prefect: its server went away during the run", err=True)
    show_run(config, record)
    demand(config, record)


def run_sweep(config: Any, as_json: bool) -> None:
    """Look at every cell, start Prefect and the flow where something is missing, and tell what came out."""
    quiet()  # what is read from here on imports Prefect
    started = time.perf_counter()
    from tasks import cells

    states = cells.examine(config)
    for state in states:
        if state.status not in ("done", "missing"):
            typer.echo(f"note: {state.cell.name}: {state.error}", err=True)
    found, error = cells.settled(config, states), None
    if found:
        typer.echo(f"{config.folder}: unchanged, nothing to do", err=True)
    else:
        from flows.sweep import SweepFailedError
        from flows.sweep import sweep as flow

        try:
            with watched():
                found = flow(config)
        except SweepFailedError as reason:
            found, error = cells.read(config), reason
        except PrefectAwayError:
            states = cells.examine(config)
            if any(state.status == "missing" for state in states):
                raise
            found = cells.result(config, states, [], started)
            cells.write(config, found)
            typer.echo("computed, not recorded in Prefect: its server went away during the sweep", err=True)
    if as_json:
        show_json(found)
    else:
        from flows.screen import show_sweep

        show_sweep(found)
    error = error or cells.objection(found)
    if error:
        fail(FAILED, error)


def settings(pairs: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, and `--set` on top of them."""
    from tasks.config import parse_setting

    return {key: value for key, value in options.items() if value is not None} | dict(parse_setting(pair) for pair in pairs or [])


def validated(schema: Any, **values: Any) -> Any:
    from pydantic import ValidationError

    from gptq_core.config import explain
    from gptq_core.errors import InputError

    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(explain(error)) from error


@contextmanager
def outcome() -> Iterator[None]:
    """Exceptions that a person can do something about, as one line and an exit code. A bug keeps its traceback."""
    from gptq_core.errors import GPTQError, InputError, OutputHeldError

    try:
        yield
    except InputError as error:
        fail(WRONG, error)
    except OutputHeldError as error:
        fail(HELD, error)
    except (GPTQError, PrefectAwayError) as error:
        fail(FAILED, error)
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted: the same command resumes where it stopped")


def fail(code: int, message: object) -> None:
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


def quiet() -> None:
    """Defaults for Prefect and MLflow where the person set none; before either is imported."""
    import logging

    defaults = {
        "PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
        "PREFECT_CLIENT_MAX_RETRIES": "3",  # a call to a server that is gone then costs 14 seconds and not a minute
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a fresh home and a busy machine need more than its 20
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # what they would tell is told by one line of ours: migrations, retries of a server that is away, events that it misses
    levels = {"alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR, "prefect.events.clients": logging.ERROR,
              "prefect._internal.concurrency": logging.CRITICAL}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)

    from transformers.utils.logging import disable_progress_bar

    from flows.orphans import end_server_with_us
    from gptq_core.errors import GPTQError

    # with a server of the person's own, Prefect starts none
    if "PREFECT_API_URL" not in os.environ:
        end_server_with_us()
    disable_progress_bar()  # two bars on one line, and noise in a file

    def ours(entry: logging.LogRecord) -> bool:
        signs = ("aborted by an interrupt signal", "failed with state", "Finished in state Failed")
        told = any(sign in entry.getMessage() for sign in signs)
        return told or bool(entry.exc_info and isinstance(entry.exc_info[1], GPTQError))

    # these end as one line of ours: Prefect's traceback on top would bury it
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(lambda entry: not ours(entry))


@contextmanager
def watched(remedy: str = "check PREFECT_API_URL, or unset it to run without a server; the same command resumes") -> Iterator[None]:
    """Run a flow: its progress on stderr as bars or as lines, a server that does not answer as a PrefectAwayError."""
    import httpx
    from rich.console import Console

    from flows import progress

    console = Console(stderr=True)
    watcher = progress.Bars(console) if console.is_terminal else progress.Lines(lambda text: typer.echo(text, err=True))
    try:
        with progress.watched_by(watcher):
            yield
    except (RuntimeError, httpx.HTTPError) as error:
        # at the start of a flow Prefect says it by a bare RuntimeError
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("Failed to reach API", "ephemeral Prefect API")):
            raise
        raise PrefectAwayError(f"Prefect does not answer ({error}): {remedy}") from error


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(values: dict[str, Any]) -> None:
    from flows.screen import show_table

    show_table({key.replace("_", " "): value for key, value in values.items() if value is not None and key != "digest"})
