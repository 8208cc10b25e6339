"""Causal grouped-query attention of a chunk of queries against a cache.

    out[t, n] = sum_s softmax_s(q[t, n] . k[s, n // G] / sqrt(H)) v[s, n // G]      over the visible s

Key s is visible to query t of its row if 0 <= key_positions[s] <= positions[t], and, with a sliding window of W,
key_positions[s] > positions[t] - W: the query's own position counts as one of the W (as Hugging Face's Phi-3).
A query that sees no key gives zeros. Softmax in float32.

Grouped queries: Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245).
Layouts: q and the result [B, T, N, H]; k and v [B, K, S, H], so that a head's keys lie together; N = K G.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.implementation import dispatch


def visible(positions: jax.Array, key_positions: jax.Array, sliding_window: int | None) -> jax.Array:
    """Which keys each query sees: bool [B, T, S] from positions [B, T] and key_positions [B, S]."""
    queries, keys = positions[:, :, None], key_positions[:, None, :]
    mask = (keys >= 0) & (keys <= queries)
    if sliding_window is not None:
        mask &= keys > queries - sliding_window
    return mask


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    sliding_window: int | None = None,
) -> jax.Array:
    """The op in plain JAX. It writes the scores [B, N, T, S] out, so callers keep T to a chunk."""
    batch, length, _, width = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, width)
    # Keys on the left: with queries there, XLA on the CPU transposes the cache and then copies it whole at each step.
    scores = jnp.einsum(
        "bksh,btkgh->bksgt", k, grouped, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ).transpose(0, 1, 3, 4, 2)
    mask = visible(positions, key_positions, sliding_window)[:, None, None]
    scores = jnp.where(mask, scores * width**-0.5, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1)  # [B, K, G, T]
    out = jnp.einsum(
        "bkgts,bksh->btkgh", weights.astype(v.dtype), v, precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    total = jnp.moveaxis(total, 3, 1)[..., None]
    return (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype).reshape(q.shape)


IMPLEMENTATIONS = {"xla": reference}


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attend from a chunk of queries to a cache that already holds the chunk's own keys.

    Args:
      q: [B, T, N, H], bfloat16 or float32.
      k, v: [B, K, S, H], N a multiple of K.
      positions: [B, T] int32, each query's position in its sequence.
      key_positions: [B, S] int32, each cache slot's position, negative where the slot is empty.
      sliding_window: a query sees this many positions, its own included; None: all up to its own.
      implementation: "xla", or None to choose.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    return dispatch(
        "flash_attention", IMPLEMENTATIONS, implementation, q, k, v, positions, key_positions, sliding_window
    )
