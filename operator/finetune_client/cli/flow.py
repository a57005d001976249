"""Help that is as wide as the terminal: a docstring's line ends are the editor's, and Typer would print them too."""

from __future__ import annotations

import inspect

import typer

__all__ = ["let_flow"]


def let_flow(app: typer.Typer) -> None:
    """For every command of the app and its groups. A paragraph that begins with a backspace, as examples do, stays."""
    for command in app.registered_commands:
        paragraphs = inspect.getdoc(command.callback) or ""
        command.help = "\n\n".join(
            one if one.startswith("\b") else one.replace("\n", " ") for one in paragraphs.split("\n\n")
        )
    for group in app.registered_groups:
        if group.typer_instance is not None:
            let_flow(group.typer_instance)
