"""The commands. They import everything heavy themselves, so that the help and a wrong key answer at once."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from flows.cli import report
from flows.cli.launch import FAILED, fail, outcome, quiet, run, run_sweep, watched

app = typer.Typer(
    help="Quantize Hugging Face causal language models with GPTQ: one command from a model to an evaluated, tracked checkpoint.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 75 another run holds the output, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(report.app, name="report")


class KeyHelp(TyperCommand):
    """A command whose options on config keys take their help from the schemas, which are imported only when help is printed.

    {section.key} in the help of an option stands for the first sentence of the description of the key.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.markup import escape

        from tasks.config.reference import help_of

        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.help:
                parameter.help = re.sub(r"\{([a-z_.]+)\}", lambda found: escape(help_of(found[1])), parameter.help)
        super().format_help(ctx, formatter)


Out = Annotated[Path | None, typer.Option(help="{output.dir}", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="{output.overwrite}")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set any key of the config; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def option(help: str, *names: str, panel: str = "Common keys") -> Any:
    """An option that is None unless given, so that only then it overrides the config. {section.key} in its help: see KeyHelp."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


@app.command(cls=KeyHelp)
def demo(out: Out = None, set_: Set = None, overwrite: Overwrite = False) -> None:
    """Quantize the embedded model, offline and without settings, in less than a minute."""
    with outcome():
        from flows.demo import demo_config

        run(demo_config(settings(set_, {"output.dir": str(out) if out else None, "output.overwrite": overwrite or None})))


@app.command(cls=KeyHelp)
def quantize(
    config: Annotated[Path | None, typer.Argument(help="Config of the run, such as configs/quantize.yaml.", show_default=False)] = None,
    set_: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    model: Annotated[str | None, option("{model.path}")] = None,
    dataset: Annotated[str | None, option("{quantization.dataset}")] = None,
    bits: Annotated[int | None, option("{quantization.bits}")] = None,
    group_size: Annotated[int | None, option("{quantization.group_size}")] = None,
    format: Annotated[str | None, option("{quantization.format}")] = None,
    sym: Annotated[bool | None, option("{quantization.sym}", "--sym/--asym")] = None,
    desc_act: Annotated[bool | None, option("{quantization.desc_act}", "--desc-act/--no-desc-act")] = None,
    damp_percent: Annotated[float | None, option("{quantization.damp_percent}")] = None,
    samples: Annotated[int | None, option("{calibration.samples}", panel="Text")] = None,
    seqlen: Annotated[int | None, option("{calibration.seqlen} Sets calibration.seqlen and evaluation.seqlen.", panel="Text")] = None,
    seed: Annotated[int | None, option("{calibration.seed}", panel="Text")] = None,
    eval_dataset: Annotated[str | None, option("{evaluation.dataset}", panel="Text")] = None,
    device: Annotated[str | None, option("{model.device}")] = None,
) -> None:
    """Quantize a model by CONFIG; options and [bold]--set[/bold] override it, or replace it."""
    with outcome():
        from tasks.config.run import from_dict, load

        overrides = settings(
            set_,
            {
                "model.path": model,
                "model.device": device,
                "quantization.dataset": dataset,
                "quantization.bits": bits,
                "quantization.group_size": group_size,
                "quantization.format": format,
                "quantization.sym": sym,
                "quantization.desc_act": desc_act,
                "quantization.damp_percent": damp_percent,
                "calibration.samples": samples,
                "calibration.seqlen": seqlen,
                "calibration.seed": seed,
                "evaluation.seqlen": seqlen,
                "evaluation.dataset": eval_dataset,
                "output.dir": str(out) if out else None,
                "output.overwrite": overwrite or None,
            },
        )
        run(load(config, overrides) if config else from_dict({}, overrides))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="Config of the run, such as configs/quantize.yaml.", show_default=False)],
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Estimate size, memory and time of a run, and who will load its result, from the headers of the model alone."""
    with outcome():
        from gptq_core.model.opened import open_model
        from tasks.config.run import load
        from tasks.request.capacity import foresee, shortages

        request = load(config, settings(set_, {}))
        found = foresee(request, open_model(request.model.path, request.model.revision), rates=True)
        short = shortages(request, found)
        if as_json:
            show_json(
                {
                    "loads": [verdict.record() for verdict in found.verdicts],
                    "quantized_layers": list(found.selection.layers),
                    "left": found.selection.left,
                    "bits_per_weight": found.bits_per_weight,
                    "bytes": found.bytes,
                    "original_bytes": found.original_bytes,
                    **found.estimate.record(),
                    "fits": not any(s.certain for s in short),
                    "shortages": list(map(str, short)),
                    "notes": [*found.notes, *found.estimate.notes],
                }
            )
        else:
            from flows.cli.display import show_plan

            show_plan(found, short)


@app.command(cls=KeyHelp)
def sweep(
    config: Annotated[Path, typer.Argument(help="Config of a sweep, such as configs/sweep.yaml, or of a run.", show_default=False)],
    grid: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="Axis of the grid; may be repeated.")] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="{sweep.dir}", show_default=False)] = None,
    mode: Annotated[str | None, option("{sweep.mode}", panel="Options")] = None,
    max_parallel: Annotated[int | None, option("{sweep.max_parallel}", panel="Options")] = None,
    runner: Annotated[str | None, option("{sweep.runner}", panel="Options")] = None,
    address: Annotated[str | None, option("{sweep.ray_address}", panel="Options")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run many configurations in parallel and recommend one: --grid bits=3,4 --grid group_size=32,128."""
    with outcome():
        from tasks.config.sweep import load_sweep, parse_axis

        overrides = settings(
            set_,
            {
                "dir": str(out) if out else None,
                "mode": mode,
                "max_parallel": max_parallel,
                "runner": runner,
                "ray_address": address,
                "output.overwrite": overwrite or None,
            },
        )
        run_sweep(load_sweep(config, dict(parse_axis(axis) for axis in grid or []), overrides), as_json)


@app.command(cls=KeyHelp)
def evaluate(
    checkpoint: Checkpoint,
    dataset: Annotated[str | None, option("{evaluate.dataset}", panel="Options")] = None,
    model: Annotated[str | None, option("{evaluate.model}", panel="Options")] = None,
    seqlen: Annotated[int | None, option("{evaluate.seqlen}", panel="Options")] = None,
    samples: Annotated[int | None, option("{evaluate.samples}", panel="Options")] = None,
    device: Annotated[str, typer.Option(help="{evaluate.device}")] = "auto",
    backend: Annotated[str | None, option("{evaluate.backend}", panel="Options")] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a checkpoint, and its KL from the original model if that is known."""
    with outcome():
        from flows.evaluation_request import open_evaluation
        from tasks.config.evaluation import EvaluationRequest
        from tasks.request.handing import handed_on

        request = validated(
            EvaluationRequest,
            checkpoint=str(checkpoint),
            dataset=dataset,
            model=model,
            seqlen=seqlen,
            samples=samples,
            device=device,
            backend=backend,
        )
        opened = open_evaluation(request)
        quiet()
        from flows.evaluate import evaluate as flow

        with watched(), handed_on(opened):
            result = flow(request)
        show_json(result) if as_json else show_rows(result)


@app.command()
def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Print format, bits, groups and sizes of a checkpoint, and a table of its layers."""
    with outcome():
        from gptq_core.checkpoint.inspection import inspect_checkpoint

        found = inspect_checkpoint(checkpoint)
        if as_json:
            show_json(found)
        else:
            from flows.cli.display import show_inspection

            show_inspection(found)


@app.command()
def dequantize(checkpoint: Checkpoint, out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)]) -> None:
    """Convert a quantized checkpoint into a dense one, for tools that do not read GPTQ."""
    with outcome():
        from gptq_core.inference.dequantize import dequantize_checkpoint

        typer.echo(f"dense checkpoint: {dequantize_checkpoint(checkpoint, out)}")


@app.command()
def track_pending(
    outbox: Annotated[Path, typer.Option(help="Folder of the notes: tracking.outbox of the runs.")] = Path("runs/outbox"),
    uri: Annotated[str | None, option("MLflow tracking URI to log to, or env:NAME. Default: that of each run.", panel="Options")] = None,
    as_json: AsJson = False,
) -> None:
    """Log to MLflow, and register there, the runs and sweeps that it did not take when they ended."""
    with outcome():
        quiet()
        from tasks.tracking.replay import replay

        found = replay(outbox, uri)
        show_json([asdict(each) for each in found]) if as_json else show_pending(outbox, found)
        waiting = [each for each in found if each.why]
        if waiting:
            fail(
                FAILED,
                f"{len(waiting)} of {len(found)} stay in {outbox}; the first is {waiting[0].path or waiting[0].entry}: {waiting[0].why}",
            )


@app.command()
def serve(
    file: Annotated[Path, typer.Option(help="File with the deployments.")] = Path("prefect.yaml"),
    name: Annotated[list[str] | None, typer.Option(help="Serve only this deployment; may be repeated.", show_default=False)] = None,
) -> None:
    """Run the deployments of prefect.yaml on their schedules, without a worker, until interrupted. Needs a permanent Prefect server."""
    with outcome():
        from flows.serving.deployments import read, server

        deployments = read(file, name)
        os.environ.setdefault("DO_NOT_TRACK", "1")
        address = server()
        from flows.serving.deployments import serve as run_deployments

        typer.echo(f"serving {', '.join(deployment.name for deployment in deployments)} for {address}; Ctrl-C ends it", err=True)
        with watched("check PREFECT_API_URL, or start a server there with `prefect server start`"):
            run_deployments(deployments)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the Prefect UI; 0 picks a free one.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the MLflow UI; 0 picks a free one.")] = 5000,
    store: Annotated[str, typer.Option(help="MLflow database: the tracking.uri of the runs.")] = "sqlite:///mlflow.db",
    demo: Annotated[bool, typer.Option("--demo", help="Also run the cells of configs/sweep.yaml that are missing.")] = False,
    password: Annotated[bool, typer.Option("--password/--no-password", help="Off: every user of this machine has access.")] = True,
) -> None:
    """Serve the Prefect and MLflow UIs on this machine, with a password, until Ctrl-C.

    The password is in flows-ui.auth in Prefect's folder; PREFECT_SERVER_API_AUTH_STRING=user:password sets another.
    """
    with outcome():
        from flows.demo import demo_sweep
        from flows.serving.ui import ui as serve_pages

        serve_pages(prefect_port, mlflow_port, store, demo_sweep(store) if demo else None, password)


def settings(pairs: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key: the options that were given, and `--set` on top of them."""
    from tasks.config.overrides import parse_setting

    return {key: value for key, value in options.items() if value is not None} | dict(parse_setting(pair) for pair in pairs or [])


def validated(schema: Any, **values: Any) -> Any:
    """An object of `schema`; an InputError of one line if the values are invalid."""
    from pydantic import ValidationError

    from gptq_core.errors import InputError
    from gptq_core.schema import explain

    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_pending(outbox: Path, found: list[Any]) -> None:
    """found: each a tasks.tracking.replay.Replayed."""
    for each in found:
        typer.echo(f"{each.path or each.entry}: {f'stays: {each.why}' if each.why else f'logged as run {each.run_id}'}")
    if not found:
        typer.echo(f"{outbox}: nothing is pending")


def show_rows(values: dict[str, Any]) -> None:
    from flows.cli.display import show_table

    show_table({key.replace("_", " "): value for key, value in values.items() if value is not None and key != "digest"})
