"""Pure generation: chunked prefill, decoding by `lax.scan`, and both as one program.

Everything a row needs is in `DecodeState`, so that one compiled program serves every prompt, length, seed and
sampling value of its shapes. Rows never look at each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax import packed_decoding
from orcd_jax.cache import KVCache, init_cache
from orcd_jax.config import ModelConfig
from orcd_jax.errors import RequestError
from orcd_jax.loader import Params
from orcd_jax.model import Decoder
from orcd_jax.sampling import Method, Sampling, penalize, portable_keys, sample, value_dtype
from pallas_kernels import top_k
from pallas_kernels.decode_step import Handover
from pallas_kernels.quant_matmul_argmax import greatest

NO_TOKEN = -1  # emitted by a row that has ended
NOT_FINITE = -2  # emitted by a row whose logits are not finite; it ends there
MAX_STOP_IDS = 16  # a row's stop ids, padded with NO_TOKEN
_PREFILL_CHUNK = 512
_STEPS_AT_ONCE = 4  # of one kernel each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch in the middle of generation; donated to each program and given back."""

    cache: KVCache
    tokens: jax.Array  # int32 [B], the last token of each row, not yet in the cache
    remaining: jax.Array  # int32 [B], tokens that a row may still emit; 0: it has ended
    seen: jax.Array  # bool [B, V], tokens of prompt and completion, for the repeat penalty
    keys: jax.Array  # random keys [B]
    stop_ids: jax.Array  # int32 [B, any], padded with NO_TOKEN
    sampling: Sampling  # values [B]


class Emitted(NamedTuple):
    """What one step, or each step of a chunk, emits."""

    tokens: jax.Array  # int32 [B], or NO_TOKEN, or NOT_FINITE; a stop id is emitted
    logprobs: jax.Array | None  # float32 [B], natural log of the token's probability before penalty and truncation
    top_ids: jax.Array | None  # int32 [B, K], the likeliest tokens
    top_logprobs: jax.Array | None  # float32 [B, K]


def forward(
    params: Params, config: ModelConfig, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
) -> tuple[jax.Array, KVCache]:
    """Run tokens against a cache and return every position's logits.

    Args:
      params: from `load(...).params`.
      config: static.
      tokens: int32 [B, T].
      cache: from `init_cache` or an earlier call, with room for T more tokens a row.
      counts: int32 [B], how many of a row's tokens are real, the rest being padding; None: all.

    Returns:
      Logits, float32 [B, T, V], and the cache with the real tokens appended.
    """
    hidden, cache = hidden_states(params, config, tokens, cache, counts)
    return head(params, config, hidden), cache


def hidden_states(
    params: Params, config: ModelConfig, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
) -> tuple[jax.Array, KVCache]:
    """As `forward`, but final hidden states [B, T, D] in place of logits."""
    if counts is None:
        counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    result: Any = Decoder(config).apply({"params": params}, tokens, cache, counts)
    return result


def head(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D]."""
    logits: Any = Decoder(config).apply({"params": params}, hidden, method="head")
    return logits


def first_not_finite(params: Params, config: ModelConfig, tokens: jax.Array) -> str | None:
    """Name the first part of the model whose output for tokens [B, T] is not finite; None if all are.

    Runs layer by layer outside `jit`: for finding out what went wrong, not for every day.
    """
    counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    cache = init_cache(config, tokens.shape[0], tokens.shape[1])
    (hidden, _), captured = Decoder(config).apply({"params": params}, tokens, cache, counts, mutable=["intermediates"])
    blocks: Any = captured["intermediates"]
    outputs = [(f"layer {i}", blocks[f"layer_{i}"][0]) for i in range(config.n_layers)]
    outputs += [("the final norm", hidden), ("the head", head(params, config, hidden))]
    return next((name for name, values in outputs if not bool(jnp.isfinite(values).all())), None)


def next_logprobs(
    params: Params, config: ModelConfig, tokens: jax.Array, cache: KVCache, counts: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Teacher-forced log-probabilities of each position's next token.

    Args:
      params, config, cache: as in `forward`.
      tokens: int32 [B, T + 1], the last one only a target.
      counts: int32 [B], real positions among the first T.

    Returns:
      float32 [B, T], natural log of each next token's probability, and the cache with the real tokens appended.
    """
    logits, cache = forward(params, config, tokens[:, :-1], cache, counts)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), cache


def init_state(
    config: ModelConfig, remaining: jax.Array, keys: jax.Array, stop_ids: jax.Array, sampling: Sampling, length: int
) -> DecodeState:
    """A state with an empty cache of `length` tokens a row; the other arguments are fields of `DecodeState`."""
    batch = remaining.shape[0]
    return DecodeState(
        cache=init_cache(config, batch, length),
        tokens=jnp.zeros(batch, jnp.int32),
        remaining=remaining,
        seen=jnp.zeros((batch, config.vocab_size), bool),
        keys=keys,
        stop_ids=stop_ids,
        sampling=sampling,
    )


