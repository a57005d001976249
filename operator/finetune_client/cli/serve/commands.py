"""The command line of `finetune serve`: names, options and help. What it does is in `verb`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from finetune_client.cli.exits import SERVE_EPILOG
from finetune_client.cli.jobs.commands import Context, Kubeconfig, Local, Namespace, Ray
from finetune_client.cli.options import Output, OutputOption

__all__ = ["serve"]

serve = typer.Typer()


class Engine(StrEnum):
    """Whose server it is."""

    AUTO = "auto"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


@serve.command(name="serve", epilog=SERVE_EPILOG)
def serve_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="job://NAME, or an artifact: a run's folder, its own, or a URI.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets everybody ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free, and says which.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What programs call the model.", show_default="the job's name, or the folder's"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|URI",
            help="The model that an adapter was trained on, where it has moved.",
            show_default="as the adapter names it",
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="auto is vllm where ROLLOUT_VLLM_PYTHON or the image has it, else transformers.")
    ] = Engine.AUTO,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    ray: Ray = None,
    local: Local = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let programs ask a trained model, by the API that OpenAI's models have: chat/completions, completions, models.

    An adapter is served on the model that it was trained on. Only this one model is there to be asked, and only from
    this machine unless --host says otherwise: there is no password. Of job://NAME the newest run below ./runs is
    meant, and without one the job in the cluster. With -o json one object is printed when the server is ready: url,
    model, engine and the pid that ends it. Ctrl-C ends it.

    \b
    Examples:
      finetune serve job://support-bot
      finetune serve runs/support-bot/20250101-120000 --port 0 -o json
      finetune serve s3://team-a/models/support-bot
      finetune serve ./adapter --base hf://Qwen/Qwen3-8B --name support-bot
    """
    from finetune_client.cli.jobs.verbs import Where
    from finetune_client.cli.serve.verb import Wish, serve_it

    wish = Wish(source, host, port, name, base, engine.value)
    where = Where(namespace, context, kubeconfig, ray, local)
    raise typer.Exit(serve_it(wish, where, output is Output.JSON))
