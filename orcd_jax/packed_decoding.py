"""Decoding few rows by one op a step, `pallas_kernels.decode_step`, where its kernel runs.

It reads a copy of the weights in an order of its own, which `pack` adds to the parameters under `PACKED`. Nothing
packs by itself: `decode` takes this way for parameters that were packed, and a cache that it can serve.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from orcd_jax.cache import FullCache, KVCache, LayerCache, SlidingCache
from orcd_jax.config import ModelConfig
from orcd_jax.loader import Params
from orcd_jax.model import Decoder, rope_angles
from orcd_jax.quantize import QuantizedArray
from pallas_kernels import decode_step
from pallas_kernels.decode_step import (
    DecoderSizes,
    Handover,
    LayerWeights,
    PackedWeights,
    init_handover,
)  # fmt: skip
from pallas_kernels.decode_step import pack as pack_weights
from pallas_kernels.implementation import on_hopper

PACKED = "packed"
_MATRICES = (("attention", "qkv"), ("attention", "out"), ("swiglu", "gate_up"), ("swiglu", "down"))


def sizes(config: ModelConfig) -> DecoderSizes:
    """The op's sizes."""
    return DecoderSizes(
        config.n_layers, config.d_model, config.d_ff, config.n_heads, config.n_kv_heads, config.head_dim,
        config.vocab_size, config.rms_norm_eps, config.sliding_window,
    )  # fmt: skip


def _sizes_on(config: ModelConfig, cache: KVCache) -> DecoderSizes:
    """The op's sizes on a cache: a ring may be shorter than the model's own window."""
    own = sizes(config)
    return replace(own, window=cache.window, ring=True) if isinstance(cache, SlidingCache) else own


def pack(params: Params, config: ModelConfig) -> Params:
    """The parameters with packed weights too, or as they are where the kernel cannot run or take them."""
    matrices = [params["embedding" if config.tied_head else "head"]]
    matrices += [params[f"layer_{i}"][m][k] for i in range(config.n_layers) for m, k in _MATRICES]
    if not on_hopper() or not all(isinstance(matrix, QuantizedArray) for matrix in matrices):
        return params
    from pallas_kernels.mosaic_gpu.decode_step import blocks_for  # only where Pallas has what it needs

    try:
        blocks_for(sizes(config))
    except NotImplementedError:
        return params
    return {**params, PACKED: _packed(params, config)}


def _packed(params: Params, config: ModelConfig) -> PackedWeights:
    layers = []
    for index in range(config.n_layers):
        attention, swiglu = params[f"layer_{index}"]["attention"], params[f"layer_{index}"]["swiglu"]
        layers.append(
            LayerWeights(
                attention["norm"], attention["qkv"], attention.get("qkv_bias"), attention["out"],
                swiglu["norm"], swiglu["gate_up"], swiglu["down"],
            )
        )  # fmt: skip
    return pack_weights(sizes(config), layers, params["norm"], params["embedding" if config.tied_head else "head"])


def begin(params: Params, config: ModelConfig, cache: KVCache) -> Handover | None:
    """What the first `step` takes; None where steps must be run op by op."""
    plain = isinstance(cache, FullCache) or (isinstance(cache, SlidingCache) and cache.sinks == 0)
    plain = plain and not config.cache.int8 and config.activation_dtype == jnp.bfloat16
    rotated = 2 * len(config.rope_frequencies()) == config.head_dim
    if PACKED not in params or not plain or not rotated:
        return None
    rows = cache.lengths.shape[0]
    if rows > 1 and not _runs(_sizes_on(config, cache), cache, rows):
        return None
    return init_handover(sizes(config), rows)


def _runs(sizes: DecoderSizes, cache: KVCache, rows: int) -> bool:
    """Whether the op has a kernel for so many rows."""
    from pallas_kernels.mosaic_gpu.decode_step import kernel_for

    layer: Any = cache.layers[0]
    try:
        kernel_for(sizes, layer.keys.shape[2], rows)
    except NotImplementedError:
        return False
    return True


def step(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    cache: KVCache,
    counts: jax.Array,
    handover: Handover,
    implementation: str = "mosaic_gpu",
) -> tuple[jax.Array, KVCache, Handover]:
    """Run one token a row.

    Args:
      params: from `pack`.
      config: static.
      tokens: int32 [B], few rows.
      cache: what came before.
      counts: int32 [B], 1, or 0 for a row that has ended: what is stored for it is never seen.
      handover: from `begin` or the step before.
      implementation: the op's.

    Returns:
      Logits, float32 [B, V], the cache with the token, and the handover for the next step.
    """
    old: Any = cache.layers
    model = Decoder(config)
    x: Any = model.apply({"params": params}, tokens, method="embed")
    cos, sin = (angle[:, 0] for angle in rope_angles(config, cache.lengths[:, None]))
    logits, layers, handover = decode_step(
        x,
        cache.lengths,
        cos,
        sin,
        params[PACKED],
        old,
        handover,
        sizes=_sizes_on(config, cache),
        implementation=implementation,
    )
    new: Any = [LayerCache(*layer) for layer in layers]
    return logits, cache.advance(new, counts), handover