def adopt(config: ModelConfig, state: DecodeState, cache: KVCache, ids: jax.Array) -> DecodeState:
    """Begin every row of an empty state with the tokens that a cache of one row holds.

    Args:
      config: the model.
      state: with an empty cache of the same policy, at least as long.
      cache: of one row. While it has not wrapped, each of its slots means the same in a longer cache.
      ids: int32 [P], its tokens, padded with V.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        if old.ndim == 1:
            return jnp.broadcast_to(new, old.shape)  # the lengths
        rows = jnp.broadcast_to(new, (old.shape[0], *new.shape[1:]))
        return lax.dynamic_update_slice(old, rows, (0,) * old.ndim)

    leaves = [put(old, new) for old, new in zip(jax.tree.leaves(state.cache), jax.tree.leaves(cache), strict=True)]
    held: KVCache = jax.tree.unflatten(jax.tree.structure(state.cache), leaves)
    return replace(state, cache=held, seen=state.seen.at[:, ids].set(True, mode="drop"))


def prefill(
    params: Params, config: ModelConfig, state: DecodeState, hidden: jax.Array, tokens: jax.Array, counts: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Append a chunk of prompt.

    Args:
      params, config: the model.
      state: what came before.
      hidden: [B, D], each row's last hidden state so far.
      tokens: int32 [B, T], right-padded.
      counts: int32 [B], real tokens of each row in this chunk, 0 for a row whose prompt has ended.

    Returns:
      The state, and each row's last hidden state, which stays as it was for a row without tokens.
    """
    states, cache = hidden_states(params, config, tokens, state.cache, counts)
    last = jnp.clip(counts - 1, 0, tokens.shape[1] - 1)
    newest = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(counts[:, None] > 0, newest, hidden)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    real = jnp.where(offsets < counts[:, None], tokens, config.vocab_size)  # padding falls outside and is dropped
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return replace(state, cache=cache, seen=state.seen.at[rows, real].set(True, mode="drop")), hidden


def emit(
    params: Params,
    config: ModelConfig,
    state: DecodeState,
    hidden: jax.Array,
    top_logprobs: int | None = None,
    method: Method = "any",
) -> tuple[DecodeState, Emitted]:
    """Choose each row's next token from its last hidden state [B, D].

    Args:
      top_logprobs: None: no log-probabilities; K >= 0: the chosen token's, and those of the K likeliest.
      method: as in `sample`.
    """
    if method == "argmax" and top_logprobs is None:
        likeliest: Any = Decoder(config).apply({"params": params}, hidden, method="likeliest")
        return _advance(state, *likeliest)
    return _emit(config, state, head(params, config, hidden), top_logprobs, method)


