"""What an update of a cache stores and what it leaves alone, against a loop in NumPy.

What the policies keep and what queries see of it: test_cache_policies.py.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orcd_jax
from orcd_jax.cache import FullCache, Int8Rows
from orcd_jax.cache_policy import CachePolicy
from orcd_jax.config import ModelConfig
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params

CONFIG = ModelConfig(
    name="tiny", architecture="llama", vocab_size=8, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=3,
    d_ff=8, context_length=16, rms_norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
ROWS, CHUNK, CAPACITY = 3, 4, 10
INT8 = dataclasses.replace(CONFIG, cache=CachePolicy.parse("int8"))


@partial(jax.jit, static_argnames="layer")
def update(cache, layer, k, v, positions, valid):
    return cache.update(layer, k, v, positions, valid)[0]


def filled(seed):
    """A cache of random values."""
    empty = orcd_jax.init_cache(CONFIG, ROWS, CAPACITY)
    rng = np.random.default_rng(seed)
    layers = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty.layers)
    return dataclasses.replace(empty, layers=layers)


def new_tokens(seed):
    """Keys and values [B, T, K, H]."""
    shape = (2, ROWS, CHUNK, CONFIG.n_kv_heads, CONFIG.head_dim)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_cache(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    cache = orcd_jax.init_cache(config, ROWS, CAPACITY)
    arrays = jax.tree.leaves(cache.layers)
    assert len(arrays) == 2 * CONFIG.n_layers
    assert all(x.shape == (ROWS, 2, CAPACITY, 3) and x.dtype == dtype and not x.any() for x in arrays)
    assert sum(x.nbytes for x in arrays) == config.cache_bytes(ROWS, CAPACITY)
    assert cache.lengths.dtype == jnp.int32 and cache.lengths.tolist() == [0] * ROWS


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, CAPACITY + CHUNK), min_size=ROWS, max_size=ROWS),
    st.lists(st.lists(st.booleans(), min_size=CHUNK, max_size=CHUNK), min_size=ROWS, max_size=ROWS),
    st.integers(0, 1),
)
def test_update_stores_valid_tokens_at_their_positions(starts, valid, layer):
    """Each row from its own start; what is not valid, or lies beyond the capacity, is dropped."""
    cache, (k, v) = filled(1), new_tokens(2)
    positions = np.array(starts, np.int32)[:, None] + np.arange(CHUNK, dtype=np.int32)
    expected = [np.array(x) for x in cache.layers[layer]]
    for row, column in np.ndindex(ROWS, CHUNK):
        if valid[row][column] and positions[row, column] < CAPACITY:
            for stored, new in zip(expected, (k, v), strict=True):
                stored[row, :, positions[row, column]] = new[row, column]
    actual = update(cache, layer, k, v, positions, np.array(valid))
    np.testing.assert_array_equal(actual.keys, expected[0])
    np.testing.assert_array_equal(actual.values, expected[1])


POSITIONS = jnp.tile(jnp.arange(2, 2 + CHUNK, dtype=jnp.int32), (ROWS, 1))


def test_update_takes_the_cache_dtype():
    cache, (k, v) = orcd_jax.init_cache(dataclasses.replace(CONFIG, dtype="bfloat16"), ROWS, CAPACITY), new_tokens(2)
    stored = update(cache, 1, k, v, POSITIONS, jnp.ones((ROWS, CHUNK), bool))
    for array, new in zip(stored, (k, v), strict=True):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array[:, :, 2 : 2 + CHUNK], new.swapaxes(1, 2).astype(jnp.bfloat16))


def dequantised(rows):
    """float64 values [B, K, T, H] and scales [B, K, T] of the slots that were written."""
    assert isinstance(rows, Int8Rows) and rows.values.dtype == jnp.int8 and rows.scales.dtype == jnp.float16
    values, scales = (np.asarray(x)[:, :, 2 : 2 + CHUNK].astype(np.float64) for x in rows)
    assert np.all(np.abs(values).max(axis=-1) == np.where(scales > 0, 127, 0))
    return values * scales[..., None], scales


def test_int8_rows_are_within_half_a_step():
    """A scale for each head and position; a row of zeros stays one."""
    cache, new = orcd_jax.init_cache(INT8, ROWS, CAPACITY), new_tokens(2).at[:, 1, 2].set(0.0)
    stored = update(cache, 0, *new, POSITIONS, jnp.ones((ROWS, CHUNK), bool))
    k, v = np.asarray(new, np.float64).swapaxes(2, 3)
    values, steps = dequantised(stored.values)
    assert np.all(np.abs(values - v) <= 0.5001 * steps[..., None])
    # Keys may be stored turned: what counts is their products, off by a step's half in each dimension.
    keys, steps = dequantised(stored.keys)
    lengths = np.linalg.norm(k, axis=-1)
    errors = 0.5001 * steps * np.sqrt(CONFIG.head_dim)
    bound = lengths[..., None] * errors[..., None, :] + errors[..., None] * (lengths + errors)[..., None, :]
    assert np.all(np.abs(keys @ keys.swapaxes(2, 3) - k @ k.swapaxes(2, 3)) <= bound + 1e-6)
    assert not values[1, :, 2].any() and not keys[1, :, 2].any()


def test_update_says_what_lies_where():
    """One segment: the layer as stored, slots in the order of positions, and the model's own window."""
    cache, (k, v) = filled(1), new_tokens(2)
    windowed = dataclasses.replace(cache, window=5)
    for each in (cache, windowed):
        stored, (segment,) = each.update(0, k, v, POSITIONS, jnp.ones((ROWS, CHUNK), bool))
        assert segment.layer is stored
        assert segment.positions.tolist() == [list(range(CAPACITY))]
        assert segment.visibility.window == each.window
        assert (segment.visibility.nearest, segment.visibility.sinks) == (0, 0)


def test_forward_appends_the_real_tokens_alone(tiny):
    """Slots before a row's length and from its new length on keep every bit, in every layer."""
    file = GGUFFile.open(tiny("qwen2"))
    config = ModelConfig.from_gguf(file)
    params = load_params(file, config, "f32", jax.devices("cpu")[0])
    empty = orcd_jax.init_cache(config, 4, 12)
    sevens = jax.tree.map(lambda x: jnp.full_like(x, 7.0), empty.layers)
    before = FullCache(sevens, jnp.array([0, 3, 8, 5], jnp.int32), None)
    counts = jnp.array([4, 2, 4, 0], jnp.int32)
    forward = jax.jit(orcd_jax.forward, static_argnames="config")
    _, after = forward(params, config, jnp.ones((4, 4), jnp.int32), before, counts)
    assert after.lengths.tolist() == [4, 5, 12, 5]
    slots, first, end = np.arange(12), np.asarray(before.lengths)[:, None], np.asarray(after.lengths)[:, None]
    written = (slots >= first) & (slots < end)
    for array in map(np.asarray, jax.tree.leaves(after.layers)):
        np.testing.assert_array_equal((array != 7.0).all(axis=(1, 3)), written)
        np.testing.assert_array_equal((array == 7.0).all(axis=(1, 3)), ~written)
