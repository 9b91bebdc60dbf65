"""The slow way, for any template: experts one after the other, merged models by ``vmap``.

A merged model is a row of the pool's layout, theta_w = sum_i w_i theta_i. ``torch.func`` runs the
template with that row's tensors in place of its own, so nothing is copied into a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .merged_rows import blended_rows
from .template import evaluating, run

if TYPE_CHECKING:
    from ..pool import ExpertPool

# Bytes of merged parameters to hold at a time; on the CPU they should stay in cache.
CHUNK_BYTES = {"cpu": 32 * 2**20}
CHUNK_BYTES_DEVICE = 2**30


def state_features(template: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(B, D) of one model: ``template`` run in eval mode with the tensors of ``state``.

    Where the encoder returns a tuple (pooled, tokens), the first entry counts.

    Raises:
        ValueError: the encoder does not map the batch to (B, D).
    """
    with evaluating(template):
        return run(template, state, images)


def expert_features(pool: ExpertPool, template: nn.Module, images: Tensor) -> Tensor:
    """(N, B, D) of images in the pool's dtype: one expert after the other."""
    states = map(pool.state_dict, range(pool.num_experts))
    return torch.stack([state_features(template, state, images) for state in states])


def mixture_features(
    pool: ExpertPool,
    template: nn.Module,
    images: Tensor,
    coef: Tensor,
    batchnorm: str = "blend",
    chunk: int | None = None,
) -> Tensor:
    """(B, D): image b, in the pool's dtype, through its own merged model. Exact.

    ``chunk`` merged models at a time are blended and run side by side with ``torch.func.vmap``;
    a chunk of one runs without it, for encoders that vmap cannot batch.

    Raises:
        ValueError: an encoder that vmap cannot batch.
    """
    chunk = chunk or default_chunk(pool)
    pieces = []
    with evaluating(template):
        for some, weights in zip(images.split(chunk), coef.split(chunk), strict=True):
            rows = blended_rows(pool, weights, batchnorm)
            if chunk == 1 or not len(some):
                row = rows[0] if len(some) else pool.params[0]
                pieces.append(run(template, pool.row_state_dict(row), some))
            else:
                pieces.append(_side_by_side(pool, template, rows, some))
    return torch.cat(pieces)


def default_chunk(pool: ExpertPool) -> int:
    """Merged models to hold at a time: as many as fit :data:`CHUNK_BYTES`, at least one."""
    limit = CHUNK_BYTES.get(pool.params.device.type, CHUNK_BYTES_DEVICE)
    return max(1, limit // (pool.params.shape[1] * pool.params.element_size()))


def _side_by_side(pool: ExpertPool, template: nn.Module, rows: Tensor, images: Tensor) -> Tensor:
    """Features of image k under the model in ``rows[k]``, for all k at once."""

    def one(row: Tensor, image: Tensor) -> Tensor:
        return run(template, pool.row_state_dict(row), image[None])[0]

    try:
        with batchable_attention():
            return vmap(one)(rows, images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        run(template, pool.row_state_dict(rows[0]), images[:1])  # may fail by itself: then that
        raise ValueError(
            "per_sample: torch.func.vmap cannot run this encoder for several merged models at "
            "once; pass chunk=1 to run them one at a time (merged_forward, evaluate), or write a "
            f"rule for it (neulig_fast.encoders.register) ({error})"
        ) from error


@contextlib.contextmanager
def batchable_attention() -> Iterator[None]:
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
