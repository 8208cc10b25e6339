"""RMSNorm, the joined query/key/value projection, and rotary position embedding.

    q|k|v = rms_norm(x) W^T + bias;  then q and k are rotated, pair (i, i + R/2) of each head by angle[t, i]

The half-split pairing of Su et al. 2021 (https://arxiv.org/abs/2104.09864) as GPT-NeoX has it. R, the rotated part
of a head, may be less than H; the rest of the head passes through.

Layouts: x [B, T, D]; weight [(N + 2K) H, D] with the rows of q, k, v in this order; cos and sin [B, T, R/2] float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import dispatch
from pallas_kernels.quant_matmul import Weight
from pallas_kernels.quant_matmul import reference as matmul
from pallas_kernels.rms_norm import rms_norm


@jax.named_scope("rope")
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first R dimensions of each head of x [B, T, heads, H] by angles given as cos, sin [B, T, R/2]."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def reference(
    x: jax.Array,
    norm: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The op in plain JAX."""
    return split_heads(matmul(rms_norm(x, norm, eps), weight, bias), cos, sin, n_heads, n_kv_heads)


def split_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, n_heads: int, n_kv_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v of joined rows [B, T, (N + 2K) H], q and k rotated."""
    heads = qkv.reshape(*qkv.shape[:2], n_heads + 2 * n_kv_heads, -1)
    q, k, v = jnp.split(heads, [n_heads, n_heads + n_kv_heads], axis=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def store_reference(
    x: jax.Array,
    norm: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    n_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv_rope_store` in plain JAX."""
    q, k, v = reference(x, norm, weight, bias, cos, sin, n_heads, keys.shape[1], eps)
    return q, *store(k, v, keys, values, slots)


@jax.named_scope("cache")
def store(
    k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """keys and values [B, K, S, H] with k and v [B, T, K, H] in their slots [B, T]."""
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    # Tokens to be dropped go beyond the end, each to a slot of its own, so that all indices are unique.
    beyond = jnp.iinfo(jnp.int32).max - jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where((slots >= 0) & (slots < keys.shape[2]), slots, beyond)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return put(keys, k), put(values, v)


def _mosaic_gpu(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.mosaic_gpu import qkv_rope as kernel

    return kernel.qkv_rope(*args)


def _store_mosaic_gpu(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.mosaic_gpu import qkv_rope as kernel

    return kernel.qkv_rope_store(*args)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}
STORE_IMPLEMENTATIONS = {"mosaic_gpu": _store_mosaic_gpu, "xla": store_reference}


def qkv_rope(
    x: jax.Array,
    norm: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute rotated queries, rotated keys and values from a block's input.

    Args:
      x: [B, T, D], bfloat16 or float32.
      norm: [D], scale of the RMSNorm.
      weight: [(N + 2K) H, D], rows q, k, v; or (values, scales), see `quant_matmul`.
      bias: [(N + 2K) H], or None.
      cos, sin: [B, T, R/2] float32, of each token's angles.
      n_heads, n_kv_heads: N and K.
      eps: added to the mean square.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      q [B, T, N, H], k [B, T, K, H] and v [B, T, K, H] in x's dtype.
    """
    return dispatch(
        "qkv_rope", IMPLEMENTATIONS, implementation, x, norm, weight, bias, cos, sin, n_heads, n_kv_heads, eps
    )


def qkv_rope_store(
    x: jax.Array,
    norm: jax.Array,
    weight: Weight,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    *,
    n_heads: int,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `qkv_rope`, with the keys and values written to a cache.

    Args:
      keys, values: [B, K, S, H], the cache; updated in place where they are donated.
      slots: int32 [B, T], where each token's key and value go, no slot twice in a row; outside 0 to S - 1: nowhere.

    Returns:
      q [B, T, N, H] in x's dtype, and keys and values as they are then.
    """
    return dispatch(
        "qkv_rope_store", STORE_IMPLEMENTATIONS, implementation,
        x, norm, weight, bias, cos, sin, keys, values, slots, n_heads, eps,
    )  # fmt: skip
