"""Cache policies: what they keep, what a query sees, and that chunks and batches do not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orcd_jax
from orcd_jax.cache import CompressedCache, FullCache, SlidingCache, _spreading_matrix, init_cache
from orcd_jax.cache_policy import CachePolicy
from orcd_jax.config import ModelConfig
from orcd_jax.errors import RequestError
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params

forward = jax.jit(orcd_jax.forward, static_argnames="config")
POLICIES = ["full", "int8", "sliding:9", "sliding:9:0", "sliding:9+int8", "compress:7"]


@pytest.fixture(scope="module")
def load(tiny):
    loaded = {}

    def get(name, policy):
        if name not in loaded:
            file = GGUFFile.open(tiny(name))
            config = ModelConfig.from_gguf(file)
            loaded[name] = load_params(file, config, "f32", jax.devices("cpu")[0]), config
        params, config = loaded[name]
        return params, dataclasses.replace(config, cache=CachePolicy.parse(policy))

    return get


def run(params, config, tokens, sizes, length=64):
    """Logits of `tokens` [T], fed in chunks of (tokens, padded size). Few sizes, so that few programs are compiled."""
    cache, start, pieces = init_cache(config, 1, length), 0, []
    for count, size in sizes:
        chunk = np.full((1, size), 3, np.int32)
        chunk[0, :count] = tokens[start : start + count]
        logits, cache = forward(params, config, jnp.asarray(chunk), cache, jnp.array([count]))
        pieces.append(np.asarray(logits)[0, :count])
        start += count
    assert start == len(tokens)
    return np.concatenate(pieces)


def reference(params, config, tokens, keep):
    """Logits with an attention that sees key s from query t where keep(t, s), from a full cache's op with a mask."""
    from pallas_kernels.flash_attention import Visibility

    class Mask(Visibility):
        def mask(self, positions, key_positions):
            seen = np.array([[keep(t, s) and s <= t for s in range(64)] for t in range(64)])
            return jnp.asarray(seen)[positions][:, :, : key_positions.shape[1]]

    class Cache(FullCache):
        def segments(self, *args):
            (segment,) = super().segments(*args)
            return [segment._replace(visibility=Mask())]

    cache = init_cache(dataclasses.replace(config, cache=CachePolicy(), sliding_window=None), 1, 64)
    masked = Cache(cache.layers, cache.lengths, cache.window)
    hidden, _ = orcd_jax.decoding.hidden_states(params, config, jnp.asarray(tokens)[None], masked)
    return np.asarray(orcd_jax.decoding.head(params, config, hidden))[0]


@pytest.mark.parametrize(
    ("name", "policy"), [*(("llama", policy) for policy in POLICIES), ("phi3", "full"), ("phi3", "compress:7")]
)
def test_chunks_do_not_matter(load, name, policy):
    """Fed at once, in padded chunks longer and shorter than the ring, or token by token: the same logits."""
    params, config = load(name, policy)
    tokens = np.random.default_rng(0).integers(0, 300, 45)
    whole = run(params, config, tokens, [(45, 45)])
    for sizes in ([(1, 1)] * 45, [(20, 24), (1, 1), (0, 24), (2, 24), (22, 24)], [(5, 24)] * 9):
        chunked = run(params, config, tokens, sizes)
        # int8 may round a value that differs in its last bit to a neighbouring step.
        close = 2e-2 if "int8" in policy or "compress" in policy else 1e-5
        np.testing.assert_allclose(chunked, whole, atol=close * np.abs(whole).max())


@pytest.mark.parametrize(
    ("policy", "keep"),
    [
        ("sliding:9:0", lambda t, s: t - s < 9),
        ("sliding:9", lambda t, s: t - s < 9 or s < 4),
        ("sliding:20:1", lambda t, s: t - s < 20 or s < 1),
    ],
)
def test_a_sliding_cache_sees_its_window_and_its_sinks(load, policy, keep):
    params, config = load("llama", policy)
    tokens = np.random.default_rng(1).integers(0, 300, 40)
    expected = reference(params, config, tokens, keep)
    actual = run(params, config, tokens, [(17, 24)] + [(1, 1)] * 23)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    full = run(*load("llama", "full"), tokens, [(40, 45)])
    assert np.abs(full - expected).max() > 0.1  # the window does matter here


@pytest.mark.parametrize("policy", ["sliding:40", "sliding:60:2", "compress:64", "full"])
def test_inside_the_window_it_is_full(load, policy):
    tokens = np.random.default_rng(2).integers(0, 300, 40)
    full = run(*load("qwen2", "full"), tokens, [(40, 45)])
    actual = run(*load("qwen2", policy), tokens, [(16, 24), (24, 24)])
    np.testing.assert_allclose(actual, full, atol=1e-5 * np.abs(full).max())


