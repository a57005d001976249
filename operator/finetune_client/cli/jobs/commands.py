"""The command line for jobs that run elsewhere: names, options and help. Imports nothing that takes time; what a
command does is in `verbs`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_client.cli.exits import JOBS_EPILOG
from finetune_client.cli.options import Output, OutputOption

__all__ = ["jobs"]

jobs = typer.Typer()


class Format(StrEnum):
    """For people, or for programs."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def known_names(context: typer.Context) -> list[str]:
    """For the shell: of the jobs at the place that was typed; none of a Ray cluster, which takes its time to answer.

    Typer leaves out those that begin otherwise.
    """
    typed = context.params
    if typed.get("local"):
        from finetune_client.backends.local import names_of

        return names_of(typed.get("namespace"))
    if typed.get("ray") and not (typed.get("context") or typed.get("kubeconfig")):
        return []
    from finetune_client.cli.jobs.completion import names_in_cluster

    return names_in_cluster(typed.get("namespace"), typed.get("context"), typed.get("kubeconfig"))


Files = Annotated[
    list[Path], typer.Argument(metavar="FILE", help="Files or folders with FineTuneJobs.", show_default=False)
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the job.", show_default=False, autocompletion=known_names)
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Where the job is.", show_default="the context's")
]
Context = Annotated[
    str | None, typer.Option("--context", help="Context of the kubeconfig.", show_default="the current one")
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option("--kubeconfig", metavar="FILE", help="How to reach the cluster.", show_default="as kubectl has it"),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="URL",
        envvar="FINETUNE_RAY",
        help="A Ray cluster instead: its dashboard (http://HEAD:8265) or Ray Client (ray://HEAD:10001).",
        show_default=False,
    ),
]
Local = Annotated[bool, typer.Option("--local", help="This machine instead, in the background.")]
FormatOption = Annotated[
    Format, typer.Option("--output", "-o", help="A table for people; json or yaml for programs (on stdout).")
]


@jobs.command(epilog=JOBS_EPILOG)
def submit(
    files: Files,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Follow the jobs until they end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Have the cluster judge the jobs, and start nothing.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Hand jobs over to a Kubernetes cluster, a Ray cluster that runs already, or this machine: they run without you.

    Checked on this machine first, as validate does, and then by the cluster's own rules; when anything is wrong nothing
    is started. Runtimes in the files go along to Ray; in Kubernetes they are the platform's and stay as they are.

    \b
    Examples:
      finetune submit job.yaml
      finetune submit job.yaml -n team-a --wait
      finetune submit manifests/ --dry-run
      finetune submit job.yaml --ray http://127.0.0.1:8265
      finetune submit job.yaml --local
    """
    from finetune_client.cli.jobs import verbs

    where = verbs.Where(namespace, context, kubeconfig, ray, local)
    raise typer.Exit(verbs.submit(where, files, wait, dry_run, output.value))


@jobs.command(epilog=JOBS_EPILOG)
def get(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Name of the job.", show_default="all jobs", autocompletion=known_names),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show how a job stands, why it waits or failed, and what to do next.

    \b
    Examples:
      finetune get support-bot
      finetune get support-bot -o yaml
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(verbs.get(verbs.Where(namespace, context, kubeconfig, ray, local), name, output.value))


@jobs.command(name="list", epilog=JOBS_EPILOG)
def list_jobs(
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """List jobs with phase, step, newest checkpoint and restarts.

    \b
    Examples:
      finetune list
      finetune list -A -o json
    """
    from finetune_client.cli.jobs import verbs

    where = verbs.Where(namespace, context, kubeconfig, ray, local)
    raise typer.Exit(verbs.list_jobs(where, all_namespaces, output.value))


@jobs.command(epilog=JOBS_EPILOG)
def watch(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Follow a job until it ends: a line whenever its phase, its step or what it waits for changes.

    Ctrl-C ends the watching and not the job. With -o json each line is the job's status, with -o yaml each document.

    \b
    Examples:
      finetune watch support-bot
      finetune watch support-bot -n team-a -o json
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(verbs.watch(verbs.Where(namespace, context, kubeconfig, ray, local), name, output.value))


@jobs.command(epilog=JOBS_EPILOG)
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the attempt ends.")] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of which attempt.", show_default="the newest")
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Of all pods, and not of rank 0's alone.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Print what the trainers write: rank 0's log of the newest attempt.

    In Kubernetes it is read inside the pod, which needs the right to pods/exec. When the pods are gone, the last lines
    that the status kept are printed. With -o json each line is an object with source and text.

    \b
    Examples:
      finetune logs support-bot -f
      finetune logs support-bot --attempt 1 --all
    """
    from finetune_client.cli.jobs import verbs

    where = verbs.Where(namespace, context, kubeconfig, ray, local)
    raise typer.Exit(verbs.logs(where, name, follow, attempt, everyone, output is Output.JSON))


@jobs.command(epilog=JOBS_EPILOG)
def suspend(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until its machines are given back.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Have a job save a checkpoint and give back its machines.

    A job without a checkpoint block begins again at step 0 when it is resumed. With -o json the job is printed, as
    get does.

    \b
    Examples:
      finetune suspend support-bot
      finetune suspend support-bot --wait -o json
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(
        verbs.suspend(verbs.Where(namespace, context, kubeconfig, ray, local), name, wait, output is Output.JSON)
    )


@jobs.command(epilog=JOBS_EPILOG)
def resume(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a suspended job go on, from its newest checkpoint, on as many workers as it now asks for.

    With -o json the job is printed, as get does.

    \b
    Examples:
      finetune resume support-bot
      finetune resume support-bot -n team-a
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(verbs.resume(verbs.Where(namespace, context, kubeconfig, ray, local), name, output is Output.JSON))


@jobs.command(epilog=JOBS_EPILOG)
def cancel(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """End a job and remove it. Its artifacts and checkpoints stay; suspend keeps the job too.

    With -o json the job is printed as it was before.

    \b
    Examples:
      finetune cancel support-bot
      finetune cancel support-bot -n team-a
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(verbs.cancel(verbs.Where(namespace, context, kubeconfig, ray, local), name, output is Output.JSON))


@jobs.command(epilog=JOBS_EPILOG)
def artifacts(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the models that a job has written: where they are, their size and digest.

    \b
    Examples:
      finetune artifacts support-bot
      finetune artifacts support-bot -o json
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(verbs.artifacts(verbs.Where(namespace, context, kubeconfig, ray, local), name, output.value))


@jobs.command(epilog=JOBS_EPILOG)
def describe(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Tell all that is known of a job: attempts, conditions, checkpoint, events, and what to do next.

    \b
    Examples:
      finetune describe support-bot
      finetune describe support-bot -o json
    """
    from finetune_client.cli.jobs import verbs

    raise typer.Exit(
        verbs.describe(verbs.Where(namespace, context, kubeconfig, ray, local), name, output is Output.JSON)
    )
