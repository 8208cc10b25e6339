"""The feed-forward half of a decoder block: RMSNorm, SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), residual.

    h = rms_norm(x);  y = x + (silu(h Wg^T) * (h Wu^T)) Wd^T

Layouts: x [..., D]; gate_up [2F, D] with the rows of Wg first, then those of Wu; down [D, F].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import dispatch
from pallas_kernels.quant_matmul import Weight
from pallas_kernels.quant_matmul import reference as matmul
from pallas_kernels.rms_norm import rms_norm


def reference(x: jax.Array, norm: jax.Array, gate_up: Weight, down: Weight, eps: float) -> jax.Array:
    """The op in plain JAX; the activation function in float32."""
    gate, up = jnp.split(matmul(rms_norm(x, norm, eps), gate_up, out_dtype=jnp.float32), 2, axis=-1)
    return matmul((jax.nn.silu(gate) * up).astype(x.dtype), down, residual=x)


def _mosaic_gpu(x: jax.Array, norm: jax.Array, gate_up: Weight, down: Weight, eps: float) -> jax.Array:
    from pallas_kernels.mosaic_gpu import swiglu as kernel

    return kernel.swiglu(x, norm, gate_up, down, eps)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}


def swiglu(
    x: jax.Array,
    norm: jax.Array,
    gate_up: Weight,
    down: Weight,
    *,
    eps: float,
    implementation: str | None = None,
) -> jax.Array:
    """Apply the feed-forward half of a decoder block.

    Args:
      x: [..., D], bfloat16 or float32.
      norm: [D], scale of the RMSNorm.
      gate_up: [2F, D], gate rows then up rows; or (values, scales), see `quant_matmul`.
      down: [D, F]; or (values, scales).
      eps: added to the mean square.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      [..., D], x with the block's output added.
    """
    return dispatch("swiglu", IMPLEMENTATIONS, implementation, x, norm, gate_up, down, eps)
