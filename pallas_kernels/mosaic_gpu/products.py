"""The products of a layer for the kernels that take tokens as rows: what they multiply, and what becomes of the sums.

    y[m, o] = epilogue(sum_b scales[o, b] * sum_i x[m, 32 b + i] values[o, 32 b + i])

x may be normalised on the way in (RMSNorm); the epilogue adds a bias and a residual, or joins pairs of rows of the
weights: silu(gate) * up, or a rotary position embedding and the write to the cache. How the sums come about is up to a
kernel, `quant_matmul_skinny.run` or `quant_matmul_small.run`; `finishing.run` finds them in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import materialised
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.threads import Scalar

EIGHT = 8  # rows of weights or of x: of what a kernel's lanes hold together

Pair = tuple[Scalar, Scalar]
Pointers = dict[str, Scalar]
Finish = Callable[[Sequence[Pair], Scalar], None]


@dataclass(frozen=True)
class Work:
    """Tiles of 8 rows of weights, or pairs of them that are joined, and what becomes of their sums.

    Attributes:
      count: of tiles, or pairs.
      joined: 1, or 2 for pairs.
      rows: number of a tile or pair -> the first row of each tile.
      epilogue: (pointers, row of x, tile or pair, even column in it, condition) -> function of each tile's sums of this
        column and the next one, and of whether they exist, that stores the results. Called before the sums are known,
        it asks for what it will need, where the condition holds.
    """

    count: int
    joined: int
    rows: Callable[[Scalar], Sequence[Scalar]]
    epilogue: Callable[[Pointers, Scalar, Scalar, Scalar, Scalar | None], Finish]


@dataclass(frozen=True)
class Product:
    """A product for a kernel to run.

    Attributes:
      name: the kernel's.
      x: [M, in] bfloat16.
      values, scales: int8 blocks [out, in].
      norm: scale [in] and epsilon of an RMSNorm of x.
      extra: more arrays or references for the epilogue, by name; None if there is none.
      outs: the results' width and dtype, by name.
      work: what the kernel does.
    """

    name: str
    x: jax.Array
    values: jax.Array
    scales: jax.Array
    norm: tuple[jax.Array, float] | None
    extra: dict[str, Any]
    outs: dict[str, tuple[int, Any]]
    work: Work

    def operands(self) -> dict[str, Any]:
        """The kernel's inputs by name, checked."""
        x, values, scales = self.x, self.values, self.scales
        if x.dtype != jnp.bfloat16 or values.dtype != jnp.int8 or scales.dtype != jnp.float16:
            raise NotImplementedError(f"rows of {x.dtype}, weights of {values.dtype} and scales of {scales.dtype}")
        if values.size >= 2**31:
            raise NotImplementedError(f"weights {values.shape}: 2^31 or more")
        norm = self.norm[0].astype(jnp.float32) if self.norm else None
        given = {"x": x, "values": values, "scales": scales, "norm": norm, **self.extra}
        return {name: array for name, array in given.items() if array is not None}

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((len(self.x), columns), dtype) for name, (columns, dtype) in self.outs.items()
        }

    @property
    def op(self) -> str:
        """Whose configurations it takes."""
        return self.name.removesuffix("_store")


Run = Callable[[Product], Sequence[jax.Array]]


