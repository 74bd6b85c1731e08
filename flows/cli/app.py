"""The commands. Everything heavy is imported inside them: the help page and a wrong key answer at once."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli import report
from flows.cli.launch import FAILED, fail, outcome, quiet, run, run_sweep, watched

app = typer.Typer(
    help="Quantize Hugging Face causal language models with GPTQ: one command from a model to an evaluated, tracked checkpoint.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 75 the output is held by another run, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(report.app, name="report")

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
    config: Annotated[Path, typer.Argument(help="YAML of the run; see configs/quantize.yaml.", show_default=False)],
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """What a run would make, who will load it and what it takes: from the model's headers, nothing is computed or written."""
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
        from flows.evaluation_request import EvaluationRequest, open_evaluation
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
    """Format, bits, groups and sizes of a checkpoint, and a table of its layers."""
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
    """Write a quantized checkpoint back as a dense one, for tools that do not read GPTQ."""
    with outcome():
        from gptq_core.inference.dequantize import dequantize_checkpoint

        typer.echo(f"dense checkpoint: {dequantize_checkpoint(checkpoint, out)}")


@app.command()
def track_pending(
    outbox: Annotated[Path, typer.Option(help="Folder of the notes: tracking.outbox of the runs.")] = Path("runs/outbox"),
    uri: option(
        str, "Address of the store now, where it is not the one of the runs; env:NAME: it stands in the environment.", panel="Options"
    ) = None,
    as_json: AsJson = False,
) -> None:
    """Log to MLflow, and register there, what it did not take when runs and sweeps ended."""
    with outcome():
        quiet()
        from tasks.tracking.replay import replay

        found = replay(outbox, uri)
        show_json(found) if as_json else show_pending(outbox, found)
        waiting = [each for each in found if each["why"]]
        if waiting:
            fail(
                FAILED,
                f"{len(waiting)} of {len(found)} stay in {outbox}; the first, {waiting[0]['path'] or waiting[0]['entry']}: "
                f"{waiting[0]['why']}",
            )


@app.command()
def serve(
    file: Annotated[Path, typer.Option(help="Where the deployments are described.")] = Path("prefect.yaml"),
    name: Annotated[list[str] | None, typer.Option(help="Serve only this deployment; may be repeated.", show_default=False)] = None,
) -> None:
    """Run the deployments of prefect.yaml on their schedules, without a worker, until interrupted. Needs a Prefect server that stays."""
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
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Of Prefect's page; 0: any that is free.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=0, max=65535, help="Of MLflow's page; 0: any that is free.")] = 5000,
    store: Annotated[str, typer.Option(help="MLflow's database: what tracking.uri of the runs names.")] = "sqlite:///mlflow.db",
    demo: Annotated[bool, typer.Option("--demo", help="Also run the sweep of configs/sweep.yaml; what is done is not done again.")] = False,
    password: Annotated[bool, typer.Option("--password/--no-password", help="Off: whoever is on this machine may use both.")] = True,
) -> None:
    """Prefect's and MLflow's pages, for this machine alone and with a password, until Ctrl-C, which stops both.

    The password is kept in flows-ui.auth in Prefect's folder; PREFECT_SERVER_API_AUTH_STRING=user:password sets another.
    """
    with outcome():
        from flows.demo import demo_sweep
        from flows.serving.ui import ui as serve_pages

        serve_pages(prefect_port, mlflow_port, store, demo_sweep(store) if demo else None, password)


def settings(pairs: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, and `--set` on top of them."""
    from tasks.config.run import parse_setting

    return {key: value for key, value in options.items() if value is not None} | dict(parse_setting(pair) for pair in pairs or [])


def validated(schema: Any, **values: Any) -> Any:
    from pydantic import ValidationError

    from gptq_core.errors import InputError
    from gptq_core.schema import explain

    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_pending(outbox: Path, found: list[dict[str, Any]]) -> None:
    for each in found:
        typer.echo(f"{each['path'] or each['entry']}: {'stays: ' + each['why'] if each['why'] else 'logged as run ' + each['run_id']}")
    if not found:
        typer.echo(f"{outbox}: nothing is pending")


def show_rows(values: dict[str, Any]) -> None:
    from flows.cli.display import show_table

    show_table({key.replace("_", " "): value for key, value in values.items() if value is not None and key != "digest"})
