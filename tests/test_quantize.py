"""Block quantisation against NumPy in float64, and Q8_0 bytes against the `gguf` package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orcd_jax.quantize import BLOCK, QuantizedArray, dequantize, quantize, split_q8_0

LARGEST = 65504 * 127.0  # the largest weight that a float16 scale can carry


def in_float64(x: QuantizedArray) -> np.ndarray:
    scales = np.asarray(x.scales, np.float64)
    return np.asarray(x.values, np.float64) * np.repeat(scales, BLOCK, axis=-1)


def check(x: np.ndarray) -> QuantizedArray:
    """Each value is the whole number nearest to x / scale, and no further than half a step from x."""
    result = quantize(x)
    assert result.values.dtype == np.int8 and result.values.shape == x.shape
    assert result.scales.dtype == np.float16 and result.scales.shape == (x.shape[0], x.shape[1] // BLOCK)
    assert result.values.min() >= -127, "-128 has no counterpart"
    steps = np.repeat(result.scales.astype(np.float64), BLOCK, axis=-1)
    # x * (1 / scale) is computed in float32, so that a tie can fall to either side: 127 roundings of 2^-23 or less.
    assert (np.abs(in_float64(result) - x.astype(np.float64)) <= steps * (0.5 + 127 * 2**-23)).all()
    return result


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 0.02, 1.0, 1e4, 1e6])
def test_error_is_at_most_half_a_step(magnitude):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 256)) * magnitude).astype(np.float32)
    x *= np.repeat(2.0 ** rng.integers(-4, 1, (64, 8)), BLOCK, axis=1).astype(np.float32)  # blocks differ
    result = check(x)
    largest = np.abs(x.reshape(64, -1, BLOCK)).max(axis=-1).astype(np.float64)
    # The step is the least that reaches the largest value, up to the rounding of float16: 2^-11 of it, or, among
    # subnormal numbers, one of their steps of 2^-24.
    np.testing.assert_allclose(result.scales.astype(np.float64), largest / 127, rtol=2**-11, atol=2**-24)


@given(
    arrays(
        np.float32,
        (2, 2 * BLOCK),
        elements=st.floats(-LARGEST, LARGEST, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32) | st.just(0.0),
    )
)
def test_error_is_at_most_half_a_step_of_anything(x):
    check(x)


def test_zeros_stay_zero():
    result = check(np.zeros((2, 64), np.float32))
    assert not result.values.any() and not result.scales.any()
    negative = check(np.full((1, 32), -0.0, np.float32))
    assert not negative.values.any() and not negative.scales.any()


def test_an_outlier_coarsens_its_own_block_only():
    x = np.full((1, 96), 0.01, np.float32)
    x[0, 40] = 1000.0
    result = check(x)
    assert result.values[0, 40] == 127 and not np.delete(result.values[0, 32:64], 8).any()
    for kept in (slice(32), slice(64, 96)):
        np.testing.assert_allclose(in_float64(result)[0, kept], 0.01, rtol=2**-11)


@pytest.mark.parametrize("largest", [2.0**-24, 1e-7, 3.7e-6, 1.4 * 127 * 2**-24, 1e-5, 6.1e-5, 127 * 2.0**-14])
def test_subnormal_scales_reach_the_largest_value(largest):
    """Where the nearest float16 is far below largest / 127, down to zero, the next one above is taken."""
    x = np.linspace(-largest, largest, 64, dtype=np.float32).reshape(2, 32)
    result = check(x)
    assert (result.scales > 0).all()


def test_whole_multiples_are_exact():
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, (16, 64))
    values[:, ::BLOCK] = 127  # so that the scale can be found again
    x = (values * 0.03125).astype(np.float32)
    result = quantize(x)
    np.testing.assert_array_equal(result.values, values)
    np.testing.assert_array_equal(result.scales, np.float16(0.03125))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.01 * LARGEST, np.finfo(np.float32).max])
def test_what_blocks_cannot_hold_is_refused(bad):
    x = np.ones((2, 64), np.float32)
    x[1, 33] = bad
    with pytest.raises(ValueError, match="not finite or too large"):
        quantize(x)


def test_split_q8_0_keeps_every_bit():
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (8, 4 * 34), dtype=np.uint8)  # any bytes: -128, subnormal, negative and huge scales
    scales = raw.reshape(8, 4, 34)[:, :, :2]
    scales[..., 1] &= 0xBF  # none of them infinite or NaN
    result = split_q8_0(raw)
    assert result.values.dtype == np.int8 and result.scales.dtype == np.float16
    assert (result.values == -128).any() and (result.scales < 0).any()
    again = np.concatenate(
        [result.scales.view(np.uint8).reshape(8, 4, 2), result.values.view(np.uint8).reshape(8, 4, 32)], axis=-1
    )
    np.testing.assert_array_equal(again.reshape(raw.shape), raw)
    expected = quants.dequantize(raw, GGMLQuantizationType.Q8_0)
    # 8 bits times 11: every product is exact in float32.
    np.testing.assert_array_equal(np.asarray(dequantize(result)), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantize_multiplies_in_float32_and_rounds_once(dtype):
    rng = np.random.default_rng(3)
    x = QuantizedArray(
        rng.integers(-128, 128, (4, 96), dtype=np.int8), rng.uniform(1e-7, 2.0, (4, 3)).astype(np.float16)
    )
    result = dequantize(x, dtype)
    assert result.dtype == dtype and result.shape == (4, 96)
    np.testing.assert_array_equal(np.asarray(result), in_float64(x).astype(np.float32).astype(dtype))


def test_a_quantized_array_is_a_pytree_of_two_leaves():
    x = quantize(np.ones((2, 32), np.float32))
    assert [leaf.shape for leaf in jax.tree.leaves(x)] == [(2, 32), (2, 1)]
    assert isinstance(jax.tree.map(lambda leaf: leaf, x), QuantizedArray)
    jitted = jax.jit(lambda w: dequantize(w).sum())(x)
    np.testing.assert_allclose(jitted, in_float64(x).sum(), rtol=64 * 2**-24)
