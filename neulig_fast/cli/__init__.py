"""The program ``neulig-fast``: every module here that has no leading underscore is a command.

A command's module has a function ``register(app)`` and imports what it needs when it runs, so that
``--help`` stays quick.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import typer

from .. import __version__
from ._errors import INTERRUPTED

app = typer.Typer(
    name="neulig-fast",
    help="Merge fine-tuned networks so that the merge performs like their ensemble.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neulig-fast {__version__}")
        raise typer.Exit


def main() -> None:
    """The program. After Ctrl-C it leaves at once: threads of PyTorch's may still compute, and the
    interpreter's end, which frees what they use, has aborted instead."""
    try:
        app(prog_name="neulig-fast")
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(INTERRUPTED)


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and leave."
    ),
) -> None:
    pass


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if not _module.startswith("_"):
        importlib.import_module(f".{_module}", __name__).register(app)
