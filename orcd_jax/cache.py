"""Key/value caches: static-shape pytrees that every program takes and gives back.

Each layer has arrays of its own, [B, K, S, H], so that an update inside a loop touches one layer's memory and is
done in place where the cache is donated. A cache's `update` stores a chunk's keys and values and says, in segments,
what the chunk's queries may attend to; `attend` does so. A row's result never depends on how its tokens were chunked.

Dimensions: B batch, T tokens of a chunk, S slots, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax.config import ModelConfig
from pallas_kernels import flash_attention, flash_decode
from pallas_kernels.flash_attention import Visibility
from pallas_kernels.flash_decode import MAX_QUERIES


class Int8Rows(NamedTuple):
    """Heads' rows as int8 with one scale each; a tuple, as `pallas_kernels` takes them."""

    values: jax.Array  # int8 [B, K, S, H]
    scales: jax.Array  # float16 [B, K, S]


Stored = jax.Array | Int8Rows


class LayerCache(NamedTuple):
    """One layer's keys, rotated already, and values."""

    keys: Stored
    values: Stored


class Segment(NamedTuple):
    """Keys and values that queries may attend to, with the position of each slot (negative: empty)."""

    layer: LayerCache
    positions: jax.Array  # int32 [B, S] or [1, S]
    visibility: Visibility
    ordered: bool = False  # slot s holds position s


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullCache:
    """Slot s of a row holds the row's token s.

    What lies in a slot at or beyond a row's length is never seen, so a row needs no clearing before it is reused.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # int32 [B], tokens so far
    window: int | None = field(metadata={"static": True})  # the model's own

    def update(
        self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array, valid: jax.Array
    ) -> tuple[LayerCache, list[Segment]]:
        """Store k and v [B, T, K, H] of tokens at `positions` [B, T] where `valid` [B, T].

        A position beyond the capacity is dropped: callers make the cache long enough.

        Returns:
          The layer as it is then, and what the chunk's queries may attend to.
        """
        old = self.layers[layer]
        stored = _store(old, _encode(old, k, v), jnp.where(valid, positions, -1))
        return stored, self.segments(stored, valid)

    def segments(self, stored: LayerCache, valid: jax.Array) -> list[Segment]:
        """What queries may attend to once their own tokens, where `valid` [B, T], are in a layer."""
        del valid
        return [Segment(stored, _slots(stored), Visibility(window=self.window), ordered=True)]

    def slots(self, positions: jax.Array, valid: jax.Array) -> jax.Array | None:
        """Where tokens go, int32 [B, T], -1 for none, so that whoever computes keys and values can store them.

        None if they are not stored as they are.
        """
        if isinstance(self.layers[0].keys, Int8Rows):
            return None
        return jnp.where(valid, positions, -1)

    def only(self, layer: int) -> FullCache:
        """The cache as of a model with this layer alone."""
        return replace(self, layers=(self.layers[layer],))

    def advance(self, layers: list[LayerCache], counts: jax.Array) -> FullCache:
        """The cache with updated layers, rows longer by `counts` [B]."""
        return replace(self, layers=tuple(layers), lengths=self.lengths + counts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlidingCache:
    """The first `sinks` tokens, and the last ones in a ring: constant memory however long the row.

    Attention sinks: Xiao et al. 2023, https://arxiv.org/abs/2309.17453. Keys keep the rotation of their own position.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # int32 [B], tokens so far
    sinks: int = field(metadata={"static": True})

    @property
    def window(self) -> int:
        """Slots of the ring, and how far a query sees."""
        return _slots(self.layers[0]).shape[1] - self.sinks

    def update(
        self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array, valid: jax.Array
    ) -> tuple[LayerCache, list[Segment]]:
        """As `FullCache.update`; of a chunk longer than the ring only the end is stored."""
        old = self.layers[layer]
        new = _encode(old, k, v)
        stored = _store(old, new, self._places(positions, valid))
        if k.shape[1] == 1:  # what the token overwrites has just left its window
            return stored, self.segments(stored, valid)
        before = _ring_positions(self.lengths, self.sinks, self.window)
        visibility = Visibility(window=self.window, sinks=self.sinks)
        return stored, [
            Segment(old, before, visibility), Segment(new, jnp.where(valid, positions, -1), visibility)
        ]  # fmt: skip

    def _places(self, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """Slots of tokens [B, T], -1 for those that later ones of the chunk overwrite, or that are not valid."""
        ends = self.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        in_ring = self.sinks + (positions - self.sinks) % self.window
        places = jnp.where(positions < self.sinks, positions, in_ring)
        kept = valid & ((positions < self.sinks) | (positions >= ends[:, None] - self.window))
        return jnp.where(kept, places, -1)

    def segments(self, stored: LayerCache, valid: jax.Array) -> list[Segment]:
        """As `FullCache.segments`, for one token a row."""
        ends = self.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        visibility = Visibility(window=self.window, sinks=self.sinks)
        return [Segment(stored, _ring_positions(ends, self.sinks, self.window), visibility)]

    def only(self, layer: int) -> SlidingCache:
        """The cache as of a model with this layer alone."""
        return replace(self, layers=(self.layers[layer],))

    def slots(self, positions: jax.Array, valid: jax.Array) -> jax.Array | None:
        """As `FullCache.slots`; None for a longer chunk too, which attends to what it overwrites."""
        if isinstance(self.layers[0].keys, Int8Rows) or positions.shape[1] > 1:
            return None
        return self._places(positions, valid)

    def advance(self, layers: list[LayerCache], counts: jax.Array) -> SlidingCache:
        """The cache with updated layers, rows longer by `counts` [B]."""
        return replace(self, layers=tuple(layers), lengths=self.lengths + counts)


class CompressedLayer(NamedTuple):
    """One layer of a `CompressedCache`."""

    all: LayerCache  # every token, as int8
    recent: LayerCache  # a ring of the last ones as they are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedCache:
    """The last tokens as they are, in a ring, and all as int8, from where a query takes those beyond the ring."""

    layers: tuple[CompressedLayer, ...]
    lengths: jax.Array  # int32 [B], tokens so far
    window: int | None = field(metadata={"static": True})  # the model's own

    @property
    def recent(self) -> int:
        """Slots of the ring, and how far back a query sees tokens as they are."""
        return _slots(self.layers[0].recent).shape[1]

    def update(
        self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array, valid: jax.Array
    ) -> tuple[CompressedLayer, list[Segment]]:
        """As `FullCache.update`."""
        old, reach = self.layers[layer], self.recent
        ends = self.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        new = _encode(old.recent, k, v)
        kept = valid & (positions >= ends[:, None] - reach)
        stored = CompressedLayer(
            _store(old.all, _encode(old.all, k, v), jnp.where(valid, positions, -1)),
            _store(old.recent, new, jnp.where(kept, positions % reach, -1)),
        )
        if k.shape[1] == 1:
            return stored, self.segments(stored, valid)
        near, far = self._visibilities()
        before = _ring_positions(self.lengths, 0, reach)
        return stored, [
            Segment(stored.all, _slots(stored.all), far, ordered=True),
            Segment(old.recent, before, near),
            Segment(new, jnp.where(valid, positions, -1), near),
        ]

    def _visibilities(self) -> tuple[Visibility, Visibility]:
        """Of recent tokens and of older ones."""
        reach = self.recent
        near = Visibility(window=reach if self.window is None else min(reach, self.window))
        return near, Visibility(window=self.window, nearest=reach)

    def segments(self, stored: CompressedLayer, valid: jax.Array) -> list[Segment]:
        """As `FullCache.segments`, for one token a row."""
        near, far = self._visibilities()
        ends = self.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return [
            Segment(stored.all, _slots(stored.all), far, ordered=True),
            Segment(stored.recent, _ring_positions(ends, 0, self.recent), near),
        ]

    def only(self, layer: int) -> CompressedCache:
        """The cache as of a model with this layer alone."""
        return replace(self, layers=(self.layers[layer],))

    def slots(self, positions: jax.Array, valid: jax.Array) -> None:
        """As `FullCache.slots`: tokens are stored twice."""
        return None

    def advance(self, layers: list[CompressedLayer], counts: jax.Array) -> CompressedCache:
        """The cache with updated layers, rows longer by `counts` [B]."""
        return replace(self, layers=tuple(layers), lengths=self.lengths + counts)


KVCache = FullCache | SlidingCache | CompressedCache


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `forward`.

    Args:
      config: gives layers, heads, widths, dtype, and the policy (`config.cache`).
      batch: B, rows.
      length: the most tokens that a row will have.

    Returns:
      A pytree with `lengths` int32 [B] and arrays of its own for each layer.
    """
    policy = config.cache.resolve(config.sliding_window, length)

    def layer(slots: int, int8: bool) -> LayerCache:
        def empty() -> Stored:
            shape = (batch, config.n_kv_heads, slots, config.head_dim)
            if int8:
                return Int8Rows(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float16))
            return jnp.zeros(shape, config.activation_dtype)

        return LayerCache(empty(), empty())

    lengths, layers = jnp.zeros(batch, jnp.int32), range(config.n_layers)
    if policy.recent is not None:
        both = (CompressedLayer(layer(length, True), layer(policy.recent, False)) for _ in layers)
        return CompressedCache(tuple(both), lengths, config.sliding_window)
    if policy.window is not None:
        ring = (layer(policy.sinks + policy.window, policy.int8) for _ in layers)
        return SlidingCache(tuple(ring), lengths, policy.sinks)
    return FullCache(tuple(layer(length, policy.int8) for _ in layers), lengths, config.sliding_window)


def attend(q: jax.Array, positions: jax.Array, segments: list[Segment]) -> jax.Array:
    """Attention of queries [B, T, N, H] at `positions` [B, T] over all segments together, in q's dtype."""
    few = q.shape[1] <= MAX_QUERIES
    op: Any = flash_decode if few else flash_attention

    def part(segment: Segment, lse: bool) -> Any:
        turned = _spread(q) if isinstance(segment.layer.keys, Int8Rows) else q
        options = {"visibility": segment.visibility, "lse": lse} | ({"ordered": segment.ordered} if few else {})
        return op(turned, *segment.layer, positions, segment.positions, **options)

    if len(segments) == 1:
        return part(segments[0], lse=False)
    outs, sums = zip(*(part(segment, lse=True) for segment in segments), strict=True)
    # Each part is normalised over its own keys: weigh it by its share of all.
    total = jnp.max(jnp.stack(sums), axis=0)
    weights = [jnp.exp(part - jnp.where(jnp.isneginf(total), 0.0, total)) for part in sums]
    norm = sum(weights)
    norm = jnp.where(norm == 0.0, 1.0, norm)
    merged = sum(o.astype(jnp.float32) * (w / norm)[..., None] for o, w in zip(outs, weights, strict=True))
    return jnp.asarray(merged).astype(q.dtype)


def _slots(layer: LayerCache) -> jax.Array:
    """The slots' numbers, int32 [1, S]: the positions that they hold in a cache that keeps everything."""
    keys = layer.keys.values if isinstance(layer.keys, Int8Rows) else layer.keys
    return jnp.arange(keys.shape[2], dtype=jnp.int32)[None]


def _ring_positions(lengths: jax.Array, sinks: int, window: int) -> jax.Array:
    """The positions held by `sinks` slots and a ring of `window` after `lengths` [B] tokens: int32 [B, S]."""
    newest = lengths[:, None] - sinks - 1  # of the ring, counted from its first token
    slots = jnp.arange(window, dtype=jnp.int32)[None]
    held = newest - (newest - slots) % window
    ring = jnp.where(held >= 0, held + sinks, -1)
    first = jnp.arange(sinks, dtype=jnp.int32)[None]
    return jnp.concatenate([jnp.where(first < lengths[:, None], first, -1), ring], axis=1)


def _encode(like: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """k and v [B, T, K, H] in the format and layout of a layer's arrays, T in place of S."""

    def encode(old: Stored, new: jax.Array, spread: bool) -> Stored:
        new = new.swapaxes(1, 2)
        if not isinstance(old, Int8Rows):
            return new.astype(old.dtype)
        wide = (_spread(new) if spread else new).astype(jnp.float32)
        scales = (jnp.max(jnp.abs(wide), axis=-1) / 127.0).astype(jnp.float16)
        inverse = jnp.where(scales == 0, 0.0, 1.0 / scales.astype(jnp.float32))
        values = jnp.clip(jnp.round(wide * inverse[..., None]), -127, 127).astype(jnp.int8)
        return Int8Rows(values, scales)

    return LayerCache(encode(like.keys, k, spread=True), encode(like.values, v, spread=False))


def _spread(rows: jax.Array) -> jax.Array:
    """Turn rows [..., H] by a fixed orthogonal matrix that spreads a large dimension over all.

    Products of turned queries and keys are those of the original ones. Keys of Qwen2 have a few dimensions far larger
    than the rest, which would take all of an int8 scale (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456).
    """
    matrix = jnp.asarray(_spreading_matrix(rows.shape[-1]))
    turned = jnp.einsum("...i,ij->...j", rows.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)
    return turned.astype(rows.dtype)


@functools.cache
def _spreading_matrix(width: int) -> np.ndarray:
    """Hadamard's matrix by Sylvester's construction; over an odd factor of `width` the cosine transform."""
    rest = width
    matrix = np.ones((1, 1))
    while rest % 2 == 0:
        matrix, rest = np.kron(matrix, [[1, 1], [1, -1]]) / np.sqrt(2), rest // 2
    i = np.arange(rest)
    cosine = np.cos(np.pi * (2 * i[:, None] + 1) * i / (2 * rest)) * np.sqrt(np.where(i == 0, 1, 2) / rest)
    return np.kron(matrix, cosine).astype(np.float32)


def _store(old: LayerCache, new: LayerCache, slots: jax.Array) -> LayerCache:
    """A layer with the tokens of `new` in `slots` [B, T]; nowhere where a slot is negative."""
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    # Tokens to be dropped are moved beyond the end, each to a slot of its own, so that all indices are unique.
    beyond = jnp.iinfo(jnp.int32).max - jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    slots = jnp.where(slots >= 0, slots, beyond)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop", unique_indices=True)

    return jax.tree.map(put, old, new)
