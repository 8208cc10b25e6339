"""KVCache: what a write stores and what it leaves alone, against a loop in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orcd_jax
from orcd_jax.cache import KVCache
from orcd_jax.config import ModelConfig
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params

CONFIG = ModelConfig(
    name="tiny", architecture="llama", vocab_size=8, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=3,
    d_ff=8, context_length=16, rms_norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
ROWS, CHUNK, CAPACITY = 3, 4, 10
write = jax.jit(KVCache.write, static_argnames="layer")


def filled(seed, dtype="float32"):
    """A cache of random values."""
    empty = orcd_jax.init_cache(dataclasses.replace(CONFIG, dtype=dtype), ROWS, CAPACITY)
    rng = np.random.default_rng(seed)
    layers = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty.layers)
    return dataclasses.replace(empty, layers=layers)


def new_tokens(seed):
    """Keys and values [B, T, K, H]."""
    shape = (2, ROWS, CHUNK, CONFIG.n_kv_heads, CONFIG.head_dim)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_cache(dtype):
    cache = orcd_jax.init_cache(dataclasses.replace(CONFIG, dtype=dtype), ROWS, CAPACITY)
    arrays = jax.tree.leaves(cache.layers)
    assert len(arrays) == 2 * CONFIG.n_layers
    assert all(x.shape == (ROWS, 2, CAPACITY, 3) and x.dtype == dtype and not x.any() for x in arrays)
    assert sum(x.nbytes for x in arrays) == dataclasses.replace(CONFIG, dtype=dtype).cache_bytes(ROWS, CAPACITY)
    assert cache.capacity == CAPACITY
    assert cache.lengths.dtype == jnp.int32 and cache.lengths.tolist() == [0] * ROWS
    assert cache.key_positions().tolist() == [list(range(CAPACITY))]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, CAPACITY + CHUNK), min_size=ROWS, max_size=ROWS),
    st.lists(st.lists(st.booleans(), min_size=CHUNK, max_size=CHUNK), min_size=ROWS, max_size=ROWS),
    st.integers(0, 1),
)
def test_write_stores_valid_tokens_at_their_positions(starts, valid, layer):
    """Each row from its own start; what is not valid, or lies beyond the capacity, is dropped."""
    cache, (k, v) = filled(1), new_tokens(2)
    positions = np.array(starts, np.int32)[:, None] + np.arange(CHUNK, dtype=np.int32)
    expected = [np.array(x) for x in cache.layers[layer]]
    for row, column in np.ndindex(ROWS, CHUNK):
        if valid[row][column] and positions[row, column] < CAPACITY:
            for stored, new in zip(expected, (k, v), strict=True):
                stored[row, :, positions[row, column]] = new[row, column]
    actual = write(cache, layer, k, v, positions, np.array(valid))
    np.testing.assert_array_equal(actual.keys, expected[0])
    np.testing.assert_array_equal(actual.values, expected[1])


def test_write_takes_the_cache_dtype():
    cache, (k, v) = filled(1, "bfloat16"), new_tokens(2)
    positions = jnp.tile(jnp.arange(CHUNK, dtype=jnp.int32), (ROWS, 1))
    stored = write(cache, 1, k, v, positions, jnp.ones((ROWS, CHUNK), bool))
    assert stored.keys.dtype == stored.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored.keys[:, :, :CHUNK], k.swapaxes(1, 2).astype(jnp.bfloat16))


def test_forward_appends_the_real_tokens_alone(tiny):
    """Slots before a row's length and from its new length on keep every bit, in every layer."""
    file = GGUFFile.open(tiny("qwen2"))
    config = ModelConfig.from_gguf(file)
    params = load_params(file, config, "f32", jax.devices("cpu")[0])
    empty = orcd_jax.init_cache(config, 4, 12)
    before = KVCache(jax.tree.map(lambda x: jnp.full_like(x, 7.0), empty.layers), jnp.array([0, 3, 8, 5], jnp.int32))
    counts = jnp.array([4, 2, 4, 0], jnp.int32)
    forward = jax.jit(orcd_jax.forward, static_argnames="config")
    _, after = forward(params, config, jnp.ones((4, 4), jnp.int32), before, counts)
    assert after.lengths.tolist() == [4, 5, 12, 5]
    slots, first, end = np.arange(12), np.asarray(before.lengths)[:, None], np.asarray(after.lengths)[:, None]
    written = (slots >= first) & (slots < end)
    for array in map(np.asarray, jax.tree.leaves(after.layers)):
        np.testing.assert_array_equal((array != 7.0).all(axis=(1, 3)), written)
        np.testing.assert_array_equal((array == 7.0).all(axis=(1, 3)), ~written)
