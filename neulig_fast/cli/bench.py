"""``neulig-fast bench``: how fast the ops are on this machine, and how fast they could be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._errors import INTERRUPTED, reported

_FIGURES = (".svg", ".png", ".pdf")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Default: every op.")
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="Comma-separated; default: ViT-B-32. An unknown one lists all.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Comma-separated: fp32, bf16; default: both.")] = "",
    providers: Annotated[
        str, typer.Option(help="Comma-separated parts of names: 'cpu,compile'; default: all.")
    ] = "",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: the GPU if there is one.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a roofline into this file (.svg, .png, .pdf).")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every number of experts and outputs: takes long.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, in seconds.")] = False,
) -> None:
    """Measure this machine's limits, then every op and the other ways to compute it.

    Every result is checked first; a wrong one gets no speed-up. Ctrl-C keeps the finished rows.
    """
    with reported():
        _check_files(json, plot)
        import torch

        from ..benchmarks import harness, session

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = session.chosen_ops(ops or [])
        selection = session.choose(
            chosen,
            device,
            shapes=_words(shapes),
            dtypes=_words(dtype),
            providers=_words(providers),
            quick=quick,
            full=full,
        )
        harness.start_over_with_warm_malloc()
        rows, interrupted = session.measure(chosen, device, selection)
        if json is not None:
            session.write_json(json, rows)
        if plot is not None and rows:
            from ..benchmarks.plot import roofline

            roofline(rows, plot)
        if interrupted:
            typer.echo(f"interrupted: {len(rows)} rows of finished cases are kept", err=True)
            raise typer.Exit(INTERRUPTED)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _check_files(json: Path | None, plot: Path | None) -> None:
    """ValueError for a file that could not be written: said now, not after minutes of work."""
    if plot is not None and plot.suffix not in _FIGURES:
        raise ValueError(f"bench: --plot must end in {', '.join(_FIGURES)}, got {plot}")
    for path in (json, plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"bench: {path} is no file in an existing folder")
