"""The `finetune` command.

One module per command; `app` holds the command line itself. Modules are imported when their command runs, so that
`finetune --help` is quick.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the `finetune` script."""
    from finetune_client.cli.app import app

    app(prog_name="finetune")
