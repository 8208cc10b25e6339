"""Key/value caches: static-shape pytrees that every program takes and gives back.

Each layer has arrays of its own, [B, K, S, H], so that an update inside a loop touches one layer's memory and is
done in place where the cache is donated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from orcd_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's keys and values, rotated already: [B, K, S, H] each."""

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """A full cache: slot s of a row holds the row's token s.

    What lies in a slot at or beyond a row's length is never seen, so a row needs no clearing before it is reused.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # int32 [B], tokens held

    @classmethod
    def init(cls, config: ModelConfig, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for each of `batch` rows."""
        shape = (batch, config.n_kv_heads, length, config.head_dim)

        def zeros() -> jax.Array:
            return jnp.zeros(shape, config.activation_dtype)

        layers = tuple(LayerCache(zeros(), zeros()) for _ in range(config.n_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """S, slots a row."""
        return self.layers[0].keys.shape[2]

    def key_positions(self) -> jax.Array:
        """The position that each slot holds, int32 [1, S]."""
        return jnp.arange(self.capacity, dtype=jnp.int32)[None]

    def write(self, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array, valid: jax.Array) -> LayerCache:
        """Return a layer with k and v [B, T, K, H] stored at `positions` [B, T], where `valid` [B, T].

        A position beyond the capacity is dropped: callers make the cache long enough.
        """
        rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
        # Slots to be dropped are moved beyond the end, each to its own, so that all indices are unique.
        beyond = self.capacity + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        slots = jnp.where(valid, positions, beyond)

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)

        keys, values = self.layers[layer]
        return LayerCache(store(keys, k), store(values, v))


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `forward`.

    Args:
      config: gives layers, heads, widths and dtype.
      batch: B, rows.
      length: S, the most tokens a row can hold.

    Returns:
      A pytree of 2 L arrays [B, K, S, H] and lengths int32 [B].
    """
    return KVCache.init(config, batch, length)
