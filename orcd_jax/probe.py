"""The engine's programs alone, on caches that already hold tokens, for benchmarks and profiles."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orcd_jax import decoding
from orcd_jax.language_model import GREEDY, LanguageModel
from orcd_jax.sampling import Sampling, row_keys

_FOREVER = 1 << 30


class Probe:
    """A prefill or decode program with random arguments, to be run again and again.

    Attributes:
      compiled: the program. Of prefill it takes a chunk of prompt and emits the next token.
      compile_s: seconds that tracing and compiling took.
      held: tokens in each row's cache before each run.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: int,
        held: int,
        *,
        prompt: int | None = None,
        steps: int = 32,
        slots: int | None = None,
        sampling: Sampling = GREEDY,
    ):
        """
        Args:
          model: whose engine to take.
          batch: rows.
          held: tokens that each row's cache holds already.
          prompt: tokens a row of a prefill; None: decode.
          steps: tokens a row of a decode.
          slots: length of the cache; None: what `held` and the new tokens need.
          sampling: of every row.
        """
        self.held, self._model, self._batch = held, model, batch
        config = model.config
        slots = slots or held + (prompt or steps)
        with jax.default_device(model.device):
            self._state = _random_cache(self._start(config, slots, sampling))
            if prompt is None:
                self._rest: tuple[Any, ...] = ()
                call = partial(_decode, config, steps)
            else:
                random = np.random.default_rng(0)
                tokens = random.integers(0, config.vocab_size, (batch, prompt)).astype(np.int32)
                self._rest = (jnp.asarray(tokens), jnp.full(batch, prompt, jnp.int32))
                call = partial(_prefill, config)
            began = time.perf_counter()
            program = jax.jit(call, donate_argnums=1)
            self.compiled = program.lower(model.params, self._state, *self._rest).compile()
            self.compile_s = time.perf_counter() - began

    def _start(self, config: Any, slots: int, sampling: Sampling) -> decoding.DecodeState:
        stop_ids = jnp.full((self._batch, decoding.MAX_STOP_IDS), decoding.NO_TOKEN, jnp.int32)
        remaining = jnp.full(self._batch, _FOREVER, jnp.int32)
        keys = row_keys(list(range(self._batch)))
        return decoding.init_state(config, remaining, keys, stop_ids, sampling.rows(self._batch), slots)

    def run(self, times: int = 1) -> None:
        """Run the program so often, back to back, and wait for the last one's tokens."""
        with jax.default_device(self._model.device):
            for _ in range(times):
                lengths = jnp.full(self._batch, self.held, jnp.int32)
                state = replace(self._state, cache=replace(self._state.cache, lengths=lengths))
                self._state, tokens = self.compiled(self._model.params, state, *self._rest)
        np.asarray(tokens)


def _decode(config: Any, steps: int, params: Any, state: decoding.DecodeState) -> Any:
    state, emitted = decoding.decode(params, config, state, steps)
    return state, emitted.tokens


def _prefill(config: Any, params: Any, state: decoding.DecodeState, tokens: jax.Array, counts: jax.Array) -> Any:
    hidden = jnp.zeros((tokens.shape[0], config.d_model), config.activation_dtype)
    state, hidden = decoding.prefill(params, config, state, hidden, tokens, counts)
    state, emitted = decoding.emit(params, config, state, hidden)
    return state, emitted.tokens


@partial(jax.jit, donate_argnums=0)
def _random_cache(state: decoding.DecodeState) -> decoding.DecodeState:
    """The state with numbers in its cache, as from a prompt."""

    def fill(x: jax.Array) -> jax.Array:
        key = jax.random.key(x.size)
        if x.dtype == jnp.int8:
            return jax.random.randint(key, x.shape, -127, 128, x.dtype)
        return jax.random.uniform(key, x.shape, x.dtype) / (100 if x.ndim == 3 else 1)  # scales are small

    return replace(state, cache=replace(state.cache, layers=jax.tree.map(fill, state.cache.layers)))
