"""``python -m neulig_fast`` is the program ``neulig-fast``."""

from .cli import app

app(prog_name="neulig-fast")
