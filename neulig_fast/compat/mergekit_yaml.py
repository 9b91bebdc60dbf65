"""``nf-mergekit-yaml``: mergekit's own command under ``nf.patch("mergekit")``."""

from __future__ import annotations

import importlib
import sys

from . import patch


def main() -> None:
    """As ``mergekit-yaml``, with all its arguments; exits with a sentence without mergekit."""
    try:
        handle = patch("mergekit")
    except ImportError as error:
        sys.exit(f"nf-mergekit-yaml: {error}")
    with handle:
        importlib.import_module("mergekit.scripts.run_yaml").main(prog_name="nf-mergekit-yaml")
