"""Every op's reference against NumPy in float64, written here; and which implementation of an op runs.

Tolerances follow from the arithmetic: a sum's rounding errors have random signs, so that six standard deviations of
n of them, each up to eps / 2 of its term, stay below 2 eps times the terms' 2-norm.
"""

import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import (
    flash_attention,
    flash_decode,
    qkv_rope,
    quant_matmul,
    quant_matmul_argmax,
    rms_norm,
    swiglu,
)
from pallas_kernels.flash_attention import Visibility
from pallas_kernels.implementation import compiled, dispatch, use
from pallas_kernels.quant_matmul import IMPLEMENTATIONS as MATMULS
from pallas_kernels.quant_matmul import dequantize
from pallas_kernels.quant_matmul_argmax import greatest
from pallas_kernels.top_k import tournament

# Compiled as a whole, not operation by operation.
compiled_quant_matmul = jax.jit(quant_matmul, static_argnames="out_dtype")
compiled_rms_norm = jax.jit(rms_norm)
compiled_swiglu = jax.jit(swiglu)
compiled_qkv_rope = jax.jit(qkv_rope, static_argnames=("n_heads", "n_kv_heads"))

DTYPES = [jnp.float32, jnp.bfloat16]


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


EPS32 = eps(jnp.float32)


def normal(seed, *shape, dtype=jnp.float32, std=1.0):
    return jnp.asarray(std * np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(x):
    return np.asarray(x).astype(np.float64)


def random_weight(seed, rows, columns, kind):
    """A matrix of standard deviation 1 / sqrt(columns), an array or int8 blocks, and its exact values."""
    if kind != "int8":
        weight = normal(seed, rows, columns, dtype=kind, std=columns**-0.5)
        return weight, exact(weight)
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 128, (rows, columns), np.int8)
    scales = (rng.uniform(-1.5, 1.5, (rows, columns // 32)) / (73 * columns**0.5)).astype(np.float16)
    return (jnp.asarray(values), jnp.asarray(scales)), exact(values) * np.repeat(exact(scales), 32, axis=1)


def relative_error(actual, expected):
    return np.linalg.norm(exact(actual) - expected) / np.linalg.norm(expected)


# Matrix product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("leading", "rows", "columns", "out_dtype"),
    [((), 5, 32, None), ((3,), 1, 96, jnp.float32), ((2, 5), 64, 896, None), ((1, 1), 33, 2048, jnp.bfloat16)],
)
def test_quant_matmul(dtype, kind, leading, rows, columns, out_dtype):
    x = normal(1, *leading, columns, dtype=dtype)
    weight, w = random_weight(2, rows, columns, kind)
    bias, residual = normal(3, rows), normal(4, *leading, rows, dtype=dtype)
    product = exact(x) @ w.T
    norms = np.sqrt(exact(x) ** 2 @ (w**2).T)
    rounds_weights = dtype == jnp.bfloat16 and kind != "bfloat16"
    for extra, added in (((), 0), ((bias, residual), exact(bias) + exact(residual))):
        actual = compiled_quant_matmul(x, weight, *extra, out_dtype=out_dtype)
        assert actual.dtype == (out_dtype or dtype) and actual.shape == (*leading, rows)
        tolerance = 2 * norms * (rounds_weights * eps(dtype) + EPS32 * math.sqrt(columns))
        tolerance += np.abs(product + added) * (eps(actual.dtype) + 2 * EPS32) + 2 * EPS32 * np.abs(product)
        assert np.all(np.abs(exact(actual) - (product + added)) <= tolerance)


def test_quant_matmul_takes_rows_of_any_length():
    x, (weight, w) = normal(1, 3, 7), random_weight(2, 5, 7, "float32")
    np.testing.assert_allclose(quant_matmul(x, weight), exact(x) @ w.T, atol=10 * EPS32)


def test_quant_matmul_accumulates_in_float32():
    """A bfloat16 accumulator would stop at 256, where adding 1 rounds back."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert quant_matmul(ones, ones, out_dtype=jnp.float32)[0, 0] == 4096


def whole_numbers(seed, *shape, most):
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(("m", "out", "known"), [(1, 7, 7), (3, 100, 61), (5, 300, 1)])
def test_quant_matmul_argmax(dtype, kind, m, out, known):
    """Products are small whole numbers, exact in any order, with a tie in the first row; unknown ones are greater."""
    x, w = whole_numbers(m, m, 64, most=2), whole_numbers(out, out, 64, most=1)
    w[known - 1] = w[(x @ w[:known].T)[0].argmax()]
    w[known:] *= 100
    weight = (jnp.asarray(w, jnp.int8), jnp.ones((out, 2), jnp.float16)) if kind == "int8" else jnp.asarray(w, dtype)
    values, places = jax.jit(quant_matmul_argmax, static_argnames="known")(jnp.asarray(x, dtype), weight, known=known)
    y = (x.astype(np.float64) @ w.T)[:, :known]
    assert values.dtype == jnp.float32 and places.dtype == jnp.int32
    np.testing.assert_array_equal(values, y.max(axis=1))
    np.testing.assert_array_equal(places, y.argmax(axis=1))


def test_quant_matmul_argmax_of_what_is_no_number():
    inf, nan = np.inf, np.nan
    y = np.array(
        [[-inf] * 4, [1, nan, inf, nan], [-inf, -inf, -3, nan], [0, -0.0, -1, 5], [2, inf, inf, 0]], np.float32
    )
    for x, weight in ((np.eye(1, dtype=np.float32), row[:, None]) for row in y):
        value, place = quant_matmul_argmax(jnp.asarray(x), jnp.asarray(weight), known=3)
        np.testing.assert_array_equal(value, weight[:3].max(axis=0))  # NumPy's NaN is the greatest too
        np.testing.assert_array_equal(place, weight[:3].argmax(axis=0))


def test_the_greatest_of_a_long_row_may_be_a_nan():
    y = jnp.zeros((2, 5000)).at[1, 4000].set(jnp.nan)
    for run in (greatest, jax.jit(greatest, static_argnums=1)):
        np.testing.assert_array_equal(run(y, 4001), ([0, np.nan], [0, 4000]))
        np.testing.assert_array_equal(run(y, 4000), ([0, 0], [0, 0]))


def test_dequantize_is_exact_for_every_value_and_scale():
    """An int8 times a float16, subnormal ones too, has 19 bits at most: float32 holds it."""
    values = np.arange(-128, 128).astype(np.int8).reshape(1, 256)
    scales = np.array([[2**-24, 3 * 2**-24, -(2**-15), 1 / 3, -1.0, 0.0, 65504.0, -65504.0]], np.float16)
    expected = exact(values) * np.repeat(exact(scales), 32, axis=1)
    np.testing.assert_array_equal(exact(dequantize(jnp.asarray(values), jnp.asarray(scales), jnp.float32)), expected)


# RMSNorm, feed-forward, projection with rotary positions


def numpy_rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 897)])
@pytest.mark.parametrize("std", [1e-4, 1.0, 1e4])
def test_rms_norm(dtype, shape, std):
    x, scale = normal(1, *shape, dtype=dtype, std=std), 1 + normal(2, shape[-1])
    expected = numpy_rms_norm(exact(x), exact(scale), 1e-6)  # 1e-6 counts where the mean square is 1e-8
    actual = compiled_rms_norm(x, scale, 1e-6)
    assert actual.dtype == dtype
    tolerance = np.abs(expected) * (eps(dtype) + EPS32 * math.sqrt(shape[-1] + 4))
    assert np.all(np.abs(exact(actual) - expected) <= tolerance)


def test_rms_norm_of_zeros_is_zero():
    assert not rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-5).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    ("leading", "d", "f", "gain"),
    [((1,), 32, 32, 1.0), ((2, 5), 96, 160, 1.0), ((3, 1), 64, 224, 200.0)],  # 200: the gate is 0 or open
)
def test_swiglu(dtype, kind, leading, d, f, gain):
    x, norm = normal(1, *leading, d, dtype=dtype), gain * (1 + 0.2 * normal(2, d))
    (gate_up, gu), (down, w_down) = random_weight(3, 2 * f, d, kind), random_weight(4, d, f, kind)
    h = numpy_rms_norm(exact(x), exact(norm), 1e-5)
    gate, up = h @ gu[:f].T, h @ gu[f:].T
    branch = gate * 0.5 * (1 + np.tanh(gate / 2)) * up @ w_down.T
    actual = compiled_swiglu(x, norm, gate_up, down, eps=1e-5)
    assert actual.dtype == dtype and actual.shape == x.shape
    # On the way h, both weights, the activation and the result are rounded: five roundings.
    tolerance = eps(dtype) * math.sqrt(5) + EPS32 * math.sqrt(d + f)
    assert relative_error(actual, exact(x) + branch) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    ("batch", "length", "d", "n", "k", "h", "rotary", "biased"),
    [
        (1, 1, 32, 1, 1, 2, 2, False),
        (2, 5, 64, 4, 2, 16, 16, True),
        (3, 2, 96, 6, 3, 24, 16, False),
        (1, 7, 32, 2, 1, 96, 2, True),
    ],
)
def test_qkv_rope(dtype, kind, batch, length, d, n, k, h, rotary, biased):
    x, norm = normal(1, batch, length, d, dtype=dtype), 1 + 0.2 * normal(2, d)
    weight, w = random_weight(3, (n + 2 * k) * h, d, kind)
    bias = normal(4, (n + 2 * k) * h) if biased else None
    angles = np.random.default_rng(5).uniform(-100, 100, (batch, length, rotary // 2))
    cos, sin = (jnp.asarray(1.2 * part, jnp.float32) for part in (np.cos(angles), np.sin(angles)))  # longrope scales

    qkv = numpy_rms_norm(exact(x), exact(norm), 1e-5) @ w.T + (exact(bias) if biased else 0)
    heads = qkv.reshape(batch, length, n + 2 * k, h)
    # A pair (i, i + R/2) is a complex number, and the rotation a product with cos + i sin.
    pairs = heads[..., : rotary // 2] + 1j * heads[..., rotary // 2 : rotary]
    pairs = pairs * (exact(cos) + 1j * exact(sin))[:, :, None]
    rotated = np.concatenate([pairs.real, pairs.imag, heads[..., rotary:]], axis=-1)
    expected = rotated[:, :, :n], rotated[:, :, n : n + k], heads[:, :, n + k :]

    actual = compiled_qkv_rope(x, norm, weight, bias, cos, sin, n_heads=n, n_kv_heads=k, eps=1e-5)
    tolerance = eps(dtype) * math.sqrt(4) + EPS32 * math.sqrt(d)  # h, weight, product, rotation are rounded
    for part, truth in zip(actual, expected, strict=True):
        assert part.dtype == dtype and part.shape == truth.shape
        assert relative_error(part, truth) < tolerance


# Attention


def random_rows(seed, *shape, dtype, int8=False):
    """Keys or values [B, K, S, H], plain or as int8 with a scale a row, and what they are exactly."""
    if not int8:
        rows = normal(seed, *shape, dtype=dtype)
        return rows, exact(rows)
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, shape, np.int8)
    scales = rng.uniform(0.005, 0.02, shape[:-1]).astype(np.float16)
    return (jnp.asarray(values), jnp.asarray(scales)), exact(values) * exact(scales)[..., None]


def sees(visibility, position, key_position):
    distance = position - key_position
    near = visibility.window is None or distance < visibility.window or key_position < visibility.sinks
    return key_position >= 0 and distance >= visibility.nearest and near


def numpy_attention(q, k, v, positions, key_positions, visibility):
    """One query and head at a time; each output, its log-sum-exp, its scale sum p |v|, and the largest |score|."""
    batch, length, n, width = q.shape
    out, lse, scale, largest = np.zeros(q.shape), np.full(q.shape[:3], -np.inf), np.zeros(q.shape), 1.0
    for b, t, head in np.ndindex(batch, length, n):
        kv = head // (n // k.shape[1])
        seen = [s for s, at in enumerate(key_positions[b]) if sees(visibility, positions[b, t], at)]
        if seen:
            scores = k[b, kv, seen] @ q[b, t, head] / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            p = weights / weights.sum()
            out[b, t, head], scale[b, t, head] = p @ v[b, kv, seen], p @ np.abs(v[b, kv, seen])
            lse[b, t, head] = scores.max() + np.log(weights.sum())
            largest = max(largest, np.abs(scores).max())
    return out, lse, scale, largest


@partial(jax.jit, static_argnames=("function", "visibility", "lse"))
def attend(function, q, k, v, positions, key_positions, visibility=Visibility(), lse=False):  # noqa: B008 (immutable)
    return function(q, k, v, positions, key_positions, visibility=visibility, lse=lse)


def assert_attends(function, q, k, v, positions, key_positions, visibility=Visibility()):  # noqa: B008 (immutable)
    (k, exact_k), (v, exact_v) = k, v
    out, lse, scale, largest = numpy_attention(exact(q), exact_k, exact_v, positions, key_positions, visibility)
    actual, sums = attend(function, q, k, v, positions, key_positions, visibility, lse=True)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    assert sums.dtype == jnp.float32 and sums.shape == q.shape[:3]
    # An error of a score is an error of the log-sum-exp, and a relative one of a weight.
    error = 2 * EPS32 * (math.sqrt(exact_k.shape[2]) + math.sqrt(q.shape[-1]) * largest)
    np.testing.assert_allclose(sums, lse, rtol=0, atol=error)
    assert np.all(np.abs(exact(actual) - out) <= (error + 2 * eps(q.dtype)) * scale)  # weights and result are rounded


def random_slots(seed, batch, length, slots):
    """Query positions [B, T] and slots in any order, a fifth of them empty [B, S]."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(slots - length, 0) + 1, (batch, 1))
    key_positions = np.stack([rng.permutation(slots) for _ in range(batch)])
    key_positions[rng.random((batch, slots)) < 0.2] = -1
    return (starts + np.arange(length)).astype(np.int32), key_positions.astype(np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "n", "k", "width", "slots", "visibility"),
    [
        (1, 1, 1, 1, 4, 1, Visibility()),
        (2, 1, 4, 2, 16, 33, Visibility()),
        (2, 8, 6, 3, 12, 40, Visibility(window=5)),
        (3, 5, 4, 1, 96, 17, Visibility(nearest=3)),
        (1, 13, 8, 8, 24, 29, Visibility(window=1)),
        (2, 20, 4, 2, 16, 64, Visibility(window=100)),
        (2, 9, 14, 2, 64, 31, Visibility(window=8, sinks=4)),
        (2, 2, 4, 2, 16, 30, Visibility(window=12, nearest=4, sinks=2)),
    ],
)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_attention(dtype, batch, length, n, k, width, slots, visibility, int8):
    q = normal(1, batch, length, n, width, dtype=dtype, std=2)
    keys, values = (random_rows(seed, batch, k, slots, width, dtype=dtype, int8=int8) for seed in (2, 3))
    function = flash_decode if length <= 8 else flash_attention
    assert_attends(function, q, keys, values, *random_slots(4, batch, length, slots), visibility)


def test_few_queries_attend_alike():
    """flash_decode is flash_attention where it can be."""
    q, (k, _), (v, _) = normal(1, 2, 8, 4, 16), *(random_rows(i, 2, 2, 20, 16, dtype=jnp.float32) for i in (2, 3))
    slots = random_slots(4, 2, 8, 20)
    np.testing.assert_allclose(
        attend(flash_decode, q, k, v, *slots), attend(flash_attention, q, k, v, *slots), rtol=0, atol=20 * EPS32
    )


def test_visibility():
    """With d = position - key position: nearest <= d < window, or d >= nearest and a sink; never an empty slot."""
    positions, key_positions = np.arange(20)[None], np.arange(-3, 20)[None]
    for visibility in (Visibility(), Visibility(4), Visibility(None, 3), Visibility(6, 2), Visibility(5, 0, 2)):
        mask = visibility.mask(jnp.asarray(positions), jnp.asarray(key_positions))
        expected = [[sees(visibility, t, s) for s in key_positions[0]] for t in positions[0]]
        assert mask[0].tolist() == expected


@pytest.mark.parametrize("window", [None, 7])
def test_attention_is_that_of_jax_nn(window):
    q = normal(1, 2, 37, 6, 16, std=2)
    k, v = normal(2, 2, 37, 2, 16), normal(3, 2, 37, 2, 16)
    positions = jnp.tile(jnp.arange(37, dtype=jnp.int32), (2, 1))
    expected = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0), implementation="xla"
    )
    actual = attend(flash_attention, q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, positions, Visibility(window))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=EPS32 * math.sqrt(37) * float(jnp.abs(v).max()))


