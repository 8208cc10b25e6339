"""RMSNorm, the joined query/key/value projection, and rotary position embedding.

    q|k|v = rms_norm(x) W^T + bias;  then q and k are rotated, pair (i, i + R/2) of each head by angle[t, i]

The half-split pairing of Su et al. 2021 (https://arxiv.org/abs/2104.09864) as GPT-NeoX has it. R, the rotated part
of a head, may be less than H; the rest of the head passes through.

Layouts: x [B, T, D]; weight [(N + 2K) H, D] with the rows of q, k, v in this order; cos and sin [B, T, R/2] float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import dispatch
from pallas_kernels.quant_matmul import Weight
from pallas_kernels.quant_matmul import reference as matmul
from pallas_kernels.rms_norm import rms_norm


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
    qkv = matmul(rms_norm(x, norm, eps), weight, bias)
    heads = qkv.reshape(*x.shape[:2], n_heads + 2 * n_kv_heads, -1)
    q, k, v = jnp.split(heads, [n_heads, n_heads + n_kv_heads], axis=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


IMPLEMENTATIONS = {"xla": reference}


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
      implementation: "xla", or None to choose.

    Returns:
      q [B, T, N, H], k [B, T, K, H] and v [B, T, K, H] in x's dtype.
    """
    return dispatch(
        "qkv_rope", IMPLEMENTATIONS, implementation, x, norm, weight, bias, cos, sin, n_heads, n_kv_heads, eps
    )
