"""``neulig-fast align CONFIG.yaml``: experts of different origin, made alike for merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import INTERRUPTED, reported


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(align)


def align(
    config: Annotated[Path, typer.Argument(help="A YAML file; docs/align.md describes it.")],
) -> None:
    """Align experts of different origin: write them in a common order of units, and their merge.

    Ctrl-C while it matches ends the search: the best until then is written.
    """
    with reported("no file is half written: repeat the command"):
        from ..align_config import load_config
        from ..align_run import run

        finished = run(load_config(config), lambda line: typer.echo(line, err=True))
        typer.echo(finished.text)
        if finished.interrupted:
            raise typer.Exit(INTERRUPTED)
