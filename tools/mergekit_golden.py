"""What mergekit makes of small models: the files in tests/data/mergekit and mergekit_modules.

    python tools/mergekit_golden.py          # in an environment with mergekit 0.1.5

Its dependencies pin versions that this project's tests do not run with, so its results are kept.
Inputs are made anew by the tests, from the same seeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from neulig_fast.demo import llamas, towers

DATA = Path(__file__).resolve().parents[1] / "tests/data"
FAMILIES = {"mergekit": llamas.mergekit_family, "mergekit_modules": towers.mergekit_family}


def main() -> None:
    for recipes, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as name:
            family(Path(name))
            for recipe in sorted((DATA / recipes).glob("*.yml")):
                merge(recipe, Path(name))


def merge(recipe: Path, folder: Path) -> None:
    """Keep mergekit's result of the models in ``folder`` beside its recipe."""
    out = folder / recipe.stem
    command = [Path(sys.executable).parent / "mergekit-yaml", recipe, out]
    options = ["--no-copy-tokenizer", "--lazy-unpickle", "--no-write-model-card", "--quiet"]
    # transformers would take this project's folder of kernels for a package.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, *options], cwd=folder, env=env, check=False)
    if done.returncode:
        print(f"{recipe.name}: mergekit failed")
        return
    state = {}
    for file in sorted(out.glob("*.safetensors")):
        state |= load_file(file)
    save_file(state, recipe.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
