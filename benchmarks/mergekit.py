"""mergekit in a process of its own, which is asked to merge through a pipe."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

_WORKER = """
import sys, yaml, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(int(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    config, out = line.split()
    with open(config) as file:
        config = MergeConfiguration.model_validate(yaml.safe_load(file))
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, quiet=True)
    run_merge(config, out, options)
    print("done", flush=True)
"""


class Mergekit:
    """mergekit in a process of its own."""

    def __init__(self, python: str, threads: int) -> None:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, "-c", _WORKER, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
            cwd=tempfile.gettempdir(),
        )
        self._wait("ready")

    def __call__(self, config: Path, out: Path) -> None:
        if self._process.stdin is None:
            raise RuntimeError("mergekit's process takes no input")
        self._process.stdin.write(f"{config} {out}\n")
        self._process.stdin.flush()
        self._wait("done")

    def _wait(self, word: str) -> None:
        for line in self._process.stdout or ():
            if line.strip() == word:
                return
        raise RuntimeError(f"mergekit's process ended with {self._process.wait()}")
