"""The feed-forward half of a block for Hopper: one kernel from RMSNorm to silu(gate) * up, and one for the rest.

For many rows RMSNorm is a small kernel of its own: its result is read once for each tile of weights.
"""

from __future__ import annotations

import jax

from pallas_kernels.mosaic_gpu import products
from pallas_kernels.mosaic_gpu import quant_matmul_large as large
from pallas_kernels.mosaic_gpu.quant_matmul import RUN, kernel_for, quant_matmul
from pallas_kernels.quant_matmul import Weight, blocks
from pallas_kernels.rms_norm import rms_norm


def swiglu(x: jax.Array, norm: jax.Array, gate_up: Weight, down: Weight, eps: float) -> jax.Array:
    """As `pallas_kernels.swiglu`, for bfloat16 x and weights in int8 blocks."""
    values, scales = blocks(gate_up)
    kernel = kernel_for(x, values, normed=True)
    if kernel == "large":
        active = large.gate_up(rms_norm(x, norm, eps), values, scales)
    else:
        rows = x.reshape(-1, x.shape[-1])
        active = products.gate_up(RUN[kernel], rows, norm, values, scales, eps).reshape(*x.shape[:-1], -1)
    return quant_matmul(active, down, None, x, None)
