"""Which machine a row was measured on."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# glibc returns large blocks to the system and gets them back zeroed, page by page. That costs more
# than the arithmetic, on virtual machines ten times more, and would be measured instead of it.
WARM_MALLOC = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.hugetlb=1"
)


def start_over_with_warm_malloc() -> None:
    """malloc reads its settings before main(), so the program starts over with them."""
    if os.environ.get("GLIBC_TUNABLES") != WARM_MALLOC:
        os.environ["GLIBC_TUNABLES"] = WARM_MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def devices(asked: str | None) -> list[str]:
    """``[asked]``, or all there are."""
    return [asked] if asked else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: str) -> str:
    """The processor or GPU, in its maker's words.

    Hosts hide a processor's model: its widest vector instructions tell generations apart.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text() if path.is_file() else "")
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"


def slug(device: str) -> str:
    """The machine's folder under benchmarks/results."""
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def commit() -> str:
    """The commit that was measured, ``+`` when the tree differs from it, ``-`` without git.

    An installed package may lie in somebody else's repository, which says nothing about it.
    """
    if not (ROOT / ".git").exists():
        return "-"

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=10", "HEAD")
    except FileNotFoundError:
        return "-"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head}{'+' if changed else ''}" if head else "-"


def _driver(device: str) -> str:
    if device == "cpu":
        return platform.release()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except FileNotFoundError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def identity(device: str) -> dict[str, str]:
    """The columns that say where and when."""
    return {
        "malloc": "warm" if os.environ.get("GLIBC_TUNABLES") == WARM_MALLOC else "default",
        "device": name(device),
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


@functools.cache
def memory(device: str) -> int:
    """Bytes a case may use: three quarters of what is free when this is first asked.

    The rest is for what malloc cannot reuse.
    """
    return _free(device) * 3 // 4


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", path.read_text() if path.is_file() else "")
    return int(found[1]) * 1024 if found else 8 * 2**30


def has_room(needs: int) -> bool:
    """Whether a call on the CPU can take ``needs`` bytes and leave a quarter of the memory free."""
    return _free("cpu") - needs >= memory("cpu") // 3


@functools.cache
def cache_bytes(device: str) -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text().strip() if path.is_file() else "32768K"
    return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
