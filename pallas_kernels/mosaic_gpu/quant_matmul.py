"""Matrix product with block-quantised weights for Hopper: the kernel for the number of rows."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import quant_matmul_large as large
from pallas_kernels.mosaic_gpu import quant_matmul_skinny as skinny
from pallas_kernels.quant_matmul import Weight, blocks

FEW = 8  # rows: half of a tensor core's operand in the one kernel, a quarter of the smallest tile in the other


def are_few(x: jax.Array) -> bool:
    """Whether x [..., in] has few enough rows for the kernels that read weights straight into registers."""
    return math.prod(x.shape[:-1]) <= FEW


def quant_matmul(
    x: jax.Array, weight: Weight, bias: jax.Array | None, residual: jax.Array | None, out_dtype: jnp.dtype | None
) -> jax.Array:
    """As `pallas_kernels.quant_matmul`, for bfloat16 x and weights in int8 blocks."""
    values, scales = blocks(weight)
    if not are_few(x):
        return large.matmul(x, values, scales, bias, residual, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    config = skinny.choose_config("quant_matmul", rows, values, joined=1)
    added = None if residual is None else residual.reshape(len(rows), -1)
    y = skinny.matmul(rows, values, scales, bias, added, jnp.dtype(out_dtype or x.dtype), config)
    return y.reshape(*x.shape[:-1], -1)
