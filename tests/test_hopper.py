"""Whole models on the kernels, at our models' widths with two layers, against plain XLA in float32 and in bfloat16."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_kernels
from orcd_jax import decoding, packed_decoding
from orcd_jax.cache import init_cache
from orcd_jax.config import ModelConfig
from orcd_jax.loader import random_params
from orcd_jax.sampling import Sampling, row_keys
from pallas_kernels.decode_step import ROWS
from pallas_kernels.implementation import on_hopper

STEPS = 4
CASES = {
    "one": (1, 37, 64), "one far on": (1, 700, 2048), "three": (3, 37, 64), "eight": (8, 130, 256),
    "sixteen": (16, 50, 128), "many": (64, 130, 256), "a hundred": (100, 13, 64), "longer than a window": (1, 520, 600),
}  # fmt: skip


def small(preset):
    config = ModelConfig.from_preset(preset)
    window = None if config.sliding_window is None else 512
    return replace(config, n_layers=2, vocab_size=4096, known_tokens=4096, dtype="bfloat16", sliding_window=window)


@partial(jax.jit, static_argnames=("config", "slots", "implementation"))
def logits(params, config, tokens, counts, following, slots, implementation):
    """Of the prompts' last tokens and of those that follow, float32 [1 + STEPS, B, V]; by one op where packed."""
    with pallas_kernels.use(implementation):
        cache = init_cache(config, len(tokens), slots)
        hidden, cache = decoding.hidden_states(params, config, tokens, cache, counts)
        last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]
        first = decoding.head(params, config, last)

        def step(carry, token):
            cache, handover = carry
            if handover is not None:
                ones = jnp.ones_like(token)
                result, cache, handover = packed_decoding.step(params, config, token, cache, ones, handover)
                return (cache, handover), result
            hidden, cache = decoding.hidden_states(params, config, token[:, None], cache)
            return (cache, None), decoding.head(params, config, hidden[:, 0])

        _, rest = lax.scan(step, (cache, packed_decoding.begin(params, config, cache)), following)
    return jnp.concatenate([first[None], rest])


def errors(actual, expected):
    """Each row's relative error."""
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize(
    "case, packed",
    [(name, packed) for name, (batch, *_) in CASES.items() for packed in (False, True)[: 1 + (batch <= ROWS)]],
)
@pytest.mark.parametrize("preset", ["qwen2.5-0.5b", "phi-3-mini-4k"])
def test_the_kernels_are_as_right_as_bfloat16_allows(preset, case, packed):
    if not on_hopper():
        pytest.skip("needs an NVIDIA Hopper GPU")
    batch, length, slots = CASES[case]
    config, rng = small(preset), np.random.default_rng(batch)
    params = random_params(config, "int8", jax.devices()[0])
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (batch, length)), jnp.int32)
    counts = jnp.asarray(rng.integers(length // 2, length, batch) if batch > 1 else [length], jnp.int32)
    following = jnp.asarray(rng.integers(0, config.vocab_size, (STEPS, batch)), jnp.int32)
    run = partial(logits, tokens=tokens, counts=counts, following=following, slots=slots)
    expected = np.asarray(run(params, replace(config, dtype="float32"), implementation="xla"))
    plain = errors(np.asarray(run(params, config, implementation="xla")), expected)
    used = packed_decoding.pack(params, config) if packed else params
    assert (packed_decoding.PACKED in used) == packed
    found, again = (np.asarray(run(used, config, implementation="mosaic_gpu")) for _ in range(2))
    assert np.array_equal(found, again)
    # Both round to bfloat16, at different places.
    assert errors(found, expected).max() < 2 * plain.max()


@partial(jax.jit, static_argnames=("config", "method"))
def decoded(params, config, state, tokens, counts, method):
    hidden = jnp.zeros((len(tokens), config.d_model), config.activation_dtype)
    with pallas_kernels.use("mosaic_gpu"):
        state, hidden = decoding.prefill(params, config, state, hidden, tokens, counts)
        state, first = decoding.emit(params, config, state, hidden, method=method)
        state, rest = decoding.decode(params, config, state, STEPS, method=method)
    return jnp.concatenate([first.tokens[None], rest.tokens]), state.seen, state.remaining


@pytest.mark.parametrize("batch", [4, 64, 100, 128])
@pytest.mark.parametrize("preset", ["qwen2.5-0.5b", "phi-3-mini-4k"])
def test_tokens_without_logits_are_the_same(preset, batch):
    if not on_hopper():
        pytest.skip("needs an NVIDIA Hopper GPU")
    config, rng = replace(small(preset), vocab_size=8192, known_tokens=8000), np.random.default_rng(batch)
    params = random_params(config, "int8", jax.devices()[0])
    tokens = jnp.asarray(rng.integers(0, config.known_tokens, (batch, 20)), jnp.int32)
    counts = jnp.asarray(rng.integers(1, 21, batch), jnp.int32)
    remaining = jnp.asarray(rng.integers(0, STEPS + 2, batch), jnp.int32)
    sampling, stop_ids = Sampling(temperature=0.0).rows(batch), jnp.full((batch, 1), decoding.NO_TOKEN, jnp.int32)
    state = decoding.init_state(config, remaining, row_keys([0] * batch), stop_ids, sampling, 64)
    results = [
        jax.tree.map(np.asarray, decoded(params, config, state, tokens, counts, method))
        for method in ("greedy", "argmax", "argmax")
    ]
    jax.tree.map(lambda *same: [np.testing.assert_array_equal(x, same[0]) for x in same], *results)