def test_a_model_with_a_window_keeps_no_more_than_it_sees(load):
    """Phi-3: the default is a ring of its own window; a wider window asked for changes nothing."""
    tokens = np.random.default_rng(3).integers(0, 300, 45)
    params, config = load("phi3", "full")
    cache = init_cache(config, 1, 64)
    assert isinstance(cache, SlidingCache) and cache.window == config.sliding_window == 8 and cache.sinks == 0
    expected = reference(params, config, tokens, lambda t, s: t - s < 8)
    np.testing.assert_allclose(run(params, config, tokens, [(45, 45)]), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(
        run(*load("phi3", "sliding:30"), tokens, [(45, 45)]), run(params, config, tokens, [(45, 45)])
    )
    assert isinstance(init_cache(config, 1, 8), FullCache)


@pytest.mark.parametrize("policy", ["int8", "compress:8"])
def test_int8_is_close_and_compression_closer(load, policy):
    tokens = np.random.default_rng(4).integers(0, 300, 45)
    full = run(*load("llama", "full"), tokens, [(45, 45)])
    error = np.linalg.norm(run(*load("llama", policy), tokens, [(45, 45)]) - full) / np.linalg.norm(full)
    # A row's rounding error is at most half a step of 1/127 of its largest value.
    assert 1e-6 < error < 0.5 / 127 * np.sqrt(3 * 2)  # layers, keys and values


def test_compression_keeps_recent_tokens_exact(load):
    params, config = load("llama", "compress:8")
    tokens = np.random.default_rng(5).integers(0, 300, 30)
    full = run(*load("llama", "full"), tokens, [(30, 45)])
    actual = run(params, config, tokens, [(30, 45)])
    np.testing.assert_allclose(actual[:8], full[:8], atol=1e-5 * np.abs(full).max())
    assert np.abs(actual[20:] - full[20:]).max() > 1e-4
    assert isinstance(init_cache(config, 1, 64), CompressedCache)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("policy", [*POLICIES, "compress:300", "sliding:300"])
def test_bytes_are_as_the_formula_says(load, name, policy):
    _, config = load(name, policy)
    for length in (5, 64, 200):
        cache = jax.eval_shape(lambda length=length: init_cache(config, 3, length))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
        assert held == config.cache_bytes(3, length)


@pytest.mark.parametrize("policy", ["full", "sliding:9+int8", "compress:7"])
def test_generation_in_ragged_batches(tiny, policy):
    model = orcd_jax.load(tiny("llama"), kv_cache=policy)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, 300, n).tolist() for n in (1, 33, 12)]
    together = model.generate(prompts, 30, ignore_eos=True)
    for prompt, completion in zip(prompts, together, strict=True):
        assert model.generate([prompt], 30, ignore_eos=True)[0].token_ids == completion.token_ids


def test_a_policy_is_read_by_its_name():
    for name in ("full", "int8", "sliding:5:4", "sliding:5:0", "sliding:7:2+int8", "compress:3"):
        assert CachePolicy.parse(name).name == name
    assert CachePolicy.parse("sliding:5").name == "sliding:5:4"
    for name in ("", "none", "sliding", "sliding:0", "sliding:-1", "compress:0", "sliding:x", "int8+full", None, 5):
        with pytest.raises(RequestError, match="cache policy"):
            CachePolicy.parse(name)


@pytest.mark.parametrize("width", [1, 12, 16, 64, 80, 96, 128])
def test_keys_are_spread_by_an_orthogonal_matrix(width):
    matrix = _spreading_matrix(width).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-6)
    assert width < 16 or np.abs(matrix).max() < 2 / np.sqrt(width)  # no dimension keeps its size


def test_int8_keys_survive_a_dimension_that_dwarfs_the_rest(load):
    """As the biases of Qwen2 make them: one dimension of the keys a hundred times the others."""
    params, config = load("qwen2", "int8")
    bias = params["layer_0"]["attention"]["qkv_bias"]
    big = {**params, "layer_0": {**params["layer_0"], "attention": {**params["layer_0"]["attention"]}}}
    keys = config.n_heads * config.head_dim
    big["layer_0"]["attention"]["qkv_bias"] = bias.at[keys + config.head_dim - 1].set(100.0)
    tokens = np.random.default_rng(8).integers(0, 300, 45)
    full = run(big, load("qwen2", "full")[1], tokens, [(45, 45)])
    error = np.linalg.norm(run(big, config, tokens, [(45, 45)]) - full) / np.linalg.norm(full)
    assert error < 0.5 / 127 * 100 / np.sqrt(config.head_dim)
