"""The k largest numbers of each row, in order, and where they are; of equal ones the first counts as larger.

Where there is no kernel, a tournament finds them on a GPU without sorting the row. Cut the row into groups: the k
largest lie in the k groups with the largest maxima, since each of those has a number that beats all of any other group.
So each round keeps k groups and cuts them more finely. Ranks come from comparing all pairs: a million comparisons are
nothing to a GPU, and a round is three small kernels, all of which a command buffer can hold.

Layouts: x [B, V]; the results [B, k].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.implementation import dispatch

_GROUPS, _GROUPS_OF_MANY = 1024, 512  # about so many of a row are ranked at a time
_MANY = 8  # rows from which on comparisons cost more than another round of kernels


def reference(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The op by `lax.top_k`, which is quick on a CPU and sorts the whole row on a GPU."""
    # Without the barrier XLA merges later slices into the top-k and turns it back into a sort on a CPU too.
    values, ids = lax.optimization_barrier(lax.top_k(x, k))
    return jnp.where(jnp.isnan(x).any(axis=-1, keepdims=True), jnp.nan, values), ids


def tournament(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The op in rounds, for a GPU."""
    ids: jax.Array | None = None  # the places themselves
    nan: jax.Array | None = None  # whether there is one in each group of the first round: XLA's maxima may pass over it
    most = _GROUPS if x.shape[0] < _MANY else _GROUPS_OF_MANY
    while (size := x.shape[1]) > most * 3 // 2:
        group = 1 << ((size // most).bit_length() - 1)
        x = _cut(x, group, -jnp.inf)
        # Padded numbers that count up would be a constant of the row's size.
        ids = _count(x) if ids is None else _cut(ids, group, jnp.iinfo(jnp.int32).max)
        nan = jnp.isnan(x).any(axis=-1) if nan is None else nan
        best = _order(jnp.max(x, axis=-1), ids[..., 0], k)[..., None]
        x, ids = (jnp.take_along_axis(a, best, axis=1, mode="clip").reshape(a.shape[0], -1) for a in (x, ids))
    if ids is None:
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    best = _order(x, ids, k)
    values, ids = (jnp.take_along_axis(a, best, axis=1, mode="clip") for a in (x, ids))
    nan = jnp.isnan(x) if nan is None else nan
    return jnp.where(nan.any(axis=-1, keepdims=True), jnp.nan, values), ids


def _cut(x: jax.Array, group: int, filling: float) -> jax.Array:
    """Rows [B, C] in groups [B, any, group], padded."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % group)), constant_values=filling).reshape(x.shape[0], -1, group)


def _count(x: jax.Array) -> jax.Array:
    """The places in a row of x [B, groups, group]."""
    group = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return group * x.shape[2] + lax.broadcasted_iota(jnp.int32, x.shape, 2)


def _order(x: jax.Array, ids: jax.Array, k: int) -> jax.Array:
    """Where in a row [B, C] the k largest are, int32 [B, k], in order; of equal ones the lower id first."""
    larger = x[:, None, :] > x[:, :, None]
    before = (x[:, None, :] == x[:, :, None]) & (ids[:, None, :] < ids[:, :, None])
    rank = jnp.sum(larger | before, axis=-1, dtype=jnp.int32)
    here = rank[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]
    return jnp.sum(jnp.where(here, lax.broadcasted_iota(jnp.int32, here.shape, 2), 0), axis=-1, dtype=jnp.int32)


def _xla(x: jax.Array, k: int, known: int) -> tuple[jax.Array, jax.Array]:
    if known < x.shape[1]:
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < known, x, -jnp.inf)
    op = tournament if k <= _GROUPS_OF_MANY // 2 else reference  # a round must leave more groups than it keeps
    return lax.platform_dependent(x, cuda=lambda x: op(x, k), default=lambda x: reference(x, k))


def _mosaic_gpu(x: jax.Array, k: int, known: int) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.mosaic_gpu import top_k as kernel

    return kernel.top_k(x, k, known)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": _xla}


def top_k(
    x: jax.Array, k: int, *, known: int | None = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Find the k largest numbers of each row.

    Args:
      x: float32 [B, V].
      k: 1 to V.
      known: k to V; numbers from there on do not count. None: all count.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      Their values, float32 [B, k], the largest first, and their places, int32 [B, k]. The first value of a row that has
      a NaN is a NaN, and the rest of it means nothing.
    """
    return dispatch("top_k", IMPLEMENTATIONS, implementation, x, k, x.shape[1] if known is None else known)
