"""``neulig-fast merge CONFIG.yaml FOLDER``: whole checkpoints, under a ceiling of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import reported

Config = Annotated[Path, typer.Argument(help="A YAML file as mergekit's; see docs/merge.md.")]
Folder = Annotated[Path, typer.Argument(help="For the results; an earlier merge is replaced.")]
MaxRam = Annotated[str, typer.Option(help="Ceiling of memory, such as 512M or 8G.")]
ShardSize = Annotated[str, typer.Option(help="Of each file of weights, at most.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda (all GPUs), or such as cuda:0,cuda:1.")]
MaxVram = Annotated[str | None, typer.Option(help="Of each GPU. Default: 80 % of what is free.")]
Threads = Annotated[int | None, typer.Option(help="Default: as torch uses, or memory is for.")]
Seed = Annotated[int, typer.Option(help="Of methods that drop elements at random.", min=0)]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted merge, or begin anew.")]
CheckInputs = Annotated[bool, typer.Option("--check-inputs", help="Compare checksums first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan, but do not merge.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(merge)


def merge(
    config: Config,
    folder: Folder,
    max_ram: MaxRam = "2G",
    shard_size: ShardSize = "5G",
    device: Device = "auto",
    max_vram: MaxVram = None,
    threads: Threads = None,
    seed: Seed = 0,
    resume: Resume = True,
    check_inputs: CheckInputs = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Merge checkpoints as CONFIG says: safetensors in, safetensors out.

    Everything is checked before a weight is read. Repeating the command goes on with an interrupted
    merge; until it has ended, FOLDER holds what it held before. Several processes share
    the work when torchrun starts them (`torchrun -m neulig_fast merge ...`).
    """
    with reported("what is done is kept: repeat the command to go on from there"):
        from ..checkpoints import merging, report
        from ..checkpoints.ranks import speaks

        options: dict[str, Any] = {
            "max_ram": max_ram,
            "shard_size": shard_size,
            "device": device,
            "max_vram": max_vram,
            "threads": threads,
        }
        with report.progress_bar(quiet or not speaks()) as shown:
            options |= {"check_inputs": check_inputs, "progress": shown.advance if shown else None}
            if dry_run:
                done: object = merging.foresee(config, folder, **options)
            else:
                options |= {"foreseen": shown.foreseen if shown else None, "distributed": True}
                done = merging.merge(config, folder, **options, seed=seed, resume=resume)
        if speaks():
            typer.echo(done)
