"""Checkpoints to try ``neulig-fast merge`` on: a base and three models near it, shaped as Llama's.

python examples/small_models.py models
"""

from pathlib import Path
from typing import Annotated

import typer

from neulig_fast.demo import llamas

Folder = Annotated[Path, typer.Argument(help="For the models, a folder each.")]


def main(folder: Folder = Path("models"), width: int = 256, layers: int = 4) -> None:
    """Write them to FOLDER."""
    models = llamas.family(folder, 3, layers=layers, width=width)
    size = sum(tensor.nbytes for tensor in models["base"].values())
    print(f"{folder}: {', '.join(models)}, {size / 1e6:.0f} MB each")


if __name__ == "__main__":
    typer.run(main)
