"""``neulig-fast train CONFIG.yaml``: NeuLig on the user's own experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import reported


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; docs/train.md describes it.")],
) -> None:
    """Merge your own CLIP experts: train on the tasks of CONFIG, evaluate, write the models.

    Repeating the command resumes an interrupted run.
    """
    with reported("what is done is kept: repeat the command to go on from there"):
        from ..experiment import run
        from ..train_config import load_config

        results = run(load_config(config), lambda line: typer.echo(line, err=True))
        typer.echo(results)
