"""Causal grouped-query attention of a chunk of queries against a cache.

    out[t, n] = sum_s softmax_s(q[t, n] . k[s, n // G] / sqrt(H)) v[s, n // G]      over the visible s

Which keys a query sees follows from positions alone: `Visibility`. A query that sees no key gives zeros. Softmax in
float32. Keys and values may be int8 with one scale a row: then scores are multiplied by the keys' scales, and weights
by the values', so that nothing is dequantised.

Grouped queries: Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245).
Layouts: q and the result [B, T, N, H]; k and v [B, K, S, H], so that a head's keys lie together; N = K G.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.implementation import dispatch

HEAD_WIDTHS = 64, 96, 128  # that the kernels take

Rows = jax.Array | tuple[jax.Array, jax.Array]
"""Rows [B, K, S, H], or int8 values [B, K, S, H] with their float16 scales [B, K, S]."""


class Visibility(NamedTuple):
    """Which keys a query sees: with d its position less the key's, those with nearest <= d < window.

    A window of W counts the query's own position as one of the W (as Hugging Face's Phi-3 does). The first `sinks`
    positions are seen from beyond the window too. Empty slots, whose position is negative, are never seen.
    """

    window: int | None = None
    nearest: int = 0
    sinks: int = 0

    def mask(self, positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """bool [B, T, S] from positions [B, T] and key_positions [B, S]."""
        keys = key_positions[:, None, :]
        distance = positions[:, :, None] - keys
        seen = distance >= self.nearest
        if self.window is not None:
            seen &= (distance < self.window) | (keys < self.sinks)
        return seen & (keys >= 0)


def reference(
    q: jax.Array,
    k: Rows,
    v: Rows,
    positions: jax.Array,
    key_positions: jax.Array,
    visibility: Visibility = Visibility(),  # noqa: B008 (immutable)
    lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The op in plain JAX. It writes the scores [B, N, T, S] out, so callers keep T to a chunk."""
    keys, key_scales = k if isinstance(k, tuple) else (k, None)
    values, value_scales = v if isinstance(v, tuple) else (v, None)
    batch, length, _, width = q.shape
    grouped = q.reshape(batch, length, keys.shape[1], -1, width)
    few = length <= 8  # summed in one pass: for a dot, XLA on the CPU transposes a row's cache at each step
    if few:
        queries = grouped.transpose(0, 2, 3, 1, 4)[:, :, :, :, None].astype(jnp.float32)
        scores = jnp.sum(queries * keys.astype(jnp.float32)[:, :, None, None], axis=-1)
    else:
        scores = jnp.einsum(
            "bksh,btkgh->bksgt", keys.astype(q.dtype), grouped, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).transpose(0, 1, 3, 4, 2)  # fmt: skip
    if key_scales is not None:
        scores *= key_scales.astype(jnp.float32)[:, :, None, None, :]
    mask = visibility.mask(positions, key_positions)[:, None, None]
    scores = jnp.where(mask, scores * width**-0.5, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1)  # [B, K, G, T]
    if value_scales is not None:
        weights *= value_scales.astype(jnp.float32)[:, :, None, None, :]
    weights = weights.astype(q.dtype)
    if few:
        weights = lax.optimization_barrier(weights).astype(jnp.float32)
        out = jnp.sum(weights[..., None] * values.astype(jnp.float32)[:, :, None, None], axis=-2)
    else:
        out = jnp.einsum(
            "bkgts,bksh->bkgth", weights, values.astype(q.dtype), precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    result = out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    if not lse:
        return result
    sums = jnp.moveaxis(top[..., 0] + jnp.log(total), 3, 1)  # -inf where no key is seen
    return result, sums.reshape(q.shape[:3])


def _mosaic_gpu(*args: Any) -> Any:
    from pallas_kernels.mosaic_gpu.flash_attention import flash_attention as kernel

    return kernel(*args)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}


def flash_attention(
    q: jax.Array,
    k: Rows,
    v: Rows,
    positions: jax.Array,
    key_positions: jax.Array,
    *,
    visibility: Visibility = Visibility(),  # noqa: B008 (immutable)
    lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend from a chunk of queries to keys and values.

    Args:
      q: [B, T, N, H], bfloat16 or float32.
      k, v: [B, K, S, H], N a multiple of K; or (int8 values, float16 scales [B, K, S]).
      positions: [B, T] int32, each query's position in its sequence.
      key_positions: [B, S] or [1, S] int32, each slot's position, negative where the slot is empty.
      visibility: which keys a query sees; static.
      lse: also return the log of the sum of the exponentials of the scores.
      implementation: "mosaic_gpu" (Hopper: bfloat16, H of 64, 96 or 128), "xla", or None to choose.

    Returns:
      [B, T, N, H] in q's dtype; with `lse` also float32 [B, T, N], -inf for a query that sees no key.
    """
    return dispatch(
        "flash_attention", IMPLEMENTATIONS, implementation, q, k, v, positions, key_positions, visibility, lse
    )
