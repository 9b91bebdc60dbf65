"""Large pages: asked for where they help, and only there."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from neulig_fast import ExpertPool, _memory, blend
from neulig_fast._registry import OPS

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not THP.exists() or "[never]" in THP.read_text(),
    reason="no transparent large pages here",
)


def asked_for_large_pages(address):
    """Whether the mapping that holds ``address`` is marked so ("hg", for huge)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return "hg" in words
    raise AssertionError("no such mapping")


@needs_large_pages
def test_a_large_fresh_tensor_gets_large_pages():
    # A mapping of its own: an allocator may hand out pages that an earlier tensor asked for.
    tensor = torch.frombuffer(mmap.mmap(-1, _memory.LEAST_BYTES + 12345), dtype=torch.uint8)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert not asked_for_large_pages(middle)
    assert _memory.large_pages(tensor) is tensor
    assert asked_for_large_pages(middle)


@needs_large_pages
def test_an_arena_gets_large_pages():
    pool = ExpertPool([{"a": torch.ones(5_000_000)}, {"a": torch.ones(5_000_000)}])
    assert asked_for_large_pages(pool.params.data_ptr() + pool.params.nbytes // 2)


@needs_large_pages
@pytest.mark.skipif(
    OPS["blend"].why_not("cpu", "cpu") is not None, reason="the C++ extension is not built"
)
def test_a_large_blend_gets_large_pages():
    merged = blend(torch.ones(2), torch.ones(2, 10_000_000))
    assert asked_for_large_pages(merged.data_ptr() + merged.nbytes // 2)


def test_small_tensors_and_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(_memory, "_madvise", lambda: pytest.fail("asked"))
    _memory.large_pages(torch.empty(1000))
    _memory.large_pages(torch.empty(_memory.LEAST_BYTES, dtype=torch.uint8, device="meta"))


def test_a_system_without_the_call_changes_nothing(monkeypatch):
    monkeypatch.setattr(_memory, "_madvise", lambda: None)
    _memory.large_pages(torch.empty(_memory.LEAST_BYTES, dtype=torch.uint8))
