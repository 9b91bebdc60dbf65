"""``neulig-fast verify FOLDER``: whether a merged checkpoint is whole, and what it is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import reported

Folder = Annotated[Path, typer.Argument(help="What `neulig-fast merge` wrote.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(verify)


def verify(folder: Folder, quiet: Quiet = False) -> None:
    """Read a merged checkpoint and compare all its bytes with the checksums of its merge."""
    with reported():
        from ..checkpoints import report, sizes
        from ..checkpoints.manifest import verify as verified

        with report.progress_bar(quiet) as shown:
            manifest = verified(folder, shown.advance if shown else None)
        models = ", ".join(manifest.recipe["models"])
        seed = f", seed {manifest.recipe['seed']}" if manifest.recipe.get("seed") else ""
        typer.echo(
            f"{folder}: {len(manifest.tensors)} tensors, {sizes.text(manifest.bytes)}, all as "
            f"written by neulig-fast {manifest.version}\n"
            f"{manifest.recipe['method']} of {models}{seed}"
        )
