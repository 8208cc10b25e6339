"""Matrix product with block-quantised weights for many rows (prefill, large batches), on Hopper's wgmma.

    y[m, o] = sum_i x[m, i] w[o, i] + bias[o] + residual[m, o],    w[o, i] = bfloat16(scales[o, i // 32] * values[o, i])

Computed as y^T = w x^T. A wgmma takes its left operand from registers: the weights pass through registers anyway, on
their way from int8 to bfloat16, and never exist as bfloat16 in any memory. Its right operand is the tile of x in shared
memory, read as it lies.

A CTA has one producer warpgroup, which fills `stages` steps of 64 columns of both operands through TMA, some at a time,
and two consumer warpgroups, each with 64 rows of weights times `tile_m` rows of x in its accumulator. A consumer starts
the product of a step, waits for the one before it, and converts the weights of the next step while the first one runs:
the tensor cores always have work, and conversion costs nothing as long as it is shorter than two wgmmas. `cluster` CTAs
share a tile of x, each loads a part of it for all (multicast). CTAs are persistent: the producer runs ahead into the
next tile while the consumers write the last. Few tiles: `split` CTAs of a cluster take a part of the steps each, and
exchange partial sums through distributed shared memory; the order of the sum is fixed.

The SwiGLU form gives one consumer the rows of the gate, the other those of up; they exchange halves in the end.

The greatest form writes no product. Each thread of a consumer keeps the greatest element that it has seen of each row
of x in its accumulators, with its column, from tile to tile; in the end a warp agrees on them, and XLA on the warps'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic_gpu import greatest, processors, threads
from pallas_kernels.quant_matmul_argmax import agree
from pallas_kernels.tuning import choose

BLOCK = 32  # weights with one scale
ROWS = 64  # of the weights, in one wgmma
STEP = 64  # columns of the weights, in one step of the pipeline: 128 bytes of x
BIAS = 2**15  # int8 becomes float32 by writing its bits, sign flipped, into the mantissa of this
IN_FLIGHT = 4  # steps that are on their way: enough for the memory, and scales wait behind no more
SLOTS = 2  # chunks of y on their way to memory
SHARED_MEMORY = 231_424  # bytes that a CTA can have, but for 1 KiB of barriers

GREATEST_TILE = 128  # rows of x in a tile of the greatest form at most: what it keeps is in registers
WARPS = 4  # of a warpgroup

_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)

load: Any = plgpu.load  # the types of older releases ask for an index


@dataclass(frozen=True)
class Config:
    """How y is cut up; see the module's docstring.

    Attributes:
      tile_m: rows of x that a CTA takes at once, a multiple of 8 up to 256.
      stages: steps of both operands that there is room for.
      cluster: CTAs that share a tile of x. Two are neighbours on the card; four did not all find room.
      split: CTAs that share the steps of a tile; not together with `cluster`, nor in the SwiGLU form.
      raster: tiles of rows of x that are taken in turn before the next weights, so that L2 holds both.
      chunk: rows of y that are written at once.
    """

    tile_m: int
    stages: int
    cluster: int = 1
    split: int = 1
    raster: int = 8
    chunk: int = 64

    def rows_at_once(self, swiglu: bool) -> int:
        """The rows of y in a chunk: no more than a warpgroup writes, and a part of them without rest."""
        return math.gcd(self.chunk, self.tile_m // (2 if swiglu else self.split))

    def chunks(self, swiglu: bool) -> int:
        """The chunks that a warpgroup writes."""
        return self.tile_m // (2 if swiglu else self.split) // self.rows_at_once(swiglu)

    def shared_memory(self, out_bytes: int = 2, swiglu: bool = False, residual: bool = False) -> int:
        """Bytes of shared memory, but for the barriers, with results of `out_bytes`; 0 in the greatest form."""
        rows = self.rows_at_once(swiglu)
        pipeline = self.stages * STEP * (2 * self.tile_m + 2 * ROWS)
        writing = 2 * (self.chunks(swiglu) if residual else SLOTS) * rows * ROWS * out_bytes
        partial = 2 * ROWS * self.tile_m * 4 if self.split > 1 else 0
        exchange = 2 * 2 * ROWS * rows * 4 if swiglu else 0
        return pipeline + writing + partial + exchange


def heuristic(m: int, out: int, width: int, out_bytes: int = 2, swiglu: bool = False, residual: bool = False) -> Config:
    """The configuration of the least time by a model fitted to runs on an H100: rounds of tiles, steps in a tile.

    Args:
      m, out, width: rows of x, columns of y, columns of x.
      out_bytes: bytes of an element of y; 0: none is written, it is the greatest form.
      swiglu, residual: whether it is the SwiGLU form, or there is something to add.
    """

    def microseconds(config: Config) -> float:
        tiles = -(-m // config.tile_m) * -(-out // (ROWS if swiglu else 2 * ROWS)) * config.split
        # A cluster of four or eight lies within one of the card's groups of 16 or 18 SMs.
        room = processors() if config.split <= 2 else processors() // 16 * 16
        rounds = -(-tiles // room)
        steps = -(-width // (STEP * config.split))
        tile = steps * _MICROSECONDS[config.tile_m] + config.tile_m / 150
        if config.split > 1:  # start and exchange partial sums in each round
            tile += 3 + config.tile_m / 25 + (math.log2(config.split) - 1) * config.tile_m / 90
        time = rounds * tile + (3 if config.split == 1 else 0)
        if config.cluster > 1:  # helps a little where tiles of x are large and steps many
            time *= 0.99 if config.tile_m >= 192 and steps >= 32 else 1.01
        return time

    return min(search_space(m, out, width, out_bytes, swiglu, residual), key=microseconds)


# A step of both warpgroups, by tile_m: below 256 rows the conversion of the weights outlasts the product.
_MICROSECONDS = {32: 0.35, 64: 0.38, 128: 0.50, 192: 0.64, 256: 0.71}


def search_space(
    m: int, out: int, width: int, out_bytes: int = 2, swiglu: bool = False, residual: bool = False
) -> Iterable[Config]:
    """Every configuration worth a measurement, each with as many stages as shared memory holds, up to eight.

    Arguments as of `heuristic`.
    """
    columns = ROWS if swiglu else 2 * ROWS
    for tile_m, cluster, split in itertools.product(_MICROSECONDS, (1, 2), (1, 2, 4, 8)):
        if tile_m >= 2 * m and tile_m > min(_MICROSECONDS):
            continue  # more than half of it would be rows that are not there
        if split > 1 and (swiglu or cluster > 1 or tile_m // split < 8 or width < STEP * split):
            continue
        if split > 1 and tile_m // split % 32 and tile_m // split not in (8, 16):
            continue  # rows of partial sums lie in shared memory by 32, 64 or 128 bytes
        if cluster > 1 and out_bytes > 0 and -(-out // columns) % cluster:
            continue
        if out_bytes == 0 and (split > 1 or tile_m > GREATEST_TILE or -(-m // tile_m) > processors() // cluster):
            continue  # a CTA stays with its rows of x
        for stages in range(8, 2, -1):
            config = Config(tile_m, stages, cluster, split, chunk=min(32, tile_m // 4) if swiglu else 64)
            if swiglu and config.chunks(swiglu) % 2:
                break  # the two buffers of the exchange would not alternate from one tile to the next
            if config.shared_memory(out_bytes, swiglu, residual) <= SHARED_MEMORY:
                yield config
                break


def _swizzled(dtype: Any, columns: int) -> tuple[Any, ...]:
    """Transforms of a tile in shared memory with at least `columns` of `dtype`, as wgmma and TMA want it."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _constant(x: int) -> ir.Value:
    """The 32 bits of x, which may be written as an unsigned number."""
    return mgpu_utils.c(x - (x >> 31 << 32), ir.IntegerType.get_signless(32))


