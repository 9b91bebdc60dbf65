"""What merges may use, and that too little is found before anything is written."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neulig_fast as nf
from neulig_fast import _native
from neulig_fast.checkpoints import merging, pipeline, resources, tiles, workspace
from neulig_fast.checkpoints.headers import Entry
from neulig_fast.checkpoints.layout import Output
from neulig_fast.checkpoints.plan import Planned
from neulig_fast.checkpoints.prepared import prepare
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
    tensors = prepare(config)[0].plan.tensors
    slow = resources.in_pytorch(torch.device("cpu"))
    formulas = max(workspace.beside_bytes(tensor, slow) for tensor in tensors)
    threads = (64 << 20) // (needed + resources.THREAD + formulas) + 1
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


def gpus(count: int) -> tuple[torch.device, ...]:
    return tuple(torch.device(f"cuda:{k}") for k in range(count))


def test_threads_are_dealt_round_to_gpus() -> None:
    found = Resources(5, 100, gpus(2), 1200)
    assert [found.device(k).index for k in range(5)] == [0, 1, 0, 1, 0]
    assert found.device_share == 1200 // 3 // 2  # three threads have the first
    assert Resources(5, 100).device_share is None
    assert {Resources(5, 100).device(k).type for k in range(5)} == {"cpu"}


@pytest.mark.parametrize(
    ("asked", "count", "threads", "wanted"),
    [
        ("auto", 0, None, "auto"),
        ("cuda", 0, None, "cuda"),
        ("cpu", 4, None, "cpu"),
        ("auto", 2, None, "cuda:0 cuda:1"),
        ("cuda", 3, 2, "cuda:0 cuda:1"),
        ("cuda:1", 3, 8, "cuda:1"),
        ("cuda:2, cuda:0", 3, 2, "cuda:2 cuda:0"),
    ],
)
def test_devices_by_name(asked: str, count: int, threads: int | None, wanted: str) -> None:
    assert resources.device_names(asked, count, threads) == wanted.split()


def test_lists_of_devices_that_cannot_be() -> None:
    said = "device must list different GPUs, as cuda:0,cuda:1, got "
    for asked in ("cuda:0,cpu", "cuda:0,cuda:0", "cuda:0,", "cuda,cuda:1"):
        assert said in refusal(lambda asked=asked: resources.device_names(asked, 2))
    text = refusal(lambda: resources.device_names("cuda:0,cuda:0,cuda:1", 2, 2))
    assert said in text and "lists 3 GPUs, each needs a thread: threads is 2" in text


def test_the_ceiling_of_gpus() -> None:
    free = {"cuda:0": 1000 << 20, "cuda:1": 500 << 20}
    assert resources.vram_of(None, free) == 400 << 20
    assert resources.vram_of(500 << 20, free) == 500 << 20
    text = refusal(lambda: resources.vram_of(501 << 20, free))
    assert text == "merge: max_vram is 501 MiB, cuda:1 has 500 MiB free"
    if not torch.cuda.is_available():
        text = refusal(lambda: resources.asked_for("1G", "cpu", 1, "1G"))
        assert "max_vram is of GPUs, the device is cpu" in text


def test_tiles_shrink_to_what_a_gpu_has() -> None:
    one = planned("a", 5 * BLOCK + 1)
    block = 16 * BLOCK  # a row and a result in fp32, twice
    assert workspace.least_device_bytes(one) == block
    assert workspace.device_elements(one, 2 * block - 1) == BLOCK
    assert workspace.device_elements(one, 2 * block) == 2 * BLOCK
    assert workspace.device_elements(one, 1 << 30) == 5 * BLOCK + 1
    with pytest.raises(ValueError, match=f"'a' needs {block}"):
        workspace.device_elements(one, block - 1)
    little = Resources(4, 1 << 30, gpus(2), 4 * block - 1)
    text = refusal(lambda: resources.check_memory([one], little))
    assert "'a' needs 1 MiB for a thread's tile on a GPU" in text
    enough = int(re.findall(r"max_vram at least (\d+)M", text)[0]) << 20
    resources.check_memory([one], little._replace(vram=enough))
    resources.check_memory([one], little._replace(vram=4 * block))
    both = refusal(lambda: resources.check_memory([one], little._replace(memory=4)))
    assert "2 problems" in both


def test_the_tiles_of_a_merge_are_the_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, told that its memory is a GPU's: the same bytes, from tiles of a block."""
    config = two_models(tmp_path, large=(3, BLOCK))
    nf.merge(config, tmp_path / "whole")
    asked: list[int] = []

    def spy(one: Planned, memory: int) -> int:
        asked.append(memory)
        return workspace.device_elements(one, memory)

    monkeypatch.setattr(tiles, "device_elements", spy)
    monkeypatch.setattr(Resources, "device_share", 2 * BLOCK * (4 + 4 + 2))
    nf.merge(config, tmp_path / "tiles", threads=1)
    assert asked == [2 * BLOCK * (4 + 4 + 2)]
    whole, parts = (llamas.load(tmp_path / name)["large"] for name in ("whole", "tiles"))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("elements", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 1])
def test_least_bytes_are_just_enough_for_a_tile(elements: int) -> None:
    one = planned("a", elements)
    least = workspace.least_bytes(one)
    assert workspace.tile_elements(one, least) == max(min(elements, BLOCK), 1)
    with pytest.raises(ValueError, match=f"'a' needs {least}"):
        workspace.tile_elements(one, least - 8)


def test_an_interrupt_leaves_torchs_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llamas.family(tmp_path, 1)

    def interrupted(working: Any, **_: Any) -> None:
        for future in working:
            future.exception()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "wait", interrupted)
    before = torch.get_num_threads()
    seen: list[int] = []
    torch.set_num_threads(3)
    try:
        config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "m0")}]}
        with pytest.raises(KeyboardInterrupt):
            nf.merge(config, tmp_path / "out", threads=2)
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert (torch.get_num_threads(), seen) == (3, [3])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("backend", "most"), [("torch", BLOCK), ("cpu", 1 << 19)])
def test_formulas_in_pytorch_see_a_block_at_a_time(backend: str, most: int) -> None:
    if backend == "cpu" and not _native.has("merge_task_vectors", "CPU"):
        pytest.skip("without the extension there is nothing to force")
    with nf.use_backend(merge_task_vectors=backend):
        assert tiles._streamed(torch.device("cpu")) == most
