"""Running merged models: one for a whole batch, or exactly one per image.

A merged model is a row of the pool's layout, theta_w = sum_i w_i theta_i. ``torch.func`` runs the
template with that row's tensors in place of its own, so nothing is copied into a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import batchnorm as bn
from .encoder import evaluating, run

if TYPE_CHECKING:
    from ..pool import ExpertPool

# Bytes of merged parameters that per_sample holds at a time; on the CPU they should stay in cache.
CHUNK_BYTES = {"cpu": 32 * 2**20}
CHUNK_BYTES_DEVICE = 2**30


def state_features(
    pool: ExpertPool, state: Mapping[str, Tensor], images: Tensor, batchnorm: str = "blend"
) -> Tensor:
    """(B, D) features of one merged model."""
    template = runnable(pool)
    with bn.inference(pool, batchnorm):
        return run(template, state, bn.as_input(pool, images))


def runnable(pool: ExpertPool) -> nn.Module:
    """The pool's template. ValueError when it has none: there is no code to run."""
    if pool.template is None:
        raise ValueError(
            "merged models: the pool has no template module to run; give ExpertPool or "
            "NeuLig.load a template="
        )
    return pool.template


def per_sample_features(
    pool: ExpertPool,
    images: Tensor,
    coopvec: Tensor,
    batchnorm: str = "blend",
    chunk: int | None = None,
) -> Tensor:
    """(B, D): image b through its own merged model sum_i coopvec[b, i] theta_i. Exact.

    ``chunk`` merged models at a time are blended and run side by side with ``torch.func.vmap``;
    a chunk of one runs without it, for encoders that vmap cannot batch.

    Raises:
        ValueError: an encoder that vmap cannot batch.
    """
    chunk = chunk or default_chunk(pool)
    images = bn.as_input(pool, images)
    pieces = []
    template = runnable(pool)
    with evaluating(template):
        for some, weights in zip(images.split(chunk), coopvec.split(chunk), strict=True):
            rows = bn.blended_rows(pool, weights, batchnorm)
            if chunk == 1:
                pieces.append(run(template, pool.row_state_dict(rows[0]), some))
            else:
                pieces.append(_side_by_side(pool, rows, some))
    return torch.cat(pieces)


def default_chunk(pool: ExpertPool) -> int:
    """Merged models to hold at a time: as many as fit :data:`CHUNK_BYTES`, at least one."""
    limit = CHUNK_BYTES.get(pool.params.device.type, CHUNK_BYTES_DEVICE)
    return max(1, limit // (pool.params.shape[1] * pool.params.element_size()))


def chunk_faults(chunk: Any) -> list[str]:
    """What is wrong with a ``chunk`` that a caller gave."""
    if chunk is None or (isinstance(chunk, int) and chunk >= 1):
        return []
    return [f"chunk must be a positive integer or None, got {chunk!r}"]


def _side_by_side(pool: ExpertPool, rows: Tensor, images: Tensor) -> Tensor:
    """Features of image k under the model in ``rows[k]``, for all k at once."""
    template = runnable(pool)

    def one(row: Tensor, image: Tensor) -> Tensor:
        return run(template, pool.row_state_dict(row), image[None])[0]

    try:
        with _batchable_attention():
            return vmap(one)(rows, images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        run(template, pool.row_state_dict(rows[0]), images[:1])  # may fail by itself: then that
        raise ValueError(
            "per_sample: torch.func.vmap cannot run this encoder for several merged models at "
            f"once; pass chunk=1 to run them one at a time ({error})"
        ) from error


@contextlib.contextmanager
def _batchable_attention() -> Iterator[None]:
    """Attention by plain matrix products: the fused kernels have no batching rule under vmap.

    Without this torch runs them sample by sample and warns.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