def _pure(result: ir.Type, arguments: list[Any], code: str, constraints: str) -> Any:
    """An instruction that depends on its arguments only."""
    return llvm.inline_asm(result, arguments, code, constraints, has_side_effects=False)


def _load_scales(scales: Any, words: int) -> list[jax.Array]:
    """Read float16 [64, 2 * words] in global memory as `words` arrays int32 [64], two scales in each.

    The layout of the result is that of the rows of a wgmma: each thread has rows r and r + 8.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=[plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=_ROW_LAYOUT)] * words,
    )
    def read(_: Any, ref: Any) -> list[Any]:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        thread = arith.remui(mgpu_utils.thread_idx(), _constant(128))
        row = arith.addi(
            arith.muli(arith.divui(thread, _constant(32)), _constant(16)),
            arith.divui(arith.remui(thread, _constant(32)), _constant(4)),
        )
        (stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
        layout = _ROW_LAYOUT.to_mgpu()
        registers = [np.empty(layout.registers_shape((ROWS,)), dtype=object) for _ in range(words)]
        outputs = ", ".join(f"${i}" for i in range(words))
        kind = ".v2.b32" if words == 2 else ".b32"
        for half in range(2):
            offset = arith.muli(arith.addi(row, _constant(8 * half)), _constant(2 * stride))
            address = llvm.add(base, arith.extui(i64, offset), overflow_flags=llvm.IntegerOverflowFlags.none)
            # An ordered instruction: left to the compiler, the load would sink to where its result is used.
            loaded: Any = llvm.inline_asm(
                llvm.StructType.get_literal([i32] * words) if words > 1 else i32,
                [address],
                f"{{ .reg .u64 a; cvta.to.global.u64 a, ${words}; ld.global.nc{kind} {{{outputs}}}, [a]; }}",
                ",".join(["=r"] * words + ["l"]),
                has_side_effects=True,
            )
            for i, array in enumerate(registers):
                word = llvm.extractvalue(i32, loaded, [i]) if words > 1 else loaded
                array.flat[half] = mgpu_utils.bitcast(word, layout.registers_element_type(i32))
        return [mgpu.FragmentedArray(_registers=r, _layout=layout, _is_signed=True) for r in registers]

    return read(scales)


def _prefetch(scales: Any) -> None:
    """Start bringing rows of scales into L2: they come from memory otherwise, later than the first weights."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(_: Any, ref: Any) -> None:
        with threads.when((threads.thread_index() & 127).equals(0)):
            threads.prefetch(threads.global_address(ref), 2 * math.prod(ir.MemRefType(ref.type).shape))

    start(scales)


