"""``neulig-fast demo``: five experts made on the spot, merged, measured and explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ._errors import reported


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, figures and models.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data, training and Portland.", min=0)] = 0,
    toy: Annotated[bool, typer.Option("--toy", help="In seconds; learns little.")] = False,
) -> None:
    """Make five experts from nothing and merge them; needs no data and no network."""
    with reported():
        from rich.console import Console

        from ..demo.pipeline import run
        from ..demo.settings import DemoSettings

        settings = DemoSettings.toy() if toy else DemoSettings()
        run(out, dataclasses.replace(settings, seed=seed), Console())
