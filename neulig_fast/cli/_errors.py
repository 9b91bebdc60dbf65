"""How a command ends when something is wrong: a message, an exit code, no traceback."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import typer

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


@contextlib.contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Turn bad input into a message on stderr and exit code 2, Ctrl-C into 130.

    ``ValueError`` and ``OSError`` are what every check of this package raises; anything else is a
    bug and keeps its traceback.

    Args:
        resume: what to tell the user after Ctrl-C, or when the disk is full.
    """
    advice = f"; {resume}" if resume else ""
    try:
        yield
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        typer.echo(f"error: {_told(error)}{advice if full else ''}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted{advice}", err=True)
        raise typer.Exit(INTERRUPTED) from error


def _told(error: Exception) -> str:
    """``[Errno 2] No such file ...: 'x'`` becomes ``x: No such file ...``."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error)