def _dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Return int8 [64, 64] times two scales a row, as bfloat16 in the layout of wgmma's left operand.

    The product is exact in float32 and rounded once, as in the reference. Bytes b, flipped to v + 128, are written into
    the mantissa of 2^15, which makes them 2^15 + 128 + v; one fused multiply-add leaves v * scale.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_UPCAST_2X, _ROW_LAYOUT),
        return_type=plgpu.ShapeDtypeStruct((ROWS, STEP), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def convert(_: Any, values: Any, scales: Any) -> Any:
        i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
        f16, f32 = ir.F16Type.get(), ir.F32Type.get()
        even = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(mgpu_utils.thread_idx(), _constant(2)), _constant(0))
        blend = arith.select(even, _constant(0x5410), _constant(0x3276))
        into, minus = np.float32(BIAS).view(np.int32), mgpu_utils.c(-float(BIAS + 128), f32)
        scale, shift = {}, {}
        for half, word in enumerate(scales.registers.flat):
            word = mgpu_utils.bitcast(word, i32)
            for block in range(2):
                bits = arith.trunci(i16, arith.shrui(word, _constant(16 * block)))
                scale[block, half] = arith.extf(f32, mgpu_utils.bitcast(bits, f16))
                shift[block, half] = arith.mulf(scale[block, half], minus)
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((ROWS, STEP)), dtype=object)
        for index, word in np.ndenumerate(values.registers):
            # Threads 2t and 2t + 1 have four columns each of two groups of eight; wgmma wants two of each group.
            other = mgpu_utils.shfl_bfly(word, 1)
            word = mgpu_utils.bitcast(mgpu_utils.prmt(word, other, blend), i32)
            word = arith.xori(word, _constant(0x80808080))
            key = index[1] * 16 // BLOCK, sum(index[2:])  # the block of columns; which of rows r and r + 8
            for pair in range(2):
                w = []
                for byte in (2 * pair, 2 * pair + 1):
                    biased = _pure(f32, [word], f"prmt.b32 $0, $1, {into:#x}, {0x7404 | byte << 4:#x};", "=f,r")
                    w.append(_pure(f32, [biased, scale[key], shift[key]], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"))
                packed = _pure(i32, [w[1], w[0]], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
                registers[index[0], index[1] * 2 + pair, *index[2:-1]] = mgpu_utils.bitcast(
                    packed, ir.VectorType.get((2,), ir.BF16Type.get())
                )
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return convert(values, scales)


def _call(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: Any,
    swiglu: bool,
    config: Config,
    known: int | None = None,
) -> Any:
    """The kernel: y [m, out], or with `known` the greatest form, values [M, P] and columns [M, P] with M >= m."""
    m, width = x.shape
    out = values.shape[0] // (2 if swiglu else 1)
    tile_m, stages, cluster, split = config.tile_m, config.stages, config.cluster, config.split
    tile_n = ROWS if swiglu else 2 * ROWS  # columns of y
    columns = tile_m // split  # of the accumulator that a CTA writes
    steps = pl.cdiv(pl.cdiv(width, STEP), split)  # of a CTA; past the end of the rows, TMA fills with zeros
    m_tiles, n_tiles = pl.cdiv(m, tile_m), pl.cdiv(out, tile_n * cluster)
    tiles = m_tiles * n_tiles
    ctas = min(processors() // cluster, tiles) if split == 1 else tiles  # in clusters
    if known is not None:  # each stays with a tile of rows of x
        ctas = m_tiles * min(processors() // cluster // m_tiles, n_tiles)
    chunk, chunks = config.rows_at_once(swiglu), config.chunks(swiglu)
    in_flight = min(IN_FLIGHT, stages)
    slots = SLOTS if residual is None else chunks  # what is added waits where the result will be
    blocks = width // BLOCK
    words = 2 if blocks % 4 == 0 and (split == 1 or steps % 2 == 0) else 1

    def body(x_ref: Any, values_ref: Any, scales_ref: Any, *refs: Any) -> None:
        remaining = iter(refs)

        def given(condition: bool) -> Any:
            return next(remaining) if condition else None

        bias_ref, residual_ref = given(bias is not None), given(residual is not None)
        y_ref, places_ref = next(remaining), given(known is not None)
        x_smem, w_smem, y_smem = next(remaining), next(remaining), given(known is None)
        full, empty = next(remaining), next(remaining)
        arrived = given(residual is not None)
        partial_smem, partial_full = given(split > 1), given(split > 1)
        exchange_smem, exchanged = given(swiglu), given(swiglu)
        wg = lax.axis_index("wg")
        rank = lax.axis_index("split")
        first_cluster = lax.axis_index("cta")
        my_tiles = lax.div(tiles - first_cluster + ctas - 1, ctas)

        def place(i: Any) -> tuple[jax.Array, jax.Array]:
            """The first row and the first column of y in this CTA's i-th tile."""
            number = first_cluster + i * ctas
            if known is None:
                mi, ni = plgpu.planar_snake(number, (m_tiles, n_tiles), 0, config.raster)
            else:
                mi, ni = lax.rem(number, m_tiles), lax.div(number, m_tiles)
            return mi * tile_m, (ni * cluster + lax.axis_index("cluster")) * tile_n

        @pl.when(wg == 2)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, my_tiles)
            def _tile(i: jax.Array) -> None:
                m0, n0 = place(i)

                @pl.loop(0, steps)
                def _step(k: jax.Array) -> None:
                    step = i * steps + k
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    @pl.when(step >= in_flight)
                    def _() -> None:
                        plgpu.barrier_wait(full.at[lax.rem(step - in_flight, stages)])

                    part = pl.ds((rank * steps + k) * STEP, STEP)
                    if swiglu:
                        for half in range(2):
                            plgpu.copy_gmem_to_smem(
                                values_ref.at[pl.ds(n0 + half * out, ROWS), part],
                                w_smem.at[slot, pl.ds(half * ROWS, ROWS)],
                                full.at[slot],
                            )
                    else:
                        plgpu.copy_gmem_to_smem(
                            values_ref.at[pl.ds(n0, 2 * ROWS), part], w_smem.at[slot], full.at[slot]
                        )
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(m0, tile_m), part],
                        x_smem.at[slot],
                        full.at[slot],
                        collective_axes="cluster" if cluster > 1 else None,
                    )

            if cluster > 1:  # a CTA must not end before the others have told it what they consumed
                total = my_tiles * steps

                @pl.loop(jnp.maximum(total - stages, 0), total)
                def _drain(step: jax.Array) -> None:
                    plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(wg < 2)
        def _consume() -> None:
            plgpu.set_max_registers(232, action="increase")

            def first_row(i: jax.Array) -> jax.Array:
                """Of the warpgroup's weights in the i-th tile; past the end, whatever: it is not written."""
                row = place(i)[1] + wg * (out if swiglu else ROWS)
                return jnp.minimum(row, values_ref.shape[0] - ROWS)

            def tile(i: jax.Array, best: Any) -> Any:
                """Finish the CTA's i-th tile; `best` is `greatest.kept` in the greatest form, else nothing."""
                m0, n0 = place(i)
                m0 = m0 + rank * columns
                n0 = n0 + (0 if swiglu else wg * ROWS)
                row0 = first_row(i)
                if tiles > ctas:
                    _prefetch(scales_ref.at[pl.ds(first_row(i + 1), ROWS)])
                targets = [
                    (pl.ds(m0 + (wg * chunks if swiglu else 0) * chunk + j * chunk, chunk), pl.ds(n0, ROWS))
                    for j in range(chunks)
                ]

                def slot_of(k: Any) -> jax.Array:
                    return lax.rem(i * steps + k, stages)

                def load_scales(pair: Any) -> list[jax.Array]:
                    """Scales of the steps 2 * pair and 2 * pair + 1."""
                    pair = jnp.int32(pair)
                    start = [
                        jnp.minimum((rank * steps + 2 * pair + n) * 2, blocks - 2 * words) for n in range(0, 2, words)
                    ]
                    rows = pl.ds(row0, ROWS)
                    return [s for b in start for s in _load_scales(scales_ref.at[rows, pl.ds(b, 2 * words)], words)]

                def load_weights(k: Any, step_scales: jax.Array) -> jax.Array:
                    w = load(w_smem.at[slot_of(k), pl.ds(wg * ROWS, ROWS)], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                    return _dequantize(w, step_scales)

                def multiply(acc: Any) -> jax.Array:
                    def start(k: Any, w: jax.Array) -> None:
                        plgpu.wgmma(acc, w, x_smem.at[slot_of(k)].transpose((1, 0)))

                    def follow(k: Any, step_scales: jax.Array) -> jax.Array:
                        """With step k started, see step k - 1 end, and convert the weights of step k + 1."""
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[slot_of(k - 1)])
                        plgpu.barrier_wait(full.at[slot_of(k + 1)])
                        return load_weights(k + 1, step_scales)

                    def two_steps(j: jax.Array, carry: Any) -> Any:
                        # Two, so that the weights being converted are in other registers than those in use.
                        w, pair = carry
                        k = 2 * j + 1
                        start(k, w)
                        next_pair = load_scales(j + 2)
                        w = follow(k, pair[0])
                        start(k + 1, w)
                        return follow(k + 1, pair[1]), next_pair

                    pair = load_scales(0)
                    next_pair = load_scales(1)
                    plgpu.barrier_wait(full.at[slot_of(0)])
                    w = load_weights(0, pair[0])
                    if steps > 1:
                        start(0, w)
                        plgpu.barrier_wait(full.at[slot_of(1)])
                        w = load_weights(1, pair[1])
                    if residual is not None:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for j, target in enumerate(targets):
                            plgpu.copy_gmem_to_smem(residual_ref.at[target], y_smem.at[wg, j], arrived.at[wg, j])
                    turns = max(steps - 2, 0) // 2
                    w, pair = lax.fori_loop(0, turns, two_steps, (w, next_pair))
                    if steps > 2 and steps % 2:
                        start(steps - 2, w)
                        w = follow(steps - 2, pair[0])
                    start(steps - 1, w)
                    plgpu.wgmma_wait(0)
                    for k in range(max(steps - 2, 0), steps):
                        plgpu.barrier_arrive(empty.at[slot_of(k)])
                    return acc[...]

                acc = pl.run_scoped(multiply, plgpu.ACC((ROWS, tile_m), jnp.float32))
                if known is not None:
                    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_ROW_LAYOUT)
                    return greatest.keep(acc, n0 + rows, best, known)
                if split > 1:
                    for q in range(split):  # rank q gets the q-th columns of all
                        plgpu.async_store_smem(
                            acc[:, q * columns : (q + 1) * columns],
                            partial_smem.at[wg, rank],
                            partial_full.at[wg],
                            cluster_idx=jnp.int32(q),
                            cluster_dim="split",
                        )
                    plgpu.barrier_wait(partial_full.at[wg])
                    acc = load(partial_smem.at[wg, 0], layout=plgpu.Layout.WGMMA)
                    for q in range(1, split):
                        acc += load(partial_smem.at[wg, q], layout=plgpu.Layout.WGMMA)
                if bias is not None:
                    b = load(bias_ref.at[pl.ds(row0, ROWS)], layout=_ROW_LAYOUT, optimized=False)
                    acc += lax.broadcast_in_dim(b.astype(jnp.float32), acc.shape, (0,))
                for j, target in enumerate(targets):
                    if swiglu:  # this warpgroup finishes its half of the columns, and hands over the other
                        near, far = (acc[:, n * chunk : (n + 1) * chunk] for n in (j, chunks + j))
                        first = jnp.broadcast_to(wg == 0, near.shape)
                        exchange_smem[j % 2, wg] = jnp.where(first, far, near)
                        plgpu.barrier_arrive(exchanged)
                        plgpu.barrier_wait(exchanged)
                        mine = jnp.where(first, near, far)
                        other = load(exchange_smem.at[j % 2, 1 - wg], layout=plgpu.Layout.WGMMA)
                        gate, up = jnp.where(first, mine, other), jnp.where(first, other, mine)
                        piece = gate / (1 + jnp.exp(-gate)) * up
                    else:
                        piece = acc[:, j * chunk : (j + 1) * chunk]
                    slot = j % slots
                    buffer = y_smem.at[wg, slot].transpose((1, 0))
                    if residual is not None:
                        plgpu.barrier_wait(arrived.at[wg, slot])
                        r = load(buffer, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                        piece += plgpu.layout_cast(r, plgpu.Layout.WGMMA).astype(jnp.float32)
                    else:
                        plgpu.wait_smem_to_gmem(slots - 1 if j else 0, wait_read_only=True)
                    buffer[...] = plgpu.layout_cast(piece.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[wg, slot], y_ref.at[target])
                return best

            if known is None:
                lax.fori_loop(0, my_tiles, tile, ())
                plgpu.wait_smem_to_gmem(0)
            else:
                nothing = [
                    plgpu.layout_cast(jnp.full(kept.shape, value, kept.dtype), kept.layout)
                    for kept, value in zip(
                        greatest.kept(tile_m), (-jnp.inf, 0), strict=True
                    )  # -inf alone: the first column
                ]
                best = lax.fori_loop(0, my_tiles, tile, nothing)
                number = lax.div(first_cluster, m_tiles) * cluster + lax.axis_index("cluster")
                part = pl.ds(place(0)[0], tile_m), pl.ds((number * 2 + wg) * WARPS, WARPS)
                greatest.store(best, y_ref.at[part], places_ref.at[part])

    f32 = jnp.float32
    consumed: dict[str, Any] = dict(num_arrivals=2, num_barriers=stages)
    scratch: list[Any] = [
        plgpu.SMEM((stages, tile_m, STEP), x.dtype, transforms=_swizzled(x.dtype, STEP)),
        plgpu.SMEM((stages, 2 * ROWS, STEP), values.dtype, transforms=_swizzled(values.dtype, STEP)),
        plgpu.Barrier(num_arrivals=3 if swiglu else 2, num_barriers=stages),
        plgpu.Barrier(**consumed) if cluster == 1 else plgpu.ClusterBarrier(collective_axes=("cluster",), **consumed),
    ]
    if known is None:
        scratch.insert(2, plgpu.SMEM((2, slots, chunk, ROWS), out_dtype, transforms=_swizzled(out_dtype, ROWS)))
        results: Any = jax.ShapeDtypeStruct((m, out), out_dtype)
    else:
        parts = m_tiles * tile_m, ctas // m_tiles * cluster * 2 * WARPS
        results = [jax.ShapeDtypeStruct(parts, kept.dtype) for kept in greatest.kept(tile_m)]
    if residual is not None:
        scratch.append(plgpu.Barrier(num_barriers=(2, slots)))
    if split > 1:
        scratch.append(plgpu.SMEM((2, split, ROWS, columns), f32, transforms=_swizzled(f32, columns)))
        scratch.append(plgpu.Barrier(num_arrivals=split, num_barriers=2))
    if swiglu:
        scratch.append(plgpu.SMEM((2, 2, ROWS, chunk), f32, transforms=_swizzled(f32, chunk)))
        scratch.append(plgpu.Barrier(num_arrivals=2))
    kernel = plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        cluster=(cluster, split),
        cluster_names=("cluster", "split"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(x, values, scales, *(a for a in (bias, residual) if a is not None))


def _sizes(x: jax.Array, values: jax.Array, scales: jax.Array, swiglu: bool = False) -> tuple[int, int, int]:
    """Rows of x, columns of y and columns of x, if the kernel can take them."""
    m, out, width = math.prod(x.shape[:-1]), values.shape[0] // (2 if swiglu else 1), x.shape[-1]
    if x.dtype != jnp.bfloat16 or values.dtype != jnp.int8 or scales.dtype != jnp.float16:
        raise NotImplementedError(
            f"x, weights and scales of {x.dtype}, {values.dtype} and {scales.dtype}, not bfloat16, int8 and float16"
        )
    if m == 0 or width % STEP or out % ROWS or out < ROWS * (1 if swiglu else 2):
        # One warpgroup's rows alone: the other's results, beyond the end, have been seen where the first's belong.
        raise NotImplementedError(f"weights [{out}, {width}] that are not multiples of {ROWS} and {STEP}, or too few")
    return m, out, width


def _prepare(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: Any,
    swiglu: bool,
    config: Config | None,
) -> jax.Array:
    """Check the arguments, choose the configuration, and bring x [..., in] to a multiple of 8 rows for TMA."""
    m, out, width = _sizes(x, values, scales, swiglu)
    dtype = jnp.dtype(out_dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"results of {dtype}, not bfloat16 or float32")
    if residual is not None and residual.dtype != dtype:
        raise NotImplementedError(f"a residual of {residual.dtype} and results of {dtype}")
    if config is not None and swiglu and config.chunks(swiglu) % 2:
        raise ValueError(f"the SwiGLU form needs an even number of chunks: {config}")
    if config is None:
        settings = m, out, width, dtype.itemsize, swiglu, residual is not None
        op = "gate_up_large" if swiglu else "quant_matmul_large"
        config = choose(op, f"M={m} out={out} in={width}", heuristic(*settings), lambda: search_space(*settings))
    flat = x.reshape(m, width)
    added = None if residual is None else residual.reshape(m, out)
    padding = -m % 8
    if padding:
        flat = jnp.pad(flat, ((0, padding), (0, 0)))
        added = None if added is None else jnp.pad(added, ((0, padding), (0, 0)))
    y = _call(flat, values, scales, bias, added, dtype, swiglu, config)
    return y[:m].reshape(*x.shape[:-1], out)


def matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply rows by block-quantised weights, for many rows.

    Args:
      x: [..., in] bfloat16. A number of rows that is no multiple of 8 costs a copy of x and of the result.
      values: [out, in] int8, in and out multiples of 64.
      scales: [out, in / 32] float16.
      bias: [out], added.
      residual: [..., out] of the result's dtype, added.
      out_dtype: bfloat16 or float32; x's dtype if None.
      config: for measurements; otherwise the device's tuned one, or else the heuristic's.

    Returns:
      [..., out], accumulated in float32.

    Raises:
      NotImplementedError: for other dtypes and sizes.
    """
    return _prepare(x, values, scales, bias, residual, out_dtype or x.dtype, False, config)


def gate_up(x: jax.Array, values: jax.Array, scales: jax.Array, config: Config | None = None) -> jax.Array:
    """Return silu(x gate^T) * (x up^T), for many rows.

    Args:
      x: [..., in] bfloat16.
      values: [2 * F, in] int8, the gate's rows first; in and F multiples of 64.
      scales: [2 * F, in / 32] float16.
      config: as for `matmul`.

    Returns:
      [..., F] bfloat16, rounded once, from products accumulated in float32.

    Raises:
      NotImplementedError: for other dtypes and sizes.
    """
    return _prepare(x, values, scales, None, None, x.dtype, True, config)


def argmax(
    x: jax.Array, values: jax.Array, scales: jax.Array, known: int, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """Find the greatest product of each row with block-quantised weights, for many rows; no product is written.

    Args:
      x: [M, in] bfloat16.
      values: [out, in] int8, in and out multiples of 64.
      scales: [out, in / 32] float16.
      known: 1 to out; products with weights from there on do not count.
      config: as for `matmul`.

    Returns:
      The greatest of the known products, accumulated in float32, float32 [M], and the first place of it, int32 [M]; a
      NaN is the greatest.

    Raises:
      NotImplementedError: for other dtypes and sizes, and more rows than fit the card at once.
    """
    m, out, width = _sizes(x, values, scales)
    if not any(search_space(m, out, width, out_bytes=0)):
        raise NotImplementedError(f"{m} rows, more than fit the card at once")
    if config is None:
        key = f"M={m} out={out} in={width}"
        settings = m, out, width, 0
        config = choose("quant_matmul_argmax", key, heuristic(*settings), lambda: search_space(*settings))
    padded = jnp.pad(x, ((0, -m % 8), (0, 0))) if m % 8 else x
    found, places = _call(padded, values, scales, None, None, None, False, config, known)
    return agree(found[:m], places[:m])
