"""``neulig-fast bench``: how fast the ops are on this machine, and how fast they could be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._errors import INTERRUPTED, reported

_FIGURES = (".svg", ".png", ".pdf")

_Ops = Annotated[list[str] | None, typer.Argument(metavar="OP", help="Default: every op.")]
_Shapes = Annotated[
    str, typer.Option(help="Comma-separated; default: ViT-B-32. An unknown one lists all.")
]
_Dtypes = Annotated[str, typer.Option(help="Comma-separated: fp32, bf16; default: both.")]
_Providers = Annotated[
    str, typer.Option(help="Comma-separated parts of names: 'cpu,compile'; default: all.")
]
_Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="Default: the GPU if there is one.")
]
_Json = Annotated[Path | None, typer.Option(help="Write the rows to this file.")]
_Plot = Annotated[
    Path | None, typer.Option(help="Draw a roofline into this file (.svg, .png, .pdf).")
]
_Full = Annotated[
    bool, typer.Option("--full", help="Every number of experts and outputs: takes long.")
]
_Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes: about a minute.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    ops: _Ops = None,
    shapes: _Shapes = "",
    dtype: _Dtypes = "",
    providers: _Providers = "",
    device: _Device = None,
    json: _Json = None,
    plot: _Plot = None,
    full: _Full = False,
    quick: _Quick = False,
) -> None:
    """Measure this machine's limits, then every op and the other ways to compute it.

    Every result is checked first; a wrong one gets no speed-up. Ctrl-C keeps the finished rows.
    """
    with reported():
        _check_files(json, plot)
        from ..benchmarks import machine, session

        where = device or machine.devices(None)[-1]
        chosen = session.chosen_ops(ops or [])
        words = {"shapes": shapes, "dtypes": dtype, "providers": providers}
        lists = {name: _words(text) for name, text in words.items()}
        selection = session.choose(chosen, where, **lists, quick=quick, full=full)
        machine.start_over_with_warm_malloc()
        rows, interrupted = session.measure(chosen, where, selection)
        session.write(rows, json, plot)
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
