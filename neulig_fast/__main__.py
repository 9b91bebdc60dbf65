"""``python -m neulig_fast`` is the program ``neulig-fast``."""

from .cli import main

main()
