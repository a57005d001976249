"""The command line of `finetune ckpt`: names, options and help. Imports nothing that takes time; what a command does is
in `verbs`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_client.cli.exits import CKPT_EPILOG
from finetune_client.cli.options import Output, OutputOption

__all__ = ["ckpt"]

ckpt = typer.Typer(
    help="Look after checkpoints: on this machine's disk, a claim or a bucket.\n\n"
    "WHERE is a run's folder, the name of a run's job below ./runs, a folder with checkpoints, or a URI (file, pvc, s3,"
    " gs). ID is newest, a step (200), a step of one attempt (200-e1), or the name that ls shows.\n\n"
    "Buckets take credentials, region and endpoint from the environment as AWS and Google programs do; pvc://claim is"
    " looked for below FINETUNE_PVC_ROOT, /mnt/pvc unless it is set. No command imports torch, but for formats of"
    " torch's and DeepSpeed's, and none but gc, repair, pin, unpin, export and import writes anything.\n\n"
    "\b\n"
    "Examples:\n"
    "  finetune ckpt ls support-bot\n"
    "  finetune ckpt verify s3://team-a/jobs/support-bot/checkpoints --all --deep\n"
    "  finetune ckpt export runs/support-bot/20250101-120000 --to ./model",
    epilog=CKPT_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


class Dtype(StrEnum):
    """The numbers of exported weights."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


Where = Annotated[
    str, typer.Argument(metavar="WHERE", help="A run's folder, a job's name, a folder, or a URI.", show_default=False)
]
Id = Annotated[str | None, typer.Argument(metavar="ID", help="Which one: newest, 200, 200-e1.", show_default="newest")]
KeepLast = Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep the last N.", show_default="the job's")]
KeepEvery = Annotated[
    int | None, typer.Option(min=1, metavar="STEPS", help="Keep those at multiples of it.", show_default=False)
]
KeepBest = Annotated[
    str | None,
    typer.Option(metavar="METRIC[:min|max[:N]]", help="Keep those where a metric was best.", show_default=False),
]
Quota = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most that all may take together: 500GB.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Although a run seems to be at work: it will save no more.")
]


