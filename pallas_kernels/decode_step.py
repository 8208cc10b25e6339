"""A decode step of few rows as one op: all layers, the final norm and the head.

    for each layer:  x += Wo attention(rope(rms_norm(x) Wqkv^T + b), cache);  x += swiglu(rms_norm(x))
    logits = rms_norm(x) Whead^T

The maths of a layer are those of `qkv_rope`, `flash_attention`, `quant_matmul` and `swiglu`. One op for all of them
lets a kernel read weights without a pause: the time of a step at batch 1 is that of reading them once.

Weights are packed when they are loaded, in the order in which the kernel streams them: `pack`. Dimensions as in the
package, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention import Visibility
from pallas_kernels.flash_attention import reference as attention
from pallas_kernels.implementation import dispatch
from pallas_kernels.qkv_rope import reference as qkv_rope
from pallas_kernels.quant_matmul import reference as matmul
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.swiglu import reference as swiglu

GROUP_ROWS, GROUP_INPUTS = 16, 128
GROUP_BYTES = GROUP_ROWS * GROUP_INPUTS * 17 // 16
COPIES = 4  # of what many blocks read, so that they wait for different memory
CHUNKS = 32  # the most that a head's keys are split into
DOWN_SPLIT = 2  # parts of the inputs of the down projection
ROWS = 8  # the most of a batch that a kernel takes


@dataclass(frozen=True)
class DecoderSizes:
    """A decoder's static sizes."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    window: int | None
    ring: bool = False  # the cache keeps the window alone: position p is in slot p % S

    @property
    def chunks(self) -> int:
        """The most that a head's keys are split into: all heads' together keep a GPU busy."""
        return self.chunks_of(1)

    def chunks_of(self, rows: int) -> int:
        """`chunks` where there are so many rows."""
        return max(1, min(CHUNKS, 128 // (rows * self.n_kv_heads)))

    @property
    def qkv_rows(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of a layer's q|k|v, output, gate|up and down."""
        return (
            (self.qkv_rows, self.d_model), (self.d_model, self.n_heads * self.head_dim),
            (2 * self.d_ff, self.d_model), (self.d_model, self.d_ff),
        )  # fmt: skip

    def row_orders(self) -> tuple[np.ndarray, ...]:
        """In which order the rows of `matrices` are packed, so that a tile of 16 has in rows i and i + 8 what goes
        together: the halves of rotary pairs, and gate and up."""

        def eights(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate([first.reshape(-1, 8), second.reshape(-1, 8)], axis=1).ravel()

        half = np.arange(self.head_dim // 2)
        rotated = np.arange(self.n_heads + self.n_kv_heads)[:, None] * self.head_dim
        q_k = (rotated + eights(half, half + len(half))).ravel()
        gate, plain = np.arange(self.d_ff), np.arange(self.d_model)
        qkv = np.concatenate([q_k, np.arange(len(q_k), self.qkv_rows)])
        return qkv, plain, eights(gate, gate + self.d_ff), plain


class LayerWeights(NamedTuple):
    """A layer as it is loaded: matrices as (int8 values [out, in], float16 scales [out, in / 32])."""

    attention_norm: jax.Array  # [D]
    qkv: tuple[jax.Array, jax.Array]
    qkv_bias: jax.Array | None
    out: tuple[jax.Array, jax.Array]
    swiglu_norm: jax.Array  # [D]
    gate_up: tuple[jax.Array, jax.Array]
    down: tuple[jax.Array, jax.Array]


class PackedWeights(NamedTuple):
    """All weights of a decoder in the order of use."""

    layers: jax.Array  # int8 [L, groups, GROUP_BYTES]: the groups of q|k|v, output, gate|up, and down in two parts
    vectors: jax.Array  # float32 [L, 2 D + (N + 2 K) H]: the two norms' scales, and the bias of q|k|v
    norm: jax.Array  # float32 [D]
    head: jax.Array  # int8 [groups, GROUP_BYTES]


class HandoverWords(NamedTuple):
    """Where the words are that the stages of a layer hand on, and their number."""

    qkv: int
    attention: int  # [chunks, N, H / 2 + 2]: outputs in pairs, the logarithm of their weight, and nothing
    out: int  # in pairs
    hidden: int  # in pairs
    down: int  # two parts, to be summed, in pairs
    total: int

    @classmethod
    def of(cls, sizes: DecoderSizes) -> HandoverWords:
        attention = sizes.chunks * sizes.n_heads * (sizes.head_dim // 2 + 2)
        counts = sizes.qkv_rows, attention, sizes.d_model // 2, sizes.d_ff // 2, DOWN_SPLIT * sizes.d_model // 2
        return cls(*(sum(counts[:i]) for i in range(len(counts) + 1)))


class HandoverOfRows(NamedTuple):
    """As `HandoverWords` for several rows, in bytes. All is float16 [.., `ROWS`], but for what attention makes."""

    qkv: int  # [(N + 2 K) H, ROWS]
    attention: int  # [chunks, ROWS, N, H]: outputs
    weights: int  # [chunks, ROWS, N]: the logarithms of their weights, float32, and tags
    out: int  # [D, ROWS]
    hidden: int  # [F, ROWS]
    down: int  # [2, D, ROWS]: two parts, to be summed
    total: int

    @classmethod
    def of(cls, sizes: DecoderSizes, rows: int) -> HandoverOfRows:
        outputs = sizes.chunks_of(rows) * ROWS * sizes.n_heads
        counts = (
            2 * ROWS * sizes.qkv_rows, 2 * outputs * sizes.head_dim, 8 * outputs, 2 * ROWS * sizes.d_model,
            2 * ROWS * sizes.d_ff, DOWN_SPLIT * 2 * ROWS * sizes.d_model,
        )  # fmt: skip
        return cls(*(sum(counts[:i]) for i in range(len(counts) + 1)))


class Handover(NamedTuple):
    """What a kernel's blocks hand each other results through; it goes from step to step."""

    words: jax.Array  # int32, for even and for odd layers: [2, COPIES, words, 2], or [2, bytes / 4]
    step: jax.Array  # int32 [1]


def check(sizes: DecoderSizes) -> None:
    """Raise NotImplementedError for a decoder whose weights cannot be packed."""
    for name, value, multiple in (
        ("d_model", sizes.d_model, GROUP_INPUTS),
        ("d_ff", sizes.d_ff, 2 * GROUP_INPUTS),
        ("n_heads * head_dim", sizes.n_heads * sizes.head_dim, GROUP_INPUTS),
        ("head_dim", sizes.head_dim, 32),
        ("vocab_size", sizes.vocab_size, GROUP_ROWS),
    ):
        if value % multiple:
            raise NotImplementedError(f"{name} must be a multiple of {multiple}, not {value}")


def pack(
    sizes: DecoderSizes, layers: Sequence[LayerWeights], norm: jax.Array, head: tuple[jax.Array, jax.Array]
) -> PackedWeights:
    """Copy a decoder's weights into the order of use.

    Args:
      sizes: the decoder's.
      layers: its layers.
      norm: [D], the final norm's scale.
      head: (values [V, D], scales).

    Raises:
      NotImplementedError: for sizes that do not fit the groups.
    """
    check(sizes)
    return _join([_pack_layer(sizes, layer) for layer in layers], norm, head)


def pack_matrix(values: jax.Array, scales: jax.Array, rows: np.ndarray) -> jax.Array:
    """A matrix as groups, int8 [out / 16 * in / 128, GROUP_BYTES], all groups of 16 rows one after the other.

    A group is, for each block of 32 inputs, 16 bytes for each lane: of its 8 inputs the first four of row lane / 4 and
    of the row 8 below it, then the others of both; and after these the rows' scales, pairs 8 rows apart, of the blocks.
    """
    tiles, groups = len(rows) // GROUP_ROWS, values.shape[1] // GROUP_INPUTS
    v = values[rows].reshape(tiles, 2, 8, groups, 4, 4, 2, 4).transpose(0, 3, 4, 2, 5, 6, 1, 7)
    s = scales[rows].reshape(tiles, 2, 8, groups, 4).transpose(0, 3, 2, 4, 1)
    s = lax.bitcast_convert_type(s, jnp.int8).reshape(tiles * groups, -1)
    return jnp.concatenate([v.reshape(tiles * groups, -1), s], axis=1)


def pack_parts(values: jax.Array, scales: jax.Array, rows: np.ndarray) -> jax.Array:
    """As `pack_matrix`, first all that belongs to the first of `DOWN_SPLIT` parts of the inputs."""
    parts = zip(jnp.split(values, DOWN_SPLIT, axis=1), jnp.split(scales, DOWN_SPLIT, axis=1), strict=True)
    return jnp.concatenate([pack_matrix(v, s, rows) for v, s in parts])


def unpack_parts(packed: jax.Array, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """What `pack_parts` was given."""
    parts = [unpack_matrix(part, rows) for part in jnp.split(packed, DOWN_SPLIT)]
    values, scales = (jnp.concatenate(halves, axis=1) for halves in zip(*parts, strict=True))
    return values, scales


def unpack_matrix(packed: jax.Array, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """What `pack_matrix` was given: values and scales."""
    tiles = len(rows) // GROUP_ROWS
    groups = packed.shape[0] // tiles
    split, back = GROUP_ROWS * GROUP_INPUTS, np.argsort(rows)
    v = packed[:, :split].reshape(tiles, groups, 4, 8, 4, 2, 2, 4).transpose(0, 6, 3, 1, 2, 4, 5, 7)
    s = lax.bitcast_convert_type(packed[:, split:].reshape(tiles, groups, 8, 4, 2, 2), jnp.float16)
    s = s.transpose(0, 4, 2, 1, 3)
    return v.reshape(len(rows), -1)[back], s.reshape(len(rows), -1)[back]


# Two programs and nothing beside them: each one costs a start its tracing, and a launch its time.
@jax.jit(static_argnums=0)
def _pack_layer(sizes: DecoderSizes, layer: LayerWeights) -> tuple[jax.Array, jax.Array]:
    matrices, (*orders, order) = (layer.qkv, layer.out, layer.gate_up), sizes.row_orders()
    packed = [pack_matrix(*m, o) for m, o in zip(matrices, orders, strict=True)]
    groups = jnp.concatenate([*packed, pack_parts(*layer.down, order)])
    bias = jnp.zeros(sizes.qkv_rows) if layer.qkv_bias is None else layer.qkv_bias
    vectors = layer.attention_norm, layer.swiglu_norm, bias
    return groups, jnp.concatenate([vector.astype(jnp.float32) for vector in vectors])


@jax.jit
def _join(
    layers: Sequence[tuple[jax.Array, jax.Array]], norm: jax.Array, head: tuple[jax.Array, jax.Array]
) -> PackedWeights:
    groups, vectors = (jnp.stack(parts) for parts in zip(*layers, strict=True))
    values, scales = head
    return PackedWeights(groups, vectors, norm.astype(jnp.float32), pack_matrix(values, scales, np.arange(len(values))))


def init_handover(sizes: DecoderSizes, rows: int = 1) -> Handover:
    """For the first of a sequence of steps of so many rows; what the steps of another one left is not read."""
    if rows == 1:
        shape: tuple[int, ...] = 2, COPIES, HandoverWords.of(sizes).total, 2
    else:
        shape = 2, HandoverOfRows.of(sizes, rows).total // 4
    return Handover(jnp.zeros(shape, jnp.int32), jnp.zeros(1, jnp.int32))


def reference(
    x: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    weights: PackedWeights,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    handover: Handover,
    sizes: DecoderSizes,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]], Handover]:
    """The op in plain JAX."""
    x, new = x[:, None], []
    visibility = Visibility(window=sizes.window)
    for layer, (keys, values) in enumerate(caches):
        vectors = jnp.split(weights.vectors[layer], [sizes.d_model, 2 * sizes.d_model])
        ends = np.cumsum([rows * width // (GROUP_ROWS * GROUP_INPUTS) for rows, width in sizes.matrices()])
        parts = jnp.split(weights.layers[layer], ends[:-1])
        *orders, order = sizes.row_orders()
        qkv, out, gate_up = (unpack_matrix(p, o) for p, o in zip(parts[:-1], orders, strict=True))
        down = unpack_parts(parts[-1], order)
        q, k, v = qkv_rope(
            x, vectors[0], qkv, vectors[2], cos[:, None], sin[:, None], sizes.n_heads, sizes.n_kv_heads, sizes.eps
        )
        rows, slots = jnp.arange(x.shape[0], dtype=jnp.int32), jnp.arange(keys.shape[2], dtype=jnp.int32)[None]
        place = positions % keys.shape[2] if sizes.ring else positions
        keys = keys.at[rows, :, place].set(k[:, 0].astype(keys.dtype), mode="drop")
        values = values.at[rows, :, place].set(v[:, 0].astype(values.dtype), mode="drop")
        new.append((keys, values))
        if sizes.ring:  # the last position that fell on a slot; negative: none
            slots = positions[:, None] - (positions[:, None] - slots) % keys.shape[2]
        heads: Any = attention(q, keys, values, positions[:, None], slots, visibility)
        x = matmul(heads.reshape(*x.shape[:2], -1), out, residual=x)
        x = swiglu(x, vectors[1], gate_up, down, sizes.eps)
    hidden = rms_norm(x, weights.norm, sizes.eps)
    packed_head = unpack_matrix(weights.head, np.arange(sizes.vocab_size))
    logits = matmul(hidden, packed_head, out_dtype=jnp.float32)[:, 0]
    return logits, new, handover._replace(step=handover.step + 1)


def _mosaic_gpu(*args: Any) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]], Handover]:
    from pallas_kernels.mosaic_gpu import decode_step as kernel

    return kernel.decode_step(*args)


IMPLEMENTATIONS = {"mosaic_gpu": _mosaic_gpu, "xla": reference}


def decode_step(
    x: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    weights: PackedWeights,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    handover: Handover,
    *,
    sizes: DecoderSizes,
    implementation: str | None = None,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]], Handover]:
    """Run one token through a decoder.

    Args:
      x: [B, D], the token's embedding, bfloat16.
      positions: int32 [B], tokens so far; the new one is stored behind them, or, but in a ring, nowhere if it is full.
      cos, sin: float32 [B, H / 2], of the positions' angles.
      weights: from `pack`.
      caches: each layer's keys and values, [B, K, S, H].
      handover: from `init_handover` or the step before; steps that share it run one after the other.
      sizes: the decoder's, static.
      implementation: "mosaic_gpu", "xla", or None to choose.

    Returns:
      Logits, float32 [B, V], the caches with the new token, and the handover for the next step.
    """
    return dispatch(
        "decode_step",
        IMPLEMENTATIONS,
        implementation,
        x,
        positions,
        cos,
        sin,
        weights,
        caches,
        handover,
        sizes,
    )
