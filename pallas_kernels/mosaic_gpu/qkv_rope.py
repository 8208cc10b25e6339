"""RMSNorm, query/key/value projection, rotary embedding and the write to the cache for Hopper, in one kernel.

For many rows in three: XLA's norm, the product, and the rest. What the rest's cannot do is left to XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import finishing, products
from pallas_kernels.mosaic_gpu import quant_matmul_large as large
from pallas_kernels.mosaic_gpu.quant_matmul import RUN, kernel_for
from pallas_kernels.qkv_rope import split_heads, store
from pallas_kernels.quant_matmul import Weight, blocks
from pallas_kernels.rms_norm import rms_norm


def qkv_rope(
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
    """As `pallas_kernels.qkv_rope`, for bfloat16 x, weights in int8 blocks, and heads rotated whole."""
    values, scales = blocks(weight)
    kernel = kernel_for(x, values, normed=True)
    run = RUN.get(kernel, finishing.run)
    if kernel == "large":
        x, bias = large.matmul(rms_norm(x, norm, eps), values, scales, bias), None
        if not _finishes(x, cos, n_heads + 2 * n_kv_heads):
            return split_heads(x, cos, sin, n_heads, n_kv_heads)
    rows, cos, sin = _rows(x, cos, sin)
    results = products.qkv_rope(run, rows, norm, values, scales, bias, cos, sin, n_heads, n_kv_heads, eps)
    q, k, v = (y.reshape(*x.shape[:2], n, -1) for y, n in zip(results, (n_heads, n_kv_heads, n_kv_heads), strict=True))
    return q, k, v


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
    n_heads: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `pallas_kernels.qkv_rope_store`, for bfloat16 x, keys and values, weights in int8 blocks."""
    if keys.dtype != jnp.bfloat16 or values.dtype != jnp.bfloat16:
        raise NotImplementedError(f"a cache of {keys.dtype} and {values.dtype}, not bfloat16")
    (w, scales), n_kv_heads = blocks(weight), keys.shape[1]
    kernel = kernel_for(x, w, normed=True)
    in_place = keys.size < 2**31 and not jax.typeof(keys).manual_axis_type.varying  # no references to such arrays
    run, cache = RUN.get(kernel, finishing.run), (keys, values, slots.astype(jnp.int32))
    if kernel == "large":
        x, bias = large.matmul(rms_norm(x, norm, eps), w, scales, bias), None
        if not in_place or not _finishes(x, cos, n_heads + 2 * n_kv_heads):
            q, k, v = split_heads(x, cos, sin, n_heads, n_kv_heads)
            return q, *store(k, v, keys, values, slots)
    elif not in_place:
        raise NotImplementedError("a cache of 2^31 elements or more a layer, or one that varies over a checked mesh")
    rows, cos, sin = _rows(x, cos, sin)
    q, *stored = products.qkv_rope(run, rows, norm, w, scales, bias, cos, sin, n_heads, n_kv_heads, eps, cache)
    return q.reshape(*x.shape[:2], n_heads, -1), stored[0], stored[1]


def _finishes(sums: jax.Array, cos: jax.Array, heads: int) -> bool:
    """Whether the kernel for the rest can take sums [B, T, out]: angles of whole heads, and not too many."""
    return products.rotated_whole(sums.shape[-1], cos, heads) and sums.size < 2**31


def _rows(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, cos and sin with all tokens as rows; angles may be given once for all rows of a batch."""
    rows = x.reshape(-1, x.shape[-1])
    cos, sin = (jnp.broadcast_to(a, (*x.shape[:2], a.shape[-1])).reshape(len(rows), -1) for a in (cos, sin))
    return rows, cos, sin
