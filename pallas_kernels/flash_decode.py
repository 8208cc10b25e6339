"""Attention of a few new queries a row against a long cache, the decode step's share of `flash_attention`.

The maths and layouts are flash_attention's; what differs is what a kernel must be good at: with T of one to eight,
the cache is read once and the work is split along S.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.flash_attention import Rows, Visibility, reference
from pallas_kernels.implementation import dispatch

MAX_QUERIES = 8


def _mosaic_gpu(*args: Any, **options: Any) -> Any:
    from pallas_kernels.mosaic_gpu.flash_decode import flash_decode

    return flash_decode(*args, **options)


def _xla(*args: Any, ordered: bool) -> Any:
    del ordered  # it masks all slots all the same
    return reference(*args)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": _xla}


def flash_decode(
    q: jax.Array,
    k: Rows,
    v: Rows,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    visibility: Visibility = Visibility(),  # noqa: B008 (immutable)
    lse: bool = False,
    ordered: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend from T <= 8 queries a row to a cache; arguments and result as in `flash_attention`.

    Args:
      ordered: the caller's word that slot s holds position s, so that what no query sees can stay unread; static.

    Raises:
      NotImplementedError: for more than 8 queries a row.
    """
    if q.shape[1] > MAX_QUERIES:
        raise NotImplementedError(f"flash_decode takes at most {MAX_QUERIES} queries a row, got {q.shape[1]}")
    return dispatch(
        "flash_decode", IMPLEMENTATIONS, implementation, q, k, v, positions, key_positions, visibility, lse,
        ordered=ordered,
    )  # fmt: skip
