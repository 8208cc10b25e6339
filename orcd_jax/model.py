"""The decoder as functional Flax modules: `Decoder(config).apply({"params": params}, tokens, cache, counts)`.

One model for every architecture: what differs is in `ModelConfig` and undone by the loader. Parameters come from the
loader (a matrix is an array or a `QuantizedArray`), so the modules read variables and have no initialisers.

Dimensions: B batch, T tokens a row, S cache length, D model width, N query heads, K key/value heads, H head width,
R rotated part of a head, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from orcd_jax.cache import KVCache, LayerCache, attend
from orcd_jax.config import ModelConfig
from orcd_jax.loader import Params
from orcd_jax.quantize import QuantizedArray, dequantize
from pallas_kernels import (
    preferred,
    qkv_rope,
    qkv_rope_store,
    quant_matmul,
    quant_matmul_argmax,
    rms_norm,
    swiglu,
)


class _Module(nn.Module):
    config: ModelConfig

    def weight(self, name: str) -> Any:
        """This module's parameter `name`; None if there is none."""
        return self.get_variable("params", name)


class Attention(_Module):
    """x + attention(rms_norm(x)), with rotary positions and a cache."""

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], cache: KVCache, positions: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Map x [B, T, D] at `positions` [B, T] to the same shape, and give back the layer; `cache` has it alone."""
        config = self.config
        norm, qkv, bias = self.weight("norm"), self.weight("qkv"), self.weight("qkv_bias")
        slots = cache.slots(positions, valid)
        layer: Any = cache.layers[0]
        stored: Any
        if slots is None:
            q, k, v = qkv_rope(
                x, norm, qkv, bias, *angles,
                n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, eps=config.rms_norm_eps,
            )  # fmt: skip
            with jax.named_scope("cache"):
                stored, segments = cache.update(0, k, v, positions, valid)
        else:
            cos, sin = angles
            q, keys, values = qkv_rope_store(
                x, norm, qkv, bias, cos, sin, layer.keys, layer.values, slots,
                n_heads=config.n_heads, eps=config.rms_norm_eps,
            )  # fmt: skip
            stored = LayerCache(keys, values)
            segments = cache.segments(stored, valid)
        heads = attend(q, positions, segments)
        return quant_matmul(heads.reshape(*x.shape[:2], -1), self.weight("out"), residual=x), stored


class SwiGLU(_Module):
    """x + swiglu(rms_norm(x))."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return swiglu(x, self.weight("norm"), self.weight("gate_up"), self.weight("down"), eps=self.config.rms_norm_eps)


class DecoderBlock(_Module):
    """Attention, then SwiGLU."""

    @nn.compact
    def __call__(self, x: jax.Array, *context: Any) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            x, stored = Attention(self.config, name="attention")(x, *context)
        with jax.named_scope("swiglu"):
            return SwiGLU(self.config, name="swiglu")(x), stored


def decoder_block(config: ModelConfig, params: Params, x: jax.Array, *context: Any) -> tuple[jax.Array, Any]:
    """Apply a block, traced once for all layers (and programs) of the same shapes."""
    if not isinstance(x, jax.core.Tracer):
        return _apply_block(config, params, x, *context)
    return _traced_block(config, preferred(), params, x, *context)


def _apply_block(config: ModelConfig, params: Params, *args: Any) -> Any:
    return DecoderBlock(config).apply({"params": params}, *args)


@partial(jax.jit, static_argnums=(0, 1))
def _traced_block(config: ModelConfig, implementation: str | None, params: Params, *args: Any) -> Any:
    del implementation  # what is traced depends on it
    return _apply_block(config, params, *args)


class Decoder(_Module):
    """Token ids to final hidden states, appending to a cache; `head` maps those to logits."""

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: KVCache, counts: jax.Array) -> tuple[jax.Array, KVCache]:
        """Run a chunk of tokens.

        Args:
          tokens: int32 [B, T], of which a row's first `counts` are real and the rest padding.
          cache: what came before; it is not changed.
          counts: int32 [B], 0 to T.

        Returns:
          Hidden states [B, T, D] after the final norm (at padding they mean nothing), and the longer cache.
        """
        config = self.config
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = cache.lengths[:, None] + offsets
        valid = offsets < counts[:, None]
        with jax.named_scope("embedding"):
            x = self.embed(tokens)
        with jax.named_scope("rope"):
            angles = rope_angles(config, positions)
        layers = []
        for layer in range(config.n_layers):
            with jax.named_scope(f"layer_{layer}"):
                own = cache.only(layer)
                x, stored = decoder_block(config, self.weight(f"layer_{layer}"), x, angles, own, positions, valid)
            self.sow("intermediates", f"layer_{layer}", x)
            layers.append(stored)
        with jax.named_scope("norm"):
            hidden = rms_norm(x, self.weight("norm"), config.rms_norm_eps)
        return hidden, cache.advance(layers, counts)

    def embed(self, tokens: jax.Array) -> jax.Array:
        table, dtype = self.weight("embedding"), self.config.activation_dtype
        if isinstance(table, QuantizedArray):
            return dequantize(QuantizedArray(table.values[tokens], table.scales[tokens]), dtype)
        return table[tokens].astype(dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits, float32 [..., V]."""
        with jax.named_scope("head"):
            return quant_matmul(hidden, self._head_weight(), out_dtype=jnp.float32)

    def likeliest(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The greatest logits of hidden states [B, D] among known tokens, float32 [B], and their ids, int32 [B]."""
        config = self.config
        with jax.named_scope("head"):
            return quant_matmul_argmax(hidden, self._head_weight(), known=config.known_tokens or config.vocab_size)

    def _head_weight(self) -> Any:
        return self.weight("embedding" if self.config.tied_head else "head")


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, float32 [B, T, R / 2]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(config.rope_frequencies())[None, None]
    return jnp.cos(angles) * config.rope_magnitude, jnp.sin(angles) * config.rope_magnitude
