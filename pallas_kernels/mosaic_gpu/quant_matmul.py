"""Matrix product with block-quantised weights for Hopper: the kernel for the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import quant_matmul_large as large
from pallas_kernels.mosaic_gpu import quant_matmul_skinny as skinny
from pallas_kernels.quant_matmul import Weight, blocks
from pallas_kernels.tuning import choose

FEW = 8  # rows: half of a tensor core's operand in the one kernel, a quarter of the smallest tile in the other


@dataclass(frozen=True)
class Kernel:
    """Which kernel multiplies: the one for few rows, which reads weights straight into registers, or the other."""

    few: bool


def are_few(x: jax.Array, values: jax.Array) -> bool:
    """Whether the rows of x [..., in] are few enough for the kernels that read weights [out, in] into registers."""
    rows, (out, width) = math.prod(x.shape[:-1]), values.shape
    if not FEW < rows <= skinny.MAX_ROWS:
        return rows <= FEW
    few = -(-rows // 8) * 8
    return choose("few_rows", f"M={few} out={out} in={width}", Kernel(False), lambda: (Kernel(True), Kernel(False))).few


def quant_matmul(
    x: jax.Array, weight: Weight, bias: jax.Array | None, residual: jax.Array | None, out_dtype: jnp.dtype | None
) -> jax.Array:
    """As `pallas_kernels.quant_matmul`, for bfloat16 x and weights in int8 blocks."""
    values, scales = blocks(weight)
    if not are_few(x, values):
        return large.matmul(x, values, scales, bias, residual, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    config = skinny.choose_config("quant_matmul", rows, values, joined=1)
    added = None if residual is None else residual.reshape(len(rows), -1)
    y = skinny.matmul(rows, values, scales, bias, added, jnp.dtype(out_dtype or x.dtype), config)
    return y.reshape(*x.shape[:-1], -1)