@pytest.mark.parametrize("function", [flash_attention, flash_decode])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_no_key_gives_zeros(function, dtype):
    q, k, v = normal(1, 1, 4, 2, 8, dtype=dtype), normal(2, 1, 1, 5, 8, dtype=dtype), normal(3, 1, 1, 5, 8, dtype=dtype)
    positions = jnp.array([[0, 3, 4, 9]], jnp.int32)
    key_positions = jnp.array([[3, 2, -1, -9, 5]], jnp.int32)
    assert not attend(function, q, k, v, positions, jnp.full((1, 5), -1, jnp.int32), Visibility(2)).any()
    out = attend(function, q, k, v, positions, key_positions, Visibility(2))  # sees none; 2 and 3; 3; none
    assert not out[0, [0, 3]].any() and jnp.all(out[0, [1, 2]] != 0)
    np.testing.assert_array_equal(out[0, 2], jnp.tile(v[0, 0, :1], (2, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_large_magnitudes(dtype):
    """Scores up to some 1e5: exp of them alone would overflow."""
    q, k = normal(1, 2, 3, 4, 16, dtype=dtype, std=200), normal(2, 2, 2, 20, 16, dtype=dtype, std=200)
    v = normal(3, 2, 2, 20, 16, dtype=dtype, std=1e4)
    assert_attends(flash_decode, q, (k, exact(k)), (v, exact(v)), *random_slots(4, 2, 3, 20))


def test_a_hot_row_leaves_the_others_alone():
    """A row whose scores overflow to infinity changes no bit of its neighbours."""
    q, k, v = normal(1, 3, 2, 4, 16), normal(2, 3, 2, 20, 16), normal(3, 3, 2, 20, 16)
    slots = random_slots(4, 3, 2, 20)
    calm = attend(flash_decode, q, k, v, *slots)
    hot = attend(flash_decode, q.at[1].multiply(1e30), k.at[1].multiply(1e30), v, *slots)
    np.testing.assert_array_equal(hot[::2], calm[::2])


def test_one_key_that_outshines_all_gives_its_value():
    q, v = jnp.ones((1, 1, 1, 16)), normal(1, 1, 1, 50, 16)
    k = normal(2, 1, 1, 50, 16).at[0, 0, 31].set(1e4)
    positions = jnp.array([[49]], jnp.int32)
    out = attend(flash_decode, q, k, v, positions, jnp.arange(50, dtype=jnp.int32)[None])
    np.testing.assert_array_equal(out[0, 0, 0], v[0, 0, 31])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_a_masked_key_does_not_leak(garbage):
    q, k, v = normal(1, 1, 2, 2, 8), normal(2, 1, 1, 6, 8), normal(3, 1, 1, 6, 8)
    positions, key_positions = jnp.array([[3, 4]], jnp.int32), jnp.array([[0, 9, 2, -1, 4, 1]], jnp.int32)
    masked = jnp.array([1, 3])
    clean = attend(flash_decode, q, k, v, positions, key_positions)
    dirty = attend(flash_decode, q, k.at[:, :, masked].set(garbage), v, positions, key_positions)
    np.testing.assert_array_equal(dirty, clean)


def test_flash_decode_refuses_many_queries():
    q, kv = jnp.ones((1, 9, 1, 4)), jnp.ones((1, 1, 9, 4))
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    with pytest.raises(NotImplementedError, match=r"at most 8 queries a row, got 9"):
        flash_decode(q, kv, kv, positions, positions)


# Choosing an implementation


def refuse(*_):
    raise NotImplementedError("too odd")


def fakes():
    return {"first": refuse, "second": lambda x: f"second {x}", "third": lambda x: f"third {x}"}


@pytest.mark.parametrize("asked_for", [False, True])
def test_the_best_implementation_that_can_is_chosen_and_said(caplog, asked_for):
    caplog.set_level(logging.INFO)
    with use("first") if asked_for else nullcontext():
        assert dispatch("op", fakes(), None, 1) == "second 1"
    (record,) = caplog.records
    assert record.levelno == (logging.WARNING if asked_for else logging.INFO)
    assert all(word in record.getMessage() for word in ("op", "first", "too odd"))


def test_a_named_implementation_is_never_replaced():
    assert dispatch("op", fakes(), "third", 1) == "third 1"
    with pytest.raises(NotImplementedError, match="too odd"):
        dispatch("op", fakes(), "first", 1)
    with pytest.raises(NotImplementedError, match=r"op has no implementation 'fourth'; it has first, second, third"):
        dispatch("op", fakes(), "fourth", 1)


def test_use_prefers_and_falls_back(caplog):
    with pallas_kernels.use("third"):
        assert dispatch("op", fakes(), None, 1) == "third 1"
        assert dispatch("op", fakes(), "second", 1) == "second 1"
        with pallas_kernels.use("second"):
            assert dispatch("op", fakes(), None, 1) == "second 1"
        assert dispatch("op", fakes(), None, 1) == "third 1"
    assert not caplog.records
    for name in ("first", "fourth"):
        caplog.clear()
        with pallas_kernels.use(name):
            assert dispatch("op", fakes(), None, 1) == "second 1"
        assert name in caplog.records[0].getMessage()


def test_threads_lower_in_turn_and_compile_together():
    lowering, together = [], threading.Barrier(3, timeout=30)

    class Function:
        def lower(self, x):
            lowering.append(x)
            time.sleep(0.01)
            assert lowering == [x]
            lowering.clear()
            return self

        def compile(self):
            return together.wait()

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(partial(compiled, Function()), range(3))) == [0, 1, 2]


def test_use_ends_with_its_block():
    with pytest.raises(RuntimeError), pallas_kernels.use("third"):
        raise RuntimeError
    assert dispatch("op", fakes(), None, 1) == "second 1"


def test_nothing_is_left_when_all_refuse():
    with pytest.raises(NotImplementedError, match="too odd"):
        dispatch("op", {"first": refuse, "second": refuse}, None, 1)


def ones(*shape):
    return jnp.ones(shape)


OPS = {
    quant_matmul: ((ones(1, 4), ones(2, 4)), {}),
    quant_matmul_argmax: ((ones(1, 4), ones(2, 4)), {"known": 2}),
    swiglu: ((ones(1, 4), ones(4), ones(8, 4), ones(4, 4)), {"eps": 1e-5}),
    qkv_rope: (
        (ones(1, 1, 4), ones(4), ones(6, 4), None, ones(1, 1, 1), ones(1, 1, 1)),
        {"n_heads": 1, "n_kv_heads": 1, "eps": 1e-5},
    ),
    flash_attention: ((ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(1, 1), ones(1, 1)), {}),
    flash_decode: ((ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(1, 1, 1, 2), ones(1, 1), ones(1, 1)), {}),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_op_takes_an_implementation(op, caplog):
    arrays, options = OPS[op]
    expected = op(*arrays, **options, implementation="xla")
    with pytest.raises(NotImplementedError, match=f"{op.__name__} has no implementation 'fpga'; it has .*xla"):
        op(*arrays, **options, implementation="fpga")
    with pallas_kernels.use("fpga"):
        actual = op(*arrays, **options)
    assert f"{op.__name__} has no implementation 'fpga'" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_use_reaches_an_op_while_tracing(monkeypatch):
    """A new entry in an op's table is all that a kernel needs."""
    monkeypatch.setitem(MATMULS, "fake", lambda *_: jnp.full((1, 2), 42.0))
    x, weight = jnp.ones((1, 4)), jnp.ones((2, 4))
    with pallas_kernels.use("fake"):
        assert jax.jit(lambda: quant_matmul(x, weight))()[0, 0] == 42
    assert jax.jit(lambda: quant_matmul(x, weight))()[0, 0] == 4


# top_k


@pytest.mark.parametrize(
    ("rows", "width", "k"), [(1, 5000, 64), (3, 4097, 1), (2, 1600, 128), (9, 33000, 64), (2, 40, 40), (1, 151936, 64)]
)
def test_the_tournament_finds_the_largest_in_order(rows, width, k):
    rng = np.random.default_rng(width)
    x = np.round(rng.standard_normal((rows, width)) * 8).astype(np.float32) / 8  # ties at every rank
    x[:, width // 3 : width // 2] = -np.inf
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    for op in (tournament, pallas_kernels.top_k):
        values, ids = jax.jit(op, static_argnums=1)(x, k)
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))


@pytest.mark.parametrize("width", [100, 5000, 40000])
def test_a_nan_is_the_largest_of_its_row(width):
    x = normal(1, 3, width).at[1, width // 2].set(jnp.nan).at[2, 5].set(jnp.inf)
    for op in (tournament, pallas_kernels.top_k):
        values, ids = jax.jit(op, static_argnums=1)(x, 4)
        assert jnp.isnan(values[:, 0]).tolist() == [False, True, False] and ids[2, 0] == 5


def test_top_k_of_the_first_numbers_of_a_row():
    x = normal(1, 2, 900)
    for actual, expected in zip(pallas_kernels.top_k(x, 7, known=500), jax.lax.top_k(x[:, :500], 7), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_tournament_takes_rows_of_nothing_but_minus_infinity():
    values, ids = tournament(jnp.full((1, 3000), -jnp.inf), 5)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(values, np.full((1, 5), -np.inf))
