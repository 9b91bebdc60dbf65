"""Large pages for large results on the CPU.

A result of hundreds of megabytes is fresh memory, which the system hands out and zeroes page by
page as it is first written; in 4 KiB pages that takes far longer than a blend.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch

LEAST_BYTES = 1 << 25  # below, a few page faults are not worth a system call
_LARGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, fresh and not yet written; if it is large and on the CPU, Linux is asked to
    back it with large pages. A wish: where the system has none, nothing changes."""
    if tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES:
        return tensor
    advise = _madvise()
    if advise is not None:
        begin = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes - begin) // _LARGE_PAGE * _LARGE_PAGE
        advise(begin, size, _MADV_HUGEPAGE)
    return tensor
