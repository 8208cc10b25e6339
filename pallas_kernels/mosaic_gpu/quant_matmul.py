"""Matrix product with block-quantised weights for Hopper: the kernel for the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import products
from pallas_kernels.mosaic_gpu import quant_matmul_large as large
from pallas_kernels.mosaic_gpu import quant_matmul_skinny as skinny
from pallas_kernels.mosaic_gpu import quant_matmul_small as small
from pallas_kernels.quant_matmul import Weight, blocks
from pallas_kernels.tuning import choose

RUN: dict[str, products.Run] = {"skinny": skinny.run, "small": small.run}
SMALL = 300_000_000  # products, of all rows of x: with more, tensor cores at full rate win over short latencies


@dataclass(frozen=True)
class Kernel:
    """Which kernel multiplies: skinny (to 8 rows), small (all that a CTA needs at once) or large (wgmma, pipelined)."""

    name: str


def kernel_for(x: jax.Array, values: jax.Array, normed: bool = False) -> str:
    """The name of the kernel for rows x [..., in] times weights [out, in]; `normed`: it is to normalise them."""
    rows, (out, width) = math.prod(x.shape[:-1]), values.shape
    few = rows <= products.EIGHT
    other = Kernel("skinny" if few else "large")
    if not any(small.search_space(rows, out, width, normed)):
        return other.name
    default = other if few or rows * out * width > SMALL else Kernel("small")
    key = f"M={rows if few else -(-rows // 8) * 8} out={out} in={width}"
    return choose("kernel", key, default, lambda: (Kernel("small"), other)).name


def quant_matmul(
    x: jax.Array, weight: Weight, bias: jax.Array | None, residual: jax.Array | None, out_dtype: jnp.dtype | None
) -> jax.Array:
    """As `pallas_kernels.quant_matmul`, for bfloat16 x and weights in int8 blocks."""
    values, scales = blocks(weight)
    kernel = kernel_for(x, values)
    if kernel == "large":
        return large.matmul(x, values, scales, bias, residual, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(len(rows), -1)
    dtype = jnp.dtype(out_dtype or x.dtype)
    y = products.matmul(RUN[kernel], rows, values, scales, bias, added, dtype)
    return y.reshape(*x.shape[:-1], -1)