@jax.named_scope("sampling")
def _emit(
    config: ModelConfig, state: DecodeState, logits: jax.Array, top_logprobs: int | None, method: Method
) -> tuple[DecodeState, Emitted]:
    """As `emit`, from logits [B, V]."""
    known = config.known_tokens or config.vocab_size
    if method == "argmax" and top_logprobs is None:
        return _advance(state, *greatest(logits, known))
    masked = jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < known, logits, -jnp.inf)
    if method == "largest":  # logits as they are need not be written once more for a kernel
        given, count = logits, known
    else:
        given, count = penalize(masked, state.seen, state.sampling.repeat_penalty), None
    tokens, largest = sample(given, state.sampling, state.keys, state.cache.lengths, method, count)
    state, emitted = _advance(state, largest, tokens)
    if top_logprobs is None:
        return state, emitted
    logprobs = jax.nn.log_softmax(masked, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return state, Emitted(emitted.tokens, chosen, *reversed(top_k(logprobs, top_logprobs)))


@jax.named_scope("sampling")
def _advance(state: DecodeState, greatest: jax.Array, tokens: jax.Array) -> tuple[DecodeState, Emitted]:
    """The state after tokens [B], chosen from logits whose greatest are [B], and the tokens as they are emitted."""
    running = state.remaining > 0
    finite = jnp.isfinite(greatest)  # a NaN is the greatest
    emitted = jnp.where(running, jnp.where(finite, tokens, NOT_FINITE), NO_TOKEN)
    # A reduction, and a scatter of one row with the checks that XLA gives it, would be five more kernels in a step.
    stopped = reduce(or_, [ids == emitted for ids in state.stop_ids.T], ~finite)
    if len(tokens) == 1:
        seen = lax.dynamic_update_slice(state.seen, jnp.ones((1, 1), bool), (0, tokens[0]))
    else:
        seen = state.seen.at[jnp.arange(len(tokens), dtype=jnp.int32), tokens].set(True)
    state = replace(
        state,
        tokens=tokens,
        remaining=jnp.where(running & ~stopped, state.remaining - 1, 0),
        seen=seen,
    )
    return state, Emitted(emitted, None, None, None)


def decode(
    params: Params,
    config: ModelConfig,
    state: DecodeState,
    steps: int,
    top_logprobs: int | None = None,
    method: Method = "any",
) -> tuple[DecodeState, Emitted]:
    """Decode `steps` tokens a row with the cache as carried state; other arguments as in `emit`.

    Parameters from `packed_decoding.pack` are used by its kernel where that can be.

    Returns:
      The state, and what the steps emitted, each array [steps, B, ...].
    """

    Carry = tuple[DecodeState, Handover | None]

    def step(carry: Carry, _: None) -> tuple[Carry, Emitted]:
        state, handover = carry
        counts = (state.remaining > 0).astype(jnp.int32)  # a row that has ended writes nothing
        if handover is None:
            hidden, cache = hidden_states(params, config, state.tokens[:, None], state.cache, counts)
            state, emitted = emit(params, config, replace(state, cache=cache), hidden[:, 0], top_logprobs, method)
        else:
            logits, cache, handover = packed_decoding.step(params, config, state.tokens, state.cache, counts, handover)
            state, emitted = _emit(config, replace(state, cache=cache), logits, top_logprobs, method)
        return (state, handover), emitted

    handover = packed_decoding.begin(params, config, state.cache)
    # An iteration costs a GPU 11 us, much for a step of few kernels; more kernels would take long to compile.
    unroll = 1 if handover is None else _STEPS_AT_ONCE
    (state, _), emitted = lax.scan(step, (state, handover), None, length=steps, unroll=unroll)
    return state, emitted


def generate_tokens(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> jax.Array:
    """Generate from a batch of prompts in one program.

    Args:
      params: from `load(...).params`.
      config: static; `config.stop_ids` end a row.
      tokens: int32 [B, T], right-padded prompts.
      lengths: int32 [B], 1 to T, tokens of each prompt.
      key: one random key of `jax.random.key`, used by every row, so that a row's draws do not depend on its place in
        the batch; or keys [B], e.g. `jax.random.split(key, B)`, for different draws from like prompts.
      max_new_tokens: N, static.
      sampling: numbers, or arrays [B]. They may be traced, so their values are not checked; `Sampling.check` does that.

    Returns:
      int32 [B, N]: each row's tokens up to and including its stop id, then -1; -2 in place of a token if the logits are
      not finite.

    Raises:
      RequestError: for shapes or a number of tokens that mean nothing.
    """
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise RequestError(f"tokens are {tokens.dtype} {tokens.shape}; expected integers [B, T], neither of them zero")
    if lengths.shape != tokens.shape[:1]:
        raise RequestError(f"lengths have the shape {lengths.shape}; expected one for each of {len(tokens)} rows")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), lengths.shape):
        raise RequestError(f"the key is {key.dtype} {key.shape}; expected one or [B] keys of jax.random.key")
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens!s:.80}; expected a whole number of at least 1")
    # An int and a float would be different programs.
    values = {name: jnp.asarray(value, value_dtype(name)) for name, value in vars(sampling).items()}
    return _generate_tokens(params, config, tokens, lengths, key, max_new_tokens, Sampling(**values))


@partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def _generate_tokens(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
) -> jax.Array:
    batch, length = tokens.shape
    keys = jnp.broadcast_to(portable_keys(key), (batch,))
    stop_ids = jnp.asarray(config.stop_ids or (NO_TOKEN,), jnp.int32)
    stop_ids = jnp.broadcast_to(stop_ids[None], (batch, stop_ids.size))
    remaining = jnp.full(batch, max_new_tokens, jnp.int32)
    state = init_state(config, remaining, keys, stop_ids, sampling.rows(batch), length + max_new_tokens)
    hidden = jnp.zeros((batch, config.d_model), config.activation_dtype)

    chunk = min(length, _PREFILL_CHUNK)
    chunks = -(-length // chunk)
    padded = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - length))).reshape(batch, chunks, chunk).swapaxes(0, 1)
    starts = chunk * jnp.arange(chunks, dtype=jnp.int32)

    def prefill_chunk(
        carry: tuple[DecodeState, jax.Array], xs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[DecodeState, jax.Array], None]:
        piece, start = xs
        return prefill(params, config, *carry, piece, jnp.clip(lengths - start, 0, chunk)), None

    (state, hidden), _ = lax.scan(prefill_chunk, (state, hidden), (padded, starts))
    state, first = emit(params, config, state, hidden)
    _, rest = decode(params, config, state, max_new_tokens - 1)
    return jnp.concatenate([first.tokens[:, None], rest.tokens.T], axis=1)
