"""Block-quantised arrays: int8 values with one float16 scale for each 32 along the input, GGUF's Q8_0."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.quant_matmul import dequantize as _dequantize

__all__ = ["BLOCK", "QuantizedArray", "dequantize", "quantize", "split_q8_0"]


class QuantizedArray(NamedTuple):
    """A matrix as int8 blocks; a tuple, and so a pytree and what `pallas_kernels` takes as a weight."""

    values: jax.Array | np.ndarray  # int8 [out, in]
    scales: jax.Array | np.ndarray  # float16 [out, in / 32]


def quantize(x: np.ndarray) -> QuantizedArray:
    """Quantise float32 [out, in] to int8 blocks, symmetric, each block's largest magnitude at 127.

    The values are rounded against the float16 scale that is stored, so that each is off by at most half of it.

    Raises:
      ValueError: if a value is not finite or too large for a float16 scale.
    """
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    with np.errstate(over="ignore"):
        scales = (largest / np.float32(127)).astype(np.float16)
        # Among subnormal numbers the nearest scale can be far too small, down to zero: then the next above.
        above = np.nextafter(scales, np.float16(np.inf))
        scales = np.where(scales.astype(np.float32) * 127.5 < largest, above, scales)
    if not np.isfinite(scales).all():
        raise ValueError("a value is not finite or too large for int8 blocks with float16 scales")
    inverse = np.divide(np.float32(1), scales, out=np.zeros(scales.shape, np.float32), where=scales != 0)
    values = np.clip(np.rint(blocks * inverse[..., None]), -127, 127).astype(np.int8)
    return QuantizedArray(values.reshape(x.shape), scales)


def split_q8_0(raw: np.ndarray, out: QuantizedArray | None = None) -> QuantizedArray:
    """Split rows of Q8_0 blocks, uint8 [out, in / 32 * 34], into values and scales, bit for bit.

    Args:
      out: where they go, C-contiguous NumPy arrays; None: new ones.
    """
    blocks = raw.reshape(raw.shape[0], -1, 2 + BLOCK)
    if out is None:
        shape = blocks.shape[:2]
        out = QuantizedArray(np.empty((shape[0], BLOCK * shape[1]), np.int8), np.empty(shape, np.float16))
    np.asarray(out.values).reshape(*blocks.shape[:2], BLOCK)[...] = blocks[..., 2:].view(np.int8)
    np.asarray(out.scales).view(np.uint8).reshape(*blocks.shape[:2], 2)[...] = blocks[..., :2]
    return out


def dequantize(x: QuantizedArray, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return values times scales, [out, in], as `dtype`."""
    return _dequantize(jnp.asarray(x.values), jnp.asarray(x.scales), dtype)
