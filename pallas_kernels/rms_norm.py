"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

y = x / sqrt(mean(x^2) + eps) * scale,     computed in float32
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


@jax.named_scope("rms_norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis of x [..., D] and multiply it by scale [D]; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    normal = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normal * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)
