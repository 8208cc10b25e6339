"""The decoder against what HF transformers computed, and against itself in other shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SPECS, checksum, known_tokens, random_weights

import orcd_jax
from orcd_jax.config import ModelConfig
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params

CPU = jax.devices("cpu")[0]
forward = jax.jit(orcd_jax.forward, static_argnames="config")


def load(path, context=None, weights="f32"):
    file = GGUFFile.open(path)
    config = ModelConfig.from_gguf(file, context)
    return load_params(file, config, weights, CPU), config


def golden(name):
    data = np.load(f"{__file__.rpartition('/')[0]}/goldens/{name}.npz")
    assert data["checksum"] == checksum(random_weights(SPECS[name])), "the goldens are of other weights"
    return data


def whole(params, config, tokens, length=128):
    cache = orcd_jax.init_cache(config, 1, length)
    return np.asarray(forward(params, config, jnp.asarray(tokens)[None], cache)[0][0])


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_transformers(tiny, name, figure):
    data = golden(name)
    path = tiny(name)
    worst = 0.0
    for n in range(sum(key.startswith("tokens_") for key in data)):
        tokens, expected = data[f"tokens_{n}"], data[f"logits_{n}"]
        # Longrope's factors follow from the context: short up to 64 tokens, long beyond.
        params, config = load(path, context=64 if name == "phi3-longrope" and len(tokens) <= 64 else None)
        error = np.abs(whole(params, config, tokens) - expected).max() / np.abs(expected).max()
        worst = max(worst, error)
    figure(f"{name}: logits differ from transformers' by {worst:.1e} of the largest")
    assert worst < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "phi3", "llama-odd"])
def test_greedy_tokens_are_those_of_transformers(tiny, name):
    data = golden(name)
    params, config = load(tiny(name))
    config = dataclasses.replace(config, known_tokens=known_tokens(SPECS[name]))
    for n in range(3):
        tokens, expected = data[f"tokens_{n}"], data[f"greedy_{n}"]
        assert data[f"gaps_{n}"].min() > 1e-3, "a tie: the golden decides nothing"
        result = orcd_jax.generate_tokens(
            params, config, jnp.asarray(tokens)[None], jnp.array([len(tokens)]), jax.random.key(0),
            max_new_tokens=len(expected), sampling=orcd_jax.Sampling(temperature=0.0),
        )  # fmt: skip
        assert result[0].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "llama"])
def test_chunks_give_the_whole(tiny, name):
    """Prefill in pieces, padded pieces and single tokens computes what one pass does, past the window too."""
    params, config = load(tiny(name))
    tokens = golden(name)["tokens_2"]
    expected = whole(params, config, tokens)
    cache = orcd_jax.init_cache(config, 1, 64)
    pieces, start = [], 0
    for count, size in [(7, 7), (1, 1), (9, 16), (1, 1), (22, 32)]:
        chunk = np.full((1, size), 5, np.int32)
        chunk[0, :count] = tokens[start : start + count]
        logits, cache = forward(params, config, jnp.asarray(chunk), cache, jnp.array([count]))
        pieces.append(np.asarray(logits)[0, :count])
        start += count
    assert start == len(tokens) == cache.lengths[0]
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-5 * np.abs(expected).max())


def test_rows_do_not_see_each_other(tiny):
    """A ragged, padded batch computes for each row what the row gets alone."""
    params, config = load(tiny("phi3"))
    rng = np.random.default_rng(0)
    counts = np.array([1, 12, 30, 5])
    tokens = rng.integers(0, config.vocab_size, (4, 30))
    logits, cache = forward(
        params, config, jnp.asarray(tokens), orcd_jax.init_cache(config, 4, 40), jnp.asarray(counts, jnp.int32)
    )
    assert cache.lengths.tolist() == counts.tolist()
    for row, count in enumerate(counts):
        alone = whole(params, config, tokens[row, :count], 40)
        np.testing.assert_allclose(np.asarray(logits)[row, :count], alone, atol=1e-5 * np.abs(alone).max())


def test_a_slot_beyond_the_length_is_never_seen(tiny):
    """Whatever lies in unused slots, changes no logit."""
    params, config = load(tiny("qwen2"))
    tokens = jnp.asarray(golden("qwen2")["tokens_1"])[None]
    clean = orcd_jax.init_cache(config, 1, 32)
    dirty = dataclasses.replace(clean, layers=jax.tree.map(lambda x: jnp.full_like(x, 1e4), clean.layers))
    np.testing.assert_array_equal(forward(params, config, tokens, clean)[0], forward(params, config, tokens, dirty)[0])


def test_pure_functions_compose(tiny):
    """jit, vmap and eval_shape over `forward`: it holds no host state."""
    params, config = load(tiny("llama"))
    tokens = jnp.asarray(golden("llama")["tokens_2"])[None]
    expected = whole(params, config, tokens[0], 64)

    def run(tokens):
        return orcd_jax.forward(params, config, tokens[None], orcd_jax.init_cache(config, 1, 64))[0][0]

    mapped = jax.jit(jax.vmap(run))(jnp.concatenate([tokens, tokens]))
    np.testing.assert_allclose(mapped[1], expected, atol=1e-5 * np.abs(expected).max())
    shape = jax.eval_shape(run, jax.ShapeDtypeStruct((9,), jnp.int32))
    assert shape.shape == (9, config.vocab_size) and shape.dtype == jnp.float32


def test_bf16_activations_stay_close(tiny):
    params, config = load(tiny("llama"), weights="bf16")
    half = dataclasses.replace(config, dtype="bfloat16")
    tokens = golden("llama")["tokens_2"]
    expected = whole(params, config, tokens)
    error = np.linalg.norm(whole(params, half, tokens) - expected) / np.linalg.norm(expected)
    # Each layer rounds its stream a few times to 2^-9; random signs add up as the square root of the roundings.
    assert 1e-5 < error < 2**-9 * np.sqrt(16 * config.n_layers)
