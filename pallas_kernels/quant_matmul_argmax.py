"""The greatest product of each row with block-quantised weights: greedy decoding, for which logits need not exist.

    value[m] = max_v y[m, v],   place[m] = argmax_v y[m, v],   y = x w^T,   v < known

Layouts: x [M, in], weights [out, in], results [M].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.implementation import dispatch
from pallas_kernels.quant_matmul import Weight, blocks
from pallas_kernels.quant_matmul import reference as matmul


def greatest(y: jax.Array, known: int) -> tuple[jax.Array, jax.Array]:
    """The greatest of each row's first `known` elements of y, float32 [M, out], and its place; NaN is the greatest."""
    places = lax.broadcasted_iota(jnp.int32, y.shape, 1)
    return agree(jnp.where(places < known, y, -jnp.inf), places)


def agree(values: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The greatest of each row of values, float32 [M, P], with its place of int32 [M, P]; a NaN is the greatest.

    One pass, where a maximum and an argmax would be two; and XLA's maximum on a CPU passes over a NaN in a long row.
    """

    def greater(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (a, i), (b, j) = one, other
        first = (a > b) | (a != a) & (b == b) | ((a == b) | (a != a) & (b != b)) & (i < j)
        return jnp.where(first, a, b), jnp.where(first, i, j)

    start = np.float32(-np.inf), np.int32(np.iinfo(np.int32).max)
    value, place = lax.reduce((values, places), start, greater, (1,))
    return value, place


def reference(x: jax.Array, weight: Weight, known: int) -> tuple[jax.Array, jax.Array]:
    """The op in plain JAX."""
    return greatest(matmul(x, weight, out_dtype=jnp.float32), known)


def _mosaic_gpu(x: jax.Array, weight: Weight, known: int) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.mosaic_gpu import products
    from pallas_kernels.mosaic_gpu import quant_matmul as kernel
    from pallas_kernels.mosaic_gpu import quant_matmul_large as large

    values, scales = blocks(weight)
    if len(x) <= products.EIGHT:  # few products to write; their kernel is quicker
        return greatest(kernel.quant_matmul(x, weight, None, None, jnp.float32), known)
    return large.argmax(x, values, scales, known)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}


def quant_matmul_argmax(
    x: jax.Array, weight: Weight, *, known: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Find the greatest product of each row with a weight matrix, quantised or not.

    Args:
      x: [M, in], bfloat16 or float32.
      weight: [out, in], or (values, scales), see `quant_matmul`.
      known: 1 to out; products with rows of the weight from there on do not count.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      The greatest products, float32 [M], and their places, int32 [M]. Of equals the first counts as greater, and a NaN
      as greater than all numbers.
    """
    return dispatch("quant_matmul_argmax", IMPLEMENTATIONS, implementation, x, weight, known)
