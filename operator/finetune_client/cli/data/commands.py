"""The command line of `finetune data`: names, options and help. Imports nothing that takes time; what a command does is
in `verbs`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_client.cli.exits import DATA_EPILOG
from finetune_client.cli.options import Output, OutputOption

__all__ = ["data"]

data = typer.Typer(
    help="Make preference data: from people's judgements, by an AI judge, and the answers that are compared.\n\n"
    "SOURCE is a file, a folder or a glob of jsonl, json, csv or parquet files, or a URI (file, pvc, package, hf). Rows"
    " are written to a new .jsonl file that jobs read as it is, and what they were made of to FILE.provenance.\n\n"
    "\b\n"
    "Examples:\n"
    "  finetune data candidates prompts.jsonl --model runs/support-bot/20250101-120000 --to answers.jsonl\n"
    "  finetune data judge answers.jsonl --url https://llm.example.com/v1 --model big --key-env KEY --to prefs.jsonl\n"
    "  finetune data import ratings.csv --to prefs.jsonl --min-gap 1",
    epilog=DATA_EPILOG,
    no_args_is_help=True,
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Files or URI with the rows.", show_default=False)]
To = Annotated[Path, typer.Option(metavar="FILE", help="New .jsonl file for the rows.", show_default=False)]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=COLUMN", help="What a column is called in the data: prompt=question. Repeatable."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over the file that is there.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]


class LayoutOption(StrEnum):
    """How judgements are laid out."""

    AUTO = "auto"
    PAIRS = "pairs"
    RATINGS = "ratings"
    RANKINGS = "rankings"


class PairingOption(StrEnum):
    """Which answers become pairs."""

    ALL = "all"
    ADJACENT = "adjacent"
    BEST_WORST = "best-worst"


class FormOption(StrEnum):
    """What is written."""

    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired-preference"


class WritingOption(StrEnum):
    """How answers are found."""

    SAMPLE = "sample"
    BEAM = "beam"


@data.command("import", epilog=DATA_EPILOG)
def import_(
    source: Source,
    to: To,
    layout: Annotated[LayoutOption, typer.Option(help="auto tells it from the first row's columns.")] = (
        LayoutOption.AUTO
    ),
    form: Annotated[
        FormOption, typer.Option("--as", help="Pairs for reward, dpo and orpo, or good and bad answers for kto.")
    ] = FormOption.PREFERENCE,
    pairs: Annotated[
        PairingOption, typer.Option(help="Each answer with each, with the next worse one, or the best with the worst.")
    ] = PairingOption.ALL,
    min_gap: Annotated[
        float, typer.Option(min=0, help="Answers nearer than that (ratings, places, margins) are a tie.")
    ] = 0.0,
    margins: Annotated[bool, typer.Option("--margins", help="Write differences of ratings as margins.")] = False,
    good_from: Annotated[
        float | None, typer.Option(help="For kto: answers rated so or higher are good.", show_default=False)
    ] = None,
    bad_to: Annotated[
        float | None, typer.Option(help="For kto: answers rated so or lower are bad.", show_default=False)
    ] = None,
    column: ColumnOption = None,
    overwrite: Overwrite = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Bring in what people have judged: pairs, ratings or rankings.

    Pairs have chosen and rejected, and margin where it is known. Ratings have answers and ratings, two lists, or answer
    and rating, a row for each; an answer that was rated several times has the mean. Rankings have answers, the best
    first, and ranks where some share a place. Ties are counted and left out, and so are judgements that contradict one
    another.

    \b
    Examples:
      finetune data import ratings.csv --to prefs.jsonl --min-gap 1 --margins
      finetune data import ratings.jsonl --to kto.jsonl --as unpaired-preference --good-from 4 --bad-to 2
      finetune data import rankings.jsonl --to prefs.jsonl --pairs adjacent --column prompt=question -o json
    """
    from finetune_client.cli.data import verbs

    options = {
        "layout": layout.value,
        "form": form.value,
        "pairing": pairs.value,
        "min_gap": min_gap,
        "margins": margins,
        "good_from": good_from,
        "bad_to": bad_to,
        "overwrite": overwrite,
    }
    raise typer.Exit(verbs.import_(source, to, column or [], options, output is Output.JSON))


