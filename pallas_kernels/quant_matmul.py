"""Matrix product with block-quantised weights.

    y[m, o] = sum_i x[m, i] w[o, i] + bias[o] + residual[m, o],     w[o, i] = scales[o, i // 32] * values[o, i]

Blocks of 32 along the input with one float16 scale each are GGUF's Q8_0
(https://github.com/ggml-org/ggml, block_q8_0), here with values and scales in two arrays.

Layouts: x [..., in], weights [out, in], result [..., out].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.implementation import dispatch

BLOCK = 32

Weight = jax.Array | tuple[jax.Array, jax.Array]
"""A matrix [out, in], or int8 values [out, in] with their float16 scales [out, in / 32]."""


def dequantize(values: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return values [..., in] times scales [..., in / 32], multiplied in float32, as `dtype`."""
    blocks = values.reshape(*scales.shape, BLOCK).astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return blocks.reshape(values.shape).astype(dtype)


def reference(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """The op in plain JAX: weights in x's dtype, accumulation and epilogue in float32."""
    w = dequantize(*weight, x.dtype) if isinstance(weight, tuple) else weight.astype(x.dtype)
    # HIGHEST keeps float32 out of TF32 on a GPU; bfloat16 is not affected.
    y = lax.dot_general(
        x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    if bias is not None:
        y += bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + bias.shape)
    if residual is not None:
        y += residual.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


def blocks(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """The int8 values and float16 scales of a weight for a kernel that takes nothing else.

    Raises:
      NotImplementedError: if it is a plain matrix.
    """
    if not isinstance(weight, tuple):
        raise NotImplementedError(f"weights of {weight.dtype}, not int8 blocks")
    return weight


def _mosaic_gpu(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    from pallas_kernels.mosaic_gpu import quant_matmul as kernel

    return kernel.quant_matmul(x, weight, bias, residual, out_dtype)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}


def quant_matmul(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply activations by a weight matrix, quantised or not.

    Args:
      x: [..., in], bfloat16 or float32.
      weight: [out, in], or (int8 values [out, in], float16 scales [out, in / 32]).
      bias: [out], added.
      residual: [..., out], added.
      out_dtype: dtype of the result; x's if None.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      [..., out], accumulated in float32.
    """
    return dispatch("quant_matmul", IMPLEMENTATIONS, implementation, x, weight, bias, residual, out_dtype)