@ckpt.command(epilog=CKPT_EPILOG)
def ls(
    where: Where,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    keep_best: KeepBest = None,
    quota: Quota = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """List checkpoints, newest first: their state, their size, and why each one stays.

    Each is verified quickly: whole, damaged, unfinished (being saved, or left by a run that died), abandoned, or
    deleting. The rules that say which ones stay are the job's where it is known; others can be tried.

    \b
    Examples:
      finetune ckpt ls support-bot
      finetune ckpt ls s3://team-a/jobs/support-bot/checkpoints --keep-last 2 -o json
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.ls(where, verbs.Keeping(keep_last, keep_every, keep_best, quota), output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def inspect(
    where: Where,
    id: Id = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List all tensors with shapes and types.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what a checkpoint says of itself: job, base model, data, metrics, optimizer, tensors, files.

    \b
    Examples:
      finetune ckpt inspect support-bot
      finetune ckpt inspect runs/support-bot/20250101-120000 200 --tensors
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.inspect(where, id, tensors, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def verify(
    where: Where,
    id: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="Which one.", show_default="the newest published, damaged or not"),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint there.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep/--quick", help="Read every byte; or look at sizes, receipts and documents.")
    ] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check that checkpoints are what was saved. Exits with 20 when one is not, and names files and elements.

    \b
    Examples:
      finetune ckpt verify support-bot
      finetune ckpt verify s3://team-a/jobs/support-bot/checkpoints --all --deep
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.verify(where, id, every, deep, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def diff(
    where: Where,
    a: Annotated[str, typer.Argument(metavar="A", help="The one.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.", show_default=False)],
    other: Annotated[
        str | None, typer.Option("--other", metavar="WHERE", help="Where B is.", show_default="the same place")
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="Compare the values of all parameters.")] = False,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Compare the values of this state, such as exp_avg. Repeatable.", show_default=False),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what two checkpoints say differently, and with --values how far apart they are.

    Values are read block by block from both, so memory stays small. Exits with 0 whether or not they differ.

    \b
    Examples:
      finetune ckpt diff support-bot 200 newest --values
      finetune ckpt diff runs/a/20250101-120000 200 200 --other runs/b/20250102-090000
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.diff(where, a, b, other, values, state or [], output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def plan(
    where: Where,
    id: Id = None,
    *,
    world: Annotated[int, typer.Option(min=1, metavar="N", help="Processes.", show_default=False)],
    zero_stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="ZeRO stage.", show_default="as it was saved")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Say whether it fits in so much for a process: 40GiB.", show_default=False),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what each process would read to go on at another size. Reads the manifest only.

    \b
    Examples:
      finetune ckpt plan support-bot --world 16
      finetune ckpt plan support-bot 200 --world 8 --zero-stage 2 --memory 60GiB
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.plan(where, id, world, zero_stage, memory, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def export(
    where: Where,
    id: Id = None,
    *,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="A new folder, or a URI.", show_default=False)],
    format: Annotated[
        str, typer.Option(metavar="NAME", help="hf, dcp, deepspeed; of an unknown one all are named.")
    ] = "hf",
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default="the format's own")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file of weights.", show_default="5GB")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters into their base: a whole model.")] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the base model is.", show_default="where the checkpoint says"),
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="Which model, of a method that trains several.", show_default="model")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write a checkpoint for others to open: weights are streamed, never gathered, and verified on the way.

    \b
    Examples:
      finetune ckpt export support-bot --to ./model
      finetune ckpt export s3://team-a/jobs/support-bot/checkpoints 200 --to ./merged --merge --dtype bf16
    """
    from finetune_client.cli.ckpt import verbs

    options = {"format": format, "dtype": dtype.value if dtype else None, "merge": merge, "base": base, "role": role}
    raise typer.Exit(verbs.export(where, id, to, options, max_shard_size, output is Output.JSON))


@ckpt.command("import", epilog=CKPT_EPILOG)
def import_(
    where: Annotated[
        str,
        typer.Argument(metavar="WHERE", help="Where it goes; a new folder or prefix too.", show_default=False),
    ],
    *,
    source: Annotated[
        Path, typer.Option("--from", metavar="FOLDER", help="The other program's checkpoint.", show_default=False)
    ],
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="dcp or deepspeed.", show_default="told by the files")
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--for",
            metavar="PLAN",
            help="The job that is to go on from it, which says what the options below can: a run's folder, or what"
            " finetune plan -o json prints.",
            show_default="the run's own, where WHERE is one",
        ),
    ] = None,
    job: Annotated[
        str | None, typer.Option(metavar="ID", help="The job's uid, or namespace/name on a laptop.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The base model: a folder or URI.", show_default=False),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sequences in an optimizer step.", show_default=False)
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Steps done.", show_default="as the checkpoint says")
    ] = None,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="What stands before parameters' names there.", show_default="found out")
    ] = "",
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pickles, of which only harmless classes are built."),
    ] = False,
    take_over: TakeOver = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a checkpoint of torch DCP or DeepSpeed one of ours, which a training goes on from.

    Weights, AdamW's moments and step counts come along; the order of the data is the job's own. It is the newest there
    from then on. A format that consists of pickles is read only with --allow-pickle, and nothing in it is executed.

    \b
    Examples:
      finetune ckpt import s3://team-a/jobs/support-bot/checkpoints --from ./ds --for plan.json --allow-pickle
      finetune ckpt import ./imported --from ./dcp --base ./Qwen3-8B --job default/support-bot --global-batch 128
    """
    from finetune_client.cli.ckpt import verbs

    said = {
        "format": format,
        "job": job,
        "base": base if base is None or "://" in base else str(Path(base).absolute()),
        "global_batch": global_batch,
        "step": step,
        "prefix": prefix or None,
        "allow_pickle": allow_pickle,
    }
    raise typer.Exit(verbs.import_(where, source, plan_file, said, take_over, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def gc(
    where: Where,
    keep_last: KeepLast = None,
    keep_every: KeepEvery = None,
    keep_best: KeepBest = None,
    quota: Quota = None,
    drop_others: Annotated[
        bool, typer.Option("--drop-others", help="Delete what other trainings than the newest one saved.")
    ] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    take_over: TakeOver = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Delete what no rule keeps, what was never completed, and shared files that nothing refers to.

    The newest whole checkpoint and pinned ones stay, whatever the rules. Rules are the job's where it is known. A job
    that was deleted and made again, and one whose data changed, is another training: rules are applied to each alone,
    and the newest of each stays unless you say --drop-others. While a
    run seems to be at work nothing is deleted: that is, while its folder is in use, or until its last sign of life (its
    start, or the begin of a save) is an hour old, or three times its longest pause between saves.

    \b
    Examples:
      finetune ckpt gc support-bot --dry-run
      finetune ckpt gc s3://team-a/jobs/support-bot/checkpoints --keep-last 1 --keep-best eval_loss --yes
    """
    from finetune_client.cli.ckpt import verbs

    keeping = verbs.Keeping(keep_last, keep_every, keep_best, quota, drop_others)
    raise typer.Exit(verbs.gc(where, keeping, dry_run, yes, take_over, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def repair(
    where: Where, dry_run: DryRun = False, take_over: TakeOver = False, output: OutputOption = Output.TEXT
) -> None:
    """Put things in order: publish what only lacks its manifest, close what never can be finished, mend documents.

    Nothing that could be data is moved, changed or deleted. Intent, receipts and manifest follow from one another, and
    a damaged one is written again; damaged weights are reported. A run at work is left alone, as by gc.

    \b
    Examples:
      finetune ckpt repair support-bot --dry-run
      finetune ckpt repair s3://team-a/jobs/support-bot/checkpoints
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.repair(where, dry_run, take_over, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def pin(
    where: Where,
    id: Id = None,
    reason: Annotated[str, typer.Option(help="For those who wonder later.", show_default=False)] = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Keep a checkpoint until it is unpinned: no rule, no quota and no sweep of a run deletes it.

    \b
    Examples:
      finetune ckpt pin support-bot --reason "the one in the paper"
      finetune ckpt pin s3://team-a/jobs/support-bot/checkpoints 200
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.pin(where, id, reason, output is Output.JSON))


@ckpt.command(epilog=CKPT_EPILOG)
def unpin(
    where: Where,
    id: Annotated[str, typer.Argument(metavar="ID", help="Which one: 200, 200-e1.", show_default=False)],
    output: OutputOption = Output.TEXT,
) -> None:
    """Leave a checkpoint to the rules again.

    \b
    Examples:
      finetune ckpt unpin support-bot 200
      finetune ckpt unpin s3://team-a/jobs/support-bot/checkpoints 200-e1
    """
    from finetune_client.cli.ckpt import verbs

    raise typer.Exit(verbs.unpin(where, id, output is Output.JSON))
