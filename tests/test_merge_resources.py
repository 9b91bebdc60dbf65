"""What merges may use, and that too little is found before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neulig_fast as nf
from neulig_fast.checkpoints import merging, resources, workspace
from neulig_fast.checkpoints.headers import Entry
from neulig_fast.checkpoints.layout import Output
from neulig_fast.checkpoints.plan import Planned
from neulig_fast.checkpoints.resources import Resources
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK


def two_models(folder: Path, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """A recipe of two models, the second in fp32."""
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        g = torch.Generator().manual_seed(i)
        state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        llamas.write(folder / f"m{i}", state, dtype, shards=1)
    models = [{"model": str(folder / f"m{i}"), "parameters": {"weight": 1}} for i in range(2)]
    return {"merge_method": "linear", "models": models}


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


def test_too_little_memory_for_a_thread_is_found_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = two_models(tmp_path, small=(9,), large=(3, BLOCK))
    # Of each element two rows in fp32, the result and what is converted in bf16.
    needed = BLOCK * (4 + 4 + 2 + 2) + 4 * 128
    threads = (64 << 20) // needed + 1
    options: dict[str, Any] = {"max_ram": "128M", "threads": threads}
    text = refusal(lambda: nf.merge(config, tmp_path / "out", **options))
    assert "merge: 'large' needs 768 KiB of memory in a thread" in text
    assert f"to each of {threads}: threads must be at most {threads - 1}, or max_ram" in text
    assert not (tmp_path / "out").exists()
    assert refusal(lambda: merging.foresee(config, tmp_path / "out", **options)) == text
    # Both of what it says is enough, and no less is.
    advised = re.search(r"max_ram at least (\d+)M", text)
    assert advised is not None
    least = int(advised[1])
    options["max_ram"] = f"{least - 1}M"
    assert "'large' needs" in refusal(lambda: merging.foresee(config, tmp_path / "out", **options))
    options["max_ram"] = f"{least}M"
    merging.foresee(config, tmp_path / "out", **options)
    nf.merge(config, tmp_path / "out", max_ram="128M", threads=threads - 1)


def planned(name: str, elements: int) -> Planned:
    """A tensor in fp32 that one model has."""
    entry = Entry(name, "F32", (elements,), Path("x"), 0, 4 * elements)
    return Planned(None, (entry,), "F32", Output(name, "F32", (elements,)))


def test_fewer_threads_are_advised_only_where_that_helps() -> None:
    tensors = [planned("a", 3), planned("b", 9 * BLOCK), planned("c", BLOCK // 2)]
    least = BLOCK * 8 + 3 * 128
    resources.check_memory(tensors, Resources(2, 2 * least))
    text = refusal(lambda: resources.check_memory(tensors, Resources(3, 2 * least)))
    assert "'b' needs 512 KiB of memory in a thread" in text
    assert "threads must be at most 2, or max_ram at least 66M" in text
    text = refusal(lambda: resources.check_memory(tensors, Resources(1, least - 1)))
    assert text.endswith("to each of 1: max_ram at least 65M")
    resources.check_memory([], Resources(1, 0))


@pytest.mark.parametrize("elements", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 1])
def test_least_bytes_are_just_enough_for_a_tile(elements: int) -> None:
    one = planned("a", elements)
    least = workspace.least_bytes(one)
    assert workspace.tile_elements(one, least) == max(min(elements, BLOCK), 1)
    with pytest.raises(ValueError, match=f"'a' needs {least}"):
        workspace.tile_elements(one, least - 8)