@data.command(epilog=DATA_EPILOG)
def judge(
    source: Source,
    to: To,
    url: Annotated[
        str, typer.Option(help="OpenAI-compatible service: https://host/v1, as vLLM serves it.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="The judge, as the service calls it.", show_default=False)],
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the service's key.", show_default=False),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What the judge is to look at, in place of our own.", show_default=False),
    ] = None,
    pairs_per_row: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many pairs of a row's answers, drawn by --seed.", show_default="all"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="The judge's.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of the judge.")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 8,
    retries: Annotated[int, typer.Option(min=0, max=20, help="Further attempts at each request.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that one request may take.")] = 120.0,
    seed: Seed = 0,
    column: ColumnOption = None,
    overwrite: Overwrite = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a model judge which of two answers is better, twice, with the answers swapped.

    Rows have answers, a list as `finetune data candidates` writes it, or chosen and rejected, which are judged anew. A
    verdict that changes with the order is a tie. Every verdict is kept in FILE.verdicts as soon as it is there: the
    same command goes on where it was stopped, and asks nothing twice.

    \b
    Examples:
      finetune data judge answers.jsonl --url http://localhost:8000/v1 --model big --to prefs.jsonl
      finetune data judge people.jsonl --url https://llm.example.com/v1 --model big --key-env KEY --to ai.jsonl -o json
    """
    from finetune_client.cli.data import verbs

    options = {
        "url": url,
        "model": model,
        "key_env": key_env,
        "pairs_per_row": pairs_per_row,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "concurrency": concurrency,
        "retries": retries,
        "timeout_seconds": timeout,
        "seed": seed,
        "overwrite": overwrite,
    }
    raise typer.Exit(verbs.judge(source, to, column or [], instructions, options, output is Output.JSON))


@data.command(epilog=DATA_EPILOG)
def candidates(
    source: Source,
    to: To,
    model: Annotated[
        str,
        typer.Option(
            metavar="WHERE", help="A run's folder, an artifact's, a model's, a GGUF file, or a URI.", show_default=False
        ),
    ],
    num: Annotated[int, typer.Option("--num", "-n", min=2, max=1024, help="Answers to each prompt.")] = 4,
    by: Annotated[WritingOption, typer.Option(help="Drawn from the model, or its likeliest.")] = WritingOption.SAMPLE,
    temperature: Annotated[float, typer.Option(min=0.01, max=10, help="Of samples.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Of samples.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of samples; 0: all.")] = 0,
    beams: Annotated[
        int | None, typer.Option(min=2, max=1024, help="Width of the search.", show_default="as answers")
    ] = None,
    length_penalty: Annotated[float, typer.Option(help="Of beams; above 0 longer answers are favoured.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=131_072, help="Longest answer.")] = 256,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Answers written at once.")] = 64,
    seed: Seed = 0,
    column: ColumnOption = None,
    overwrite: Overwrite = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a model write several answers to each prompt, to be judged.

    Rows have prompt, text or messages, and system where there is one; all other columns are kept. Answers that are
    alike are written once, and a prompt with fewer than two is left out.

    \b
    Examples:
      finetune data candidates prompts.jsonl --model runs/support-bot/20250101-120000 --to answers.jsonl
      finetune data candidates prompts.jsonl --model ./model --by beam --beams 8 -n 4 --to answers.jsonl -o json
    """
    from finetune_client.cli.data import verbs

    options = {
        "num": num,
        "method": by.value,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": beams,
        "length_penalty": length_penalty,
        "max_new_tokens": max_new_tokens,
        "max_rows": max_rows,
        "batch_size": batch_size,
        "seed": seed,
        "overwrite": overwrite,
    }
    raise typer.Exit(verbs.candidates(source, to, column or [], model, options, output is Output.JSON))
