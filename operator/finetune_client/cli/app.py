"""The command line of `finetune`: names, options and help. What a command does is in its own module, imported when it
runs: this one imports nothing that takes time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_client.cli.ckpt.commands import ckpt
from finetune_client.cli.data.commands import data as data_group
from finetune_client.cli.exits import EPILOG
from finetune_client.cli.flow import let_flow
from finetune_client.cli.jobs.commands import jobs
from finetune_client.cli.options import Output, OutputOption
from finetune_client.cli.serve.commands import serve

__all__ = ["app"]

app = typer.Typer(
    help="Fine-tune language models from a ten-line manifest.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class PlanOutput(StrEnum):
    """How a plan is printed."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


class Dtype(StrEnum):
    """The numbers of a model on disk."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="File with the FineTuneJob.", show_default=False)]
JobOption = Annotated[
    str | None,
    typer.Option("--job", help="Name of the job, when the file holds several.", show_default=False),
]
RuntimeOption = Annotated[
    list[Path] | None,
    typer.Option("--runtime", help="File with the FineTuneRuntime, when it is not in the same file. Repeatable."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the spec, such as training.maxSteps=5. The value is YAML; null removes the field, and "
        "one of several alternatives (epochs, maxSteps) removes the others. Repeatable.",
    ),
]
ArtifactArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR|ARTIFACT_DIR", help="A run's folder, or an artifact's.", show_default=False),
]


@app.command(epilog=EPILOG)
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files or folders.", show_default=False)],
    data: Annotated[bool, typer.Option("--data", help="Check the model and every row of data too.")] = False,
    runtime: RuntimeOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say everything that is wrong with some manifests, at once.

    Files may hold several documents; a folder stands for its .yaml, .yml and .json files. Nothing is started.

    \b
    Examples:
      finetune validate job.yaml
      finetune validate manifests/ --data -o json
    """
    from finetune_client.cli.validate import validate_files

    raise typer.Exit(validate_files(files, runtime or [], data, output is Output.JSON))


@app.command(epilog=EPILOG)
def plan(
    file: FileArgument,
    job: JobOption = None,
    runtime: RuntimeOption = None,
    overrides: SetOption = None,
    output: Annotated[PlanOutput, typer.Option("--output", "-o", help="A summary, or the whole RunPlan.")] = (
        PlanOutput.TEXT
    ),
) -> None:
    """Show what a job would do, and why, without starting anything.

    \b
    Examples:
      finetune plan job.yaml --runtime pool.yaml
      finetune plan job.yaml --set cluster.workers.replicas=4 -o json
    """
    from finetune_client.cli.plan import show_plan

    raise typer.Exit(show_plan(file, job, runtime or [], overrides or [], output.value))


@app.command(epilog=EPILOG)
def run(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File or folder with the FineTuneJob.", show_default=False)
    ] = None,
    filename: Annotated[
        Path | None,
        typer.Option(
            "--filename",
            "-f",
            metavar="FILE|FOLDER",
            help="Run every job in a file or a folder, as kubectl apply -f would: the same as FILE with --all.",
            show_default=False,
        ),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(help="Folder for the run's files.", show_default="runs/<job>/<time>"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for prepared models and data, shared by runs.", show_default="~/.cache/finetune"),
    ] = None,
    job: JobOption = None,
    all_jobs: Annotated[
        bool, typer.Option("--all", help="Run every job in the file or folder, each after those whose models it names.")
    ] = False,
    runtime: RuntimeOption = None,
    overrides: SetOption = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Train in one process, without Ray.")] = False,
    no_retry: Annotated[
        bool, typer.Option("--no-retry", help="Fail with the first attempt, whatever failurePolicy says.")
    ] = False,
    suspend_after: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Suspend the job after so many steps.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Instead of a file: go on with a run that was suspended or interrupted, with its next attempt.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Train on this machine: validate, plan, prepare, train, evaluate, write the model.

    What can be mended by trying again is tried again, as failurePolicy says; --no-retry turns that off. Progress goes
    to stderr, the result to stdout. Ctrl-C stops cleanly; a second one kills the run at once.

    \b
    Examples:
      finetune run job.yaml
      finetune run job.yaml --set training.maxSteps=5 --workdir runs/try -o json
      finetune run job.yaml --suspend-after 100
      finetune run -f manifests/samples/rlhf-chain
      finetune run --resume runs/support-bot/20250101-120000
    """
    from finetune_client.cli.run import RunRequest, run_job

    request = RunRequest(
        file=file,
        everything_in=filename,
        job=job,
        runtimes=runtime or [],
        overrides=overrides or [],
        workdir=workdir,
        cache=cache,
        use_ray=not no_ray,
        quiet=quiet,
        as_json=output is Output.JSON,
        all_of_file=all_jobs,
        retry=not no_retry,
        suspend_after=suspend_after,
        resume=resume,
    )
    raise typer.Exit(run_job(request))


@app.command(epilog=EPILOG)
def export(
    source: ArtifactArgument,
    to: Annotated[Path, typer.Option(help="New folder for the model.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights.", show_default="as they are")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write a trained model to a folder of its own, as an adapter or merged into a whole model.

    \b
    Examples:
      finetune export runs/support-bot/20250101-120000 --to ./model --merge
      finetune export ./adapter --to ./model --merge --dtype bf16 -o json
    """
    from finetune_client.cli import artifacts

    code = artifacts.export(source, to, merge, dtype.value if dtype else None, output is Output.JSON)
    raise typer.Exit(code)


@app.command(epilog=EPILOG)
def chat(
    source: ArtifactArgument,
    prompt: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)],
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Show the answer of the untrained base model beside it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    output: OutputOption = Output.TEXT,
) -> None:
    """Ask a trained model a question.

    \b
    Examples:
      finetune chat runs/support-bot/20250101-120000 "How do I reset my password?"
      finetune chat ./adapter "How do I reset my password?" --compare-base -o json
    """
    from finetune_client.cli import artifacts

    raise typer.Exit(artifacts.chat(source, prompt, compare_base, max_new_tokens, output is Output.JSON))


app.add_typer(serve)
app.add_typer(ckpt, name="ckpt")
app.add_typer(data_group, name="data")
for command in jobs.registered_commands:
    command.rich_help_panel = "Jobs in a cluster, or in the background of this machine"
app.add_typer(jobs)


@app.command(epilog=EPILOG)
def version(output: OutputOption = Output.TEXT) -> None:
    """Show the versions of finetune, Python, and the packages that train.

    \b
    Examples:
      finetune version
      finetune version -o json
    """
    from finetune_client.cli.version import show_version

    show_version(output is Output.JSON)


let_flow(app)
