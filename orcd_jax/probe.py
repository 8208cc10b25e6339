"""The engine's programs alone, on caches that already hold tokens, and what the device can do: to measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax import decoding
from orcd_jax.config import ModelConfig
from orcd_jax.language_model import GREEDY, LanguageModel
from orcd_jax.sampling import Method, Sampling, row_keys
from pallas_kernels.implementation import compiled

_FOREVER = 1 << 30
Value = TypeVar("Value")


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
        model.check_capacity(batch, slots, prompt or 1)
        with jax.default_device(model.device):
            start = partial(_start, config, batch, slots, sampling)
            self._state = _random_cache(start())
            random = np.random.default_rng(0)
            tokens = random.integers(0, config.vocab_size, (batch, prompt or 0)).astype(np.int32)
            self._rest = () if prompt is None else (jnp.asarray(tokens), jnp.full(batch, prompt, jnp.int32))
            began = time.perf_counter()
            method = model.sampling_method([sampling])
            self.compiled = _compile(model, prompt is None, steps, method, self._state, *self._rest)
            self.compile_s = time.perf_counter() - began

    def run(self) -> None:
        """Run the program and wait for its tokens."""
        np.asarray(self._launch())

    def measure(self, repeat: int, runs: int = 1) -> list[float]:
        """Seconds of a run among others, `repeat` times the mean of `runs` of them, after two to warm up.

        Measured from end to end: the device begins a run when it has ended the one before, since the host has enqueued
        it meanwhile, as in `generate`. What it takes the host to start a program and to fetch its tokens is in none.
        """
        ends = []
        ahead = self._launch()
        for _ in range(2 + repeat * runs):
            tokens, ahead = ahead, self._launch()
            np.asarray(tokens)
            ends.append(time.perf_counter())
        jax.block_until_ready(ahead)
        return [(end - start) / runs for start, end in pairwise(ends[1::runs])]

    def _launch(self) -> jax.Array:
        with jax.default_device(self._model.device):
            lengths = jnp.full(self._batch, self.held, jnp.int32)
            state = replace(self._state, cache=replace(self._state.cache, lengths=lengths))
            self._state, tokens = self.compiled(self._model.params, state, *self._rest)
        return tokens


def program_memory(model: LanguageModel, batch: int, slots: int, *, prompt: int | None = None) -> Any:
    """XLA's account of a program's memory (`memory_analysis()`), which is compiled and not run.

    Args:
      prompt: tokens a row of a prefill; None: decode.
    """
    state = jax.eval_shape(partial(_start, model.config, batch, slots, GREEDY))
    shapes = () if prompt is None else ((batch, prompt), (batch,))
    rest = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    with jax.default_device(model.device):
        return _compile(model, prompt is None, 8, "any", state, *rest).memory_analysis()


def _start(config: ModelConfig, batch: int, slots: int, sampling: Sampling) -> decoding.DecodeState:
    stop_ids = jnp.full((batch, decoding.MAX_STOP_IDS), decoding.NO_TOKEN, jnp.int32)
    keys = row_keys([0] * batch)
    remaining = jnp.full(batch, _FOREVER, jnp.int32)
    return decoding.init_state(config, remaining, keys, stop_ids, sampling.rows(batch), slots)


def _compile(model: LanguageModel, decode: bool, steps: int, method: Method, *args: Any) -> jax.stages.Compiled:
    call = partial(_decode, model.config, steps, method) if decode else partial(_prefill, model.config, method)
    with model.tracing():
        return compiled(jax.jit(call, donate_argnums=1), model.params, *args)


def _decode(config: ModelConfig, steps: int, method: Method, params: Any, state: decoding.DecodeState) -> Any:
    state, emitted = decoding.decode(params, config, state, steps, method=method)
    return state, emitted.tokens


def _prefill(
    config: ModelConfig, method: Method, params: Any, state: decoding.DecodeState, tokens: jax.Array, counts: jax.Array
) -> Any:
    hidden = jnp.zeros((tokens.shape[0], config.d_model), config.activation_dtype)
    state, hidden = decoding.prefill(params, config, state, hidden, tokens, counts)
    state, emitted = decoding.emit(params, config, state, hidden, method=method)
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


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best, measured."""

    read_bytes_s: float  # a matrix-vector product's reads
    matmul_flops_s: float  # a large square matrix product in the activations' dtype

    def seconds(self, read: float, flops: float) -> float:
        """The least time for so many bytes and operations."""
        return max(read / self.read_bytes_s, flops / self.matmul_flops_s)

    def __str__(self) -> str:
        return f"measured ceilings: {self.read_bytes_s / 1e9:.1f} GB/s, {self.matmul_flops_s / 1e12:.2f} TFLOP/s"


def measure_ceilings(device: jax.Device, dtype: jnp.dtype) -> Ceilings:
    """Measure a device: reads far beyond what a cache holds, and products of matrices in `dtype`."""
    on_cpu = device.platform == "cpu"
    with jax.default_device(device):
        return Ceilings(_read_bandwidth(1 << (28 if on_cpu else 32)), _matmul_rate(1 << (10 if on_cpu else 13), dtype))


def _read_bandwidth(size: int, rounds: int = 8) -> float:
    """Bytes a second that matrix-vector products with a matrix of `size` bytes in float32 read: decoding's ceiling."""
    width = 4096
    matrix = jnp.ones((size // 4 // width, width), jnp.float32)

    @jax.jit
    def products(matrix: jax.Array, vector: jax.Array) -> jax.Array:
        def once(vector: jax.Array, _: None) -> tuple[jax.Array, None]:
            out = jnp.einsum("oi,i->o", matrix, vector)
            return vector + 1e-9 * out[:width], None  # so that each waits for the last

        return lax.scan(once, vector, None, length=rounds)[0]

    vector = jnp.ones(width, jnp.float32)
    return rounds * size / min(measure(lambda: jax.block_until_ready(products(matrix, vector)), 5))


def _matmul_rate(width: int, dtype: jnp.dtype, rounds: int = 4) -> float:
    """Operations a second of products of square matrices."""

    @jax.jit
    def products(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.fori_loop(0, rounds, lambda _, x: x @ w, x)

    key = jax.random.key(0)
    x, w = (jax.random.normal(k, (width, width), dtype) * width**-0.5 for k in jax.random.split(key))
    return rounds * 2 * width**3 / min(measure(lambda: jax.block_until_ready(products(x, w)), 5))


def settled(take: Callable[[], list[Value]], device: jax.Device, value: Callable[[Any], float] = float) -> list[Value]:
    """What `take` measures, on a GPU taken up to four times, all together, while `noise` is above 1 %."""
    values = take()
    for _ in range(3):
        if device.platform == "cpu" or noise([value(each) for each in values]) <= 0.01:
            break
        values += take()
    return values


def noise(values: Sequence[float]) -> float:
    """Half of what the middle half of the values spans, as a share of their median; 0 of one alone."""
    if len(values) < 2:
        return 0.0
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / median


def measure(call: Callable[[], Any], repeat: int) -> list[float]:
    """Seconds that each of `repeat` calls took, after one to warm up."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
