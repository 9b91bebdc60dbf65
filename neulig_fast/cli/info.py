"""``neulig-fast info``: what runs here, and why something does not."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(info)


def info() -> None:
    """Show which backend every op uses on this machine, and why the others do not run."""
    from .. import show_backends

    show_backends()