def launch(
    name: str, emit: Callable[..., None], operands: Sequence[Any], results: Sequence[jax.ShapeDtypeStruct],
    blocks: int, warps: int, shared_bytes: int, cluster: int = 1,
) -> Sequence[jax.Array]:  # fmt: skip
    """Run a kernel: `emit` is called with references to the operands, the results and the shared memory."""

    def body(*refs: Any) -> None:
        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        inline(lambda _, *inner: emit(*inner))(*refs)

    return plgpu.kernel(
        body,
        out_type=list(results),
        scratch_types=[plgpu.SMEM((-(-shared_bytes // 4),), jnp.int32)],
        grid=(blocks // cluster,),
        grid_names=("cta",),
        cluster=(cluster,),
        cluster_names=("rank",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*operands)


def matmul(
    run: Run,
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """x [M, in] bf16 times int8 blocks [out, in] plus bias [out] and residual [M, out] -> [M, out]."""
    out = values.shape[0]

    def rows(tile: Scalar) -> list[Scalar]:
        return [tile * EIGHT]

    def epilogue(pointers: Pointers, m: Scalar, tile: Scalar, column: Scalar, where: Scalar | None) -> Finish:
        column = tile * EIGHT + column
        added = []
        if bias is not None:
            added.append(load_pair(pointers["bias"], column, bias.dtype, where))
        if residual is not None:
            added.append(load_pair(pointers["residual"], m * out + column, residual.dtype, where))

        def finish(sums: Sequence[Pair], exist: Scalar) -> None:
            with t.when(exist):
                _store_pair(pointers["out"], m * out + column, out_dtype, functools.reduce(_add, added, sums[0]))

        return finish

    work = Work(out // EIGHT, 1, rows, epilogue)
    extra, outs = {"bias": bias, "residual": residual}, {"out": (out, out_dtype)}
    (y,) = run(Product("quant_matmul", x, values, scales, None, extra, outs, work))
    return y


def gate_up(run: Run, x: jax.Array, norm: jax.Array, values: jax.Array, scales: jax.Array, eps: float) -> jax.Array:
    """silu(h Wg^T) * (h Wu^T), h = rms_norm(x): x [M, in] bf16, int8 blocks [2F, in] of Wg, then Wu -> [M, F] bf16."""
    width = values.shape[0] // 2

    def rows(tile: Scalar) -> list[Scalar]:
        return [tile * EIGHT, tile * EIGHT + width]

    def epilogue(pointers: Pointers, m: Scalar, tile: Scalar, column: Scalar, where: Scalar | None) -> Finish:
        del where

        def finish(sums: Sequence[Pair], exist: Scalar) -> None:
            first, second = (gate * up * t.sigmoid(gate) for gate, up in zip(*sums, strict=True))
            with t.when(exist):
                _store_pair(pointers["out"], m * width + tile * EIGHT + column, x.dtype, (first, second))

        return finish

    work = Work(width // EIGHT, 2, rows, epilogue)
    (y,) = run(Product("gate_up", x, values, scales, (norm, eps), {}, {"out": (width, x.dtype)}, work))
    return y


def qkv_rope(
    run: Run,
    x: jax.Array,
    norm: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
    store: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As the op, for x [M, D] bf16 and cos and sin [M, H / 2] -> q [M, N H], k and v [M, K H] bf16.

    With `store`, keys and values [B, K, S, H] bf16 and slots int32 [B, T], M = B T: k and v are written to the slots
    (to none where the slot is not below S), and keys and values as they are then take the place of k and v; in the
    same memory where XLA can tell that nobody needs the old ones.
    """
    heads = n_heads + 2 * n_kv_heads
    width = values.shape[0] // heads
    half = width // 2
    tiles = half // EIGHT  # pairs of tiles in a head
    if not rotated_whole(values.shape[0], cos, heads):
        raise NotImplementedError(f"heads of {width} of which {2 * cos.shape[-1]} are rotated")

    def rows(tile: Scalar) -> list[Scalar]:
        first = tile // tiles * width + tile % tiles * EIGHT
        return [first, first + half]

    def epilogue(pointers: Pointers, m: Scalar, tile: Scalar, column: Scalar, where: Scalar | None) -> Finish:
        head, column = tile // tiles, tile % tiles * EIGHT + column
        is_query, is_rotated = head < n_heads, head < n_heads + n_kv_heads
        at = head * width + column
        biases = [] if bias is None else [load_pair(pointers["bias"], at + d, bias.dtype, where) for d in (0, half)]
        angles = m * half + column
        cosines, sines = (load_pair(pointers[name], angles, jnp.float32, where) for name in ("cos", "sin"))
        slot = t.load_global(pointers["slots"] + (m * 4).wide(), where=where)[0] if store is not None else None

        def finish(sums: Sequence[Pair], exist: Scalar) -> None:
            if biases:
                sums = [_add(s, b) for s, b in zip(sums, biases, strict=True)]
            turned: list[list[Scalar]] = [[], []]
            for a, b, cosine, sine in zip(*sums, cosines, sines, strict=True):
                c, s = t.select(is_rotated, cosine, 1.0), t.select(is_rotated, sine, 0.0)
                turned[0].append(t.fma(a, c, b * s * -1.0))
                turned[1].append(t.fma(b, c, a * s))
            before = t.select(is_rotated, t.constant(n_heads), n_heads + n_kv_heads)
            own = head - t.select(is_query, t.constant(0), before)
            place = m * (n_kv_heads * width) + own * width
            if slot is not None and store is not None:
                n_slots = store[0].shape[2]
                place = ((m // store[2].shape[1] * n_kv_heads + own) * n_slots + slot) * width
                exist = exist & (is_query | (slot < n_slots))
            place = t.select(is_query, m * (n_heads * width) + own * width, place) + column
            target = t.select(is_query, pointers["q"], t.select(is_rotated, pointers["k"], pointers["v"]))
            with t.when(exist):
                for d, (first, second) in zip((0, half), turned, strict=True):
                    _store_pair(target, place + d, x.dtype, (first, second))

        return finish

    if store is not None:
        given = materialised((x, norm, values, scales, bias, cos, sin, store[2]))
        x, norm, values, scales, bias, cos, sin, slots = given
        store = *store[:2], slots
    extra: dict[str, Any] = {"bias": bias, "cos": cos.astype(jnp.float32), "sin": sin.astype(jnp.float32)}
    outs = {"q": (n_heads * width, x.dtype)}
    work = Work(heads * tiles, 2, rows, epilogue)
    if store is None:
        outs |= {"k": (n_kv_heads * width, x.dtype), "v": (n_kv_heads * width, x.dtype)}
        q, k, v = run(Product("qkv_rope", x, values, scales, (norm, eps), extra, outs, work))
        return q, k, v
    keys, stored_values = (jax.new_ref(array) for array in store[:2])
    extra |= {"k": keys, "v": stored_values, "slots": store[2]}
    (q,) = run(Product("qkv_rope_store", x, values, scales, (norm, eps), extra, outs, work))
    return q, keys[...], stored_values[...]


def rotated_whole(out: int, cos: jax.Array, heads: int) -> bool:
    """Whether angles [.., R / 2] are those of whole heads in tiles, where all heads have `out` dimensions."""
    return 2 * cos.shape[-1] * heads == out and cos.shape[-1] % EIGHT == 0


def _add(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def load_pair(pointer: Scalar, index: Scalar, dtype: Any, where: Scalar | None = None) -> Pair:
    """Elements `index`, even, and the next one of an array of bfloat16 or float32, as float32; zeros if not `where`."""
    if jnp.dtype(dtype).itemsize == 2:
        first, second = t.unpack_bf16(t.load_global(pointer + (index * 2).wide(), where=where)[0])
    else:
        first, second = (word.float() for word in t.load_global(pointer + (index * 4).wide(), 2, where=where))
    return first, second


def _store_pair(pointer: Scalar, index: Scalar, dtype: Any, pair: Pair) -> None:
    """The opposite of `load_pair`."""
    if jnp.dtype(dtype).itemsize == 2:
        t.store_global(pointer + (index * 2).wide(), t.pack_bf16(*pair))
    else:
        t.store_global(pointer + (index * 4).wide(), *pair)
