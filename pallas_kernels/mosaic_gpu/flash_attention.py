"""Prefill attention for Hopper: a pipeline of TMA loads, tensor-core products and softmax in one kernel.

A CTA owns one head of one row and a tile of 64 queries a compute warpgroup. A further warpgroup, with few registers,
fetches the key and value blocks that some query of the tile may see into a ring in shared memory. A compute warpgroup
issues the scores of block i (q k^T) and the weighted values of block i - 1 (p v) together; its softmax of block i runs
while the latter, or another warpgroup's products, keep the tensor cores busy. As many CTAs as the device has SMs stay
for all tiles: the queries and first blocks of the next tile come while the last one is finished. The pipeline is that
of FlashAttention-3 (Shah et al. 2024, https://arxiv.org/abs/2407.08608).

int8 blocks are converted by the fetching warpgroup on their way into the ring; the keys' scales multiply the scores,
and the values' scales the weights.

Which blocks a tile needs follows from positions alone, so a few small XLA operations decide it, the same for all
layers: for each tile, first the blocks in which something must be masked, then those that every query sees whole; the
rest are never fetched. The softmax is online, in base 2, with the factor 1 / sqrt(H) folded into its exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import HEAD_WIDTHS, Rows, Visibility
from pallas_kernels.tuning import choose

Index = int | jax.Array
load: Any = plgpu.load  # the types of older releases ask for an index
ROWS = 64  # queries of a compute warpgroup: the rows of a wgmma
NO_POSITION = jnp.iinfo(jnp.int32).max  # an empty slot's, so that it is later than every query's
SMS = 132  # of an H100
SHARED_BYTES = 225 << 10  # of a CTA's 227 KB; barriers take the rest
L2_BYTES = 24 << 20  # for keys and values, of an H100's 50 MB


@dataclass(frozen=True)
class Config:
    """How a CTA works.

    warpgroups: that compute, each with 64 queries.
    block: keys a step, a multiple of 32, or of 64 where they are int8.
    stages: blocks in the ring.
    turns: whether warpgroups take turns to issue their products.
    """

    warpgroups: int = 2
    block: int = 128
    stages: int = 2
    turns: bool = False


def heuristic(width: int, int8: bool = False) -> Config:
    """The best of the few measured on an H100, for bfloat16; for int8 what fits beside the stored blocks.

    Three warpgroups where their accumulators fit the registers: a block is then read for 192 queries at once.
    """
    if int8:
        return Config(block=64, stages=3) if width == 128 else Config()
    return {64: Config(warpgroups=3), 96: Config(warpgroups=3, block=96, turns=True), 128: Config()}[width]


def search_space(width: int, int8: bool = False) -> Iterable[Config]:
    """Configurations that fit the registers and shared memory."""
    blocks = range(64, 193, 64 if int8 else 32)
    for config in starmap(Config, product((2, 3), blocks, (2, 3, 4), (False, True))):
        # A thread's scores, weights (and scales) and weighted values, and the rest.
        registers = (3 + int8) * config.block // 4 + width // 2 + 32
        if registers <= _registers(config, int8)[1] and _shared_bytes(config, width, int8) <= SHARED_BYTES:
            yield config


def flash_attention(
    q: jax.Array,
    k: Rows,
    v: Rows,
    positions: jax.Array,
    key_positions: jax.Array,
    visibility: Visibility,
    lse: bool,
    config: Config | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """As `pallas_kernels.flash_attention`, for bfloat16 and H of 64, 96 or 128."""
    batch, length, heads, width = q.shape
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"queries of {q.dtype}, not bfloat16")
    stored = jnp.int8 if isinstance(k, tuple) else jnp.bfloat16
    (keys, *key_scales), (values, *value_scales) = (x if isinstance(x, tuple) else (x,) for x in (k, v))
    scales = [*key_scales, *value_scales]
    if keys.dtype != stored or values.dtype != stored or len(key_scales) != len(value_scales):
        raise NotImplementedError("keys and values that are not both bfloat16, or both int8 with scales")
    if width not in HEAD_WIDTHS:
        raise NotImplementedError(f"a head width of {width}, not one of {HEAD_WIDTHS}")
    kv_heads, slots = keys.shape[1:3]
    if config is None:
        key = f"T={length} S={slots} N={heads} K={kv_heads} H={width} {jnp.dtype(stored).name}"
        settings = width, bool(scales)
        config = choose("flash_attention", key, heuristic(*settings), lambda: search_space(*settings))

    tile_rows = config.warpgroups * ROWS
    padded_length = pl.cdiv(length, tile_rows) * tile_rows
    positions = jnp.pad(positions, ((0, 0), (0, padded_length - length)), mode="edge")
    padding = (0, -slots % config.block)
    key_positions = jnp.pad(key_positions, ((0, 0), padding), constant_values=-1)
    # The tensor maps' tiles of eight rows reach past the end, but not from within one.
    q = jnp.pad(q, ((0, 0), (0, -length % 8), (0, 0), (0, 0)))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, -slots % 8), (0, 0))) for x in (keys, values))
    scales = [jnp.pad(x, ((0, 0), (0, 0), padding)) for x in scales]
    plan, counts = _plan(positions, key_positions, visibility, tile_rows, config.block)
    key_positions = jnp.where(key_positions < 0, NO_POSITION, key_positions)

    out_type: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if lse:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, padded_length), jnp.float32))
    transforms = _swizzled(width, q.dtype, config.block)
    scratch: dict[str, Any] = dict(
        q_smem=plgpu.SMEM((2, tile_rows, width), q.dtype, transforms=transforms),
        k_smem=plgpu.SMEM((config.stages, config.block, width), q.dtype, transforms=transforms),
        v_smem=plgpu.SMEM((config.stages, config.block, width), q.dtype, transforms=transforms),
        q_ready=plgpu.Barrier(num_barriers=2),
        q_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=2),
        k_ready=plgpu.Barrier(num_barriers=config.stages),
        v_ready=plgpu.Barrier(num_barriers=config.stages),
        k_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        v_free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        turn=plgpu.Barrier(num_barriers=config.warpgroups),
    )
    if scales:
        scratch.update(
            stored_smem=plgpu.SMEM((2, 2, config.block, width), stored, transforms=_swizzled(width, stored)),
            stored_ready=plgpu.Barrier(num_barriers=(2, 2)),
        )
    kernel = plgpu.kernel(
        partial(_kernel, config=config, visibility=visibility),
        out_type=out_type,
        grid=(min(SMS, batch * heads * (padded_length // tile_rows)),),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    out, *sums = kernel(q, keys, values, positions, key_positions, plan, counts, *scales)
    out = out[:, :length]
    return (out, sums[0][:, :, :length].transpose(0, 2, 1)) if lse else out


def _registers(config: Config, int8: bool) -> tuple[int, int]:
    """Of a thread that fetches and of one that computes: an SM has 512 for each thread of a warpgroup."""
    fetching = 64 if int8 else 32 if config.warpgroups == 3 else 40
    return fetching, (512 - fetching) // config.warpgroups // 8 * 8


def _shared_bytes(config: Config, width: int, int8: bool) -> int:
    queries, block = 2 * config.warpgroups * ROWS * width, 2 * config.block * width  # numbers
    return 2 * (queries + config.stages * block) + (2 * block if int8 else 0)


def _plan(
    positions: jax.Array, key_positions: jax.Array, visibility: Visibility, tile_rows: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Which key blocks each tile of queries needs.

    Args:
      positions: [B, T], T a multiple of tile_rows.
      key_positions: [B or 1, S], S a multiple of block; negative where empty.

    Returns:
      int32 [B, tiles, blocks], the indices of those that need masking, of those seen whole and of those not seen, in
      this order, and int32 [B, tiles, 2]: how many are of the first sort, and of the first two, at least 1.
    """
    queries = positions.reshape(positions.shape[0], -1, 1, tile_rows)
    keys = key_positions.reshape(key_positions.shape[0], 1, -1, block)
    first_query, last_query = jnp.min(queries, -1), jnp.max(queries, -1)
    first_key = jnp.min(jnp.where(keys < 0, NO_POSITION, keys), -1)
    last_key = jnp.max(keys, -1)
    some = (last_key >= 0) & (last_query - first_key >= visibility.nearest)
    whole = (jnp.min(keys, -1) >= 0) & (first_query - last_key >= visibility.nearest)
    if visibility.window is not None:
        some &= (first_query - last_key < visibility.window) | (first_key < visibility.sinks)
        whole &= (last_query - first_key < visibility.window) | (last_key < visibility.sinks)
    plan = jnp.argsort(jnp.where(whole, 1, jnp.where(some, 0, 2)), axis=-1, stable=True)
    masked, seen = jnp.sum(some & ~whole, -1), jnp.sum(some, -1)
    return plan.astype(jnp.int32), jnp.stack([masked, jnp.maximum(seen, 1)], axis=-1).astype(jnp.int32)


class _Work(NamedTuple):
    """A tile of one head of one row, int32 each.

    nth: how many tiles its CTA has done before; before: how many blocks.
    masked, seen: how many of the tile's blocks need masking, and how many it has (see `_plan`).
    """

    nth: Index
    row: Index
    head: Index
    kv_head: Index
    tile: Index
    masked: Index
    seen: Index
    before: Index


def _kernel(
    q_gmem: Any, k_gmem: Any, v_gmem: Any, positions_gmem: Any, key_positions_gmem: Any, plan_gmem: Any,
    counts_gmem: Any, *refs: Any, q_smem: Any, k_smem: Any, v_smem: Any, q_ready: Any, q_free: Any, k_ready: Any,
    v_ready: Any, k_free: Any, v_free: Any, turn: Any, stored_smem: Any = None, stored_ready: Any = None,
    config: Config, visibility: Visibility,
) -> None:  # fmt: skip
    scales_gmem, (out_gmem, *sums_gmem) = (refs[:2], refs[2:]) if stored_smem is not None else ((), refs)
    width, dtype = q_gmem.shape[-1], q_gmem.dtype
    warpgroup = lax.axis_index("warpgroup")
    ring = (k_gmem, k_smem, k_ready, k_free), (v_gmem, v_smem, v_ready, v_free)
    fetching, computing = _registers(config, bool(scales_gmem))
    over_work = partial(_over_work, q_gmem.shape, k_gmem.shape, plan_gmem.shape[1], counts_gmem)

    def keys(work: _Work, i: Index) -> Any:
        return pl.ds(plan_gmem[work.row, work.tile, i] * config.block, config.block)

    def slot(work: _Work, i: Index) -> jax.Array:
        return lax.rem(work.before + i, config.stages)

    def fetch_queries(work: _Work) -> None:
        buffer = lax.rem(work.nth, 2)

        @pl.when(work.nth >= 2)
        def _() -> None:
            plgpu.barrier_wait(q_free.at[buffer])

        tile_rows = config.warpgroups * ROWS
        queries = pl.ds(work.tile * tile_rows, tile_rows)
        plgpu.copy_gmem_to_smem(q_gmem.at[work.row, queries, work.head], q_smem.at[buffer], q_ready.at[buffer])

    def wait_until_free(free: Any, work: _Work, i: Index) -> None:
        @pl.when(work.before + i >= config.stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot(work, i)])

    def fetch(work: _Work) -> None:
        fetch_queries(work)

        @pl.loop(0, work.seen)
        def _(i: Index) -> None:
            block, to = keys(work, i), slot(work, i)
            for gmem, smem, ready, free in ring:
                wait_until_free(free, work, i)
                plgpu.copy_gmem_to_smem(gmem.at[work.row, work.kv_head, block], smem.at[to], ready.at[to])

    def fetch_int8(work: _Work) -> None:
        """Blocks come as they are stored, one ahead, and are converted on their way into the ring."""

        def start(i: Index) -> None:
            buffer, block = lax.rem(work.before + i, 2), keys(work, i)
            for side, (gmem, *_) in enumerate(ring):
                to, ready = stored_smem.at[buffer, side], stored_ready.at[buffer, side]
                plgpu.copy_gmem_to_smem(gmem.at[work.row, work.kv_head, block], to, ready)

        fetch_queries(work)
        start(0)

        @pl.loop(0, work.seen)
        def _(i: Index) -> None:
            pl.when(i + 1 < work.seen)(lambda: start(i + 1))
            buffer, to = lax.rem(work.before + i, 2), slot(work, i)
            for side, (_, smem, ready, free) in enumerate(ring):
                plgpu.barrier_wait(stored_ready.at[buffer, side])
                wait_until_free(free, work, i)
                for part in range(0, config.block, ROWS):
                    rows = pl.ds(part, ROWS)
                    block = load(stored_smem.at[buffer, side, rows], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                    smem[to, rows] = block.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[to])

    def compute(work: _Work) -> None:
        buffer = lax.rem(work.nth, 2)
        queries = q_smem.at[buffer, pl.ds(warpgroup * ROWS, ROWS)]
        at_rows = pl.ds((work.tile * config.warpgroups + warpgroup) * ROWS, ROWS)
        per_row, per_key = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        shape = (ROWS, config.block)

        def take_turn() -> None:
            if config.turns:
                plgpu.barrier_wait(turn.at[warpgroup])

        def end_turn() -> None:
            if config.turns:
                plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, config.warpgroups)])

        def across(at: Any) -> jax.Array:
            """A block's values [block], one a key, for each of the warpgroup's queries."""
            return lax.broadcast_in_dim(load(at, layout=per_key, optimized=False), shape, [1])

        def scales(i: Index) -> list[jax.Array]:
            return [across(at.at[work.row, work.kv_head, keys(work, i)]) for at in scales_gmem]

        def hide(scores: jax.Array, i: Index) -> jax.Array:
            """Scores with -inf where a query does not see a key."""
            query = load(positions_gmem.at[work.row, at_rows], layout=per_row, optimized=False)
            row = work.row if key_positions_gmem.shape[0] > 1 else 0
            key = across(key_positions_gmem.at[row, keys(work, i)])
            seen = key <= lax.broadcast_in_dim(query - visibility.nearest, shape, [0])
            if visibility.window is not None:
                near = key > lax.broadcast_in_dim(query - visibility.window, shape, [0])
                seen &= (near | (key < visibility.sinks)) if visibility.sinks else near
            return jnp.where(seen, scores, -jnp.inf)

        def softmax(
            scores: jax.Array, top: jax.Array, i: Index, factors: list[jax.Array], masking: bool
        ) -> tuple[jax.Array, ...]:
            """Weights [64, block] of block i, their sums, the new maxima and the factor for what the old ones gave."""
            if factors:
                scores *= factors[0].astype(jnp.float32)
            if masking:
                scores = hide(scores, i)
            scale = math.log2(math.e) / math.sqrt(width)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masking else new_top
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(base, shape, [0]))
            total = jnp.sum(weights, axis=1)
            if factors:
                weights *= factors[1].astype(jnp.float32)
            return weights, total, new_top, jnp.exp2(top - base)

        def wait_for_keys(i: Index) -> None:
            @pl.when(i < work.seen)
            def _() -> None:
                plgpu.barrier_wait(k_ready.at[slot(work, i)])

        def first_block(scores_ref: Any) -> tuple[jax.Array, ...]:
            factors, at = scales(0), slot(work, 0)
            plgpu.barrier_wait(k_ready.at[at])
            take_turn()
            plgpu.wgmma(scores_ref, queries, k_smem.at[at].transpose((1, 0)))
            end_turn()
            scores = plgpu.wgmma_accumulator_load(scores_ref)
            plgpu.barrier_arrive(k_free.at[at])
            top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), per_row)
            weights, total, top, _ = softmax(lax.optimization_barrier(scores), top, 0, factors, True)
            return weights.astype(dtype), total, top

        def next_block(i: Index, carry: tuple[jax.Array, ...], acc_ref: Any, masking: bool) -> tuple[jax.Array, ...]:
            weights, total, top = carry
            at, last = slot(work, i), slot(work, i - 1)
            factors = scales(i)
            plgpu.barrier_wait(v_ready.at[last])

            def products(scores_ref: Any) -> tuple[jax.Array, ...]:
                take_turn()
                plgpu.wgmma(scores_ref, queries, k_smem.at[at].transpose((1, 0)))
                plgpu.wgmma(acc_ref, weights, v_smem.at[last])
                end_turn()
                scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
                plgpu.barrier_arrive(k_free.at[at])
                new_weights, block_total, new_top, decay = softmax(scores, top, i, factors, masking)
                done = lax.optimization_barrier((new_weights, total * decay + block_total, new_top))
                # This wait also keeps the assembler from moving the next one up, to before the softmax.
                wait_for_keys(i + 1)
                # The registers of the old weights are free only now.
                acc, new_weights = lax.optimization_barrier((plgpu.wgmma_accumulator_load(acc_ref), done[0]))
                plgpu.barrier_arrive(v_free.at[last])
                acc_ref[...] = acc * lax.broadcast_in_dim(decay, (ROWS, width), [0])
                return new_weights.astype(dtype), *done[1:]

            return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

        def all_blocks(acc_ref: Any) -> tuple[jax.Array, ...]:
            plgpu.barrier_wait(q_ready.at[buffer])
            carry = pl.run_scoped(first_block, plgpu.ACC(shape, jnp.float32))
            wait_for_keys(1)

            @pl.when(work.nth >= 1)
            def _() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[1 - buffer])

            step = partial(next_block, acc_ref=acc_ref)
            carry = lax.fori_loop(1, work.masked, partial(step, masking=True), carry)
            carry = lax.fori_loop(jnp.maximum(work.masked, 1), work.seen, partial(step, masking=False), carry)
            weights, total, top = carry
            last = slot(work, work.seen - 1)
            plgpu.barrier_wait(v_ready.at[last])
            plgpu.wgmma(acc_ref, weights, v_smem.at[last])
            acc = plgpu.wgmma_accumulator_load(acc_ref)
            plgpu.barrier_arrive(v_free.at[last])
            return acc, total, top

        acc, total, top = pl.run_scoped(all_blocks, plgpu.ACC((ROWS, width), jnp.float32))
        inverse = 1 / jnp.where(total == 0.0, 1.0, total)
        queries[...] = (acc * lax.broadcast_in_dim(inverse, (ROWS, width), [0])).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out_gmem.at[work.row, at_rows, work.head])
        for at in sums_gmem:
            at[work.row, work.head, at_rows] = (top + jnp.log2(total)) * math.log(2)

    @pl.when(warpgroup == config.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(fetching, action="decrease")
        over_work(fetch_int8 if scales_gmem else fetch)

    @pl.when(warpgroup < config.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(computing, action="increase")
        if config.turns:

            @pl.when(warpgroup == config.warpgroups - 1)
            def _() -> None:
                plgpu.barrier_arrive(turn.at[0])

        over_work(compute)
        plgpu.wait_smem_to_gmem(0)


def _over_work(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], tiles: int, counts_gmem: Any, do: Callable[[_Work], None]
) -> None:
    """Do the CTA's share of the tiles.

    The heads are taken a section at a time, as many as may share the L2 cache, and of a section the last tiles first,
    which see most keys. The CTAs take them in turn, in every second round in the other order, so that all see about as
    many keys.
    """
    batch, _, heads, width = q_shape
    grouped = heads // k_shape[1]
    fitting = max(1, L2_BYTES // (4 * k_shape[2] * width)) * grouped
    together = max(n for n in range(1, batch * heads + 1) if batch * heads % n == 0 and n <= fitting)
    ctas, cta, works = lax.axis_size("cta"), lax.axis_index("cta"), batch * heads * tiles

    def place(nth: Index) -> jax.Array:
        return nth * ctas + jnp.where(lax.rem(nth, 2) == 0, cta, ctas - 1 - cta)

    def one(nth: Index, before: Index) -> jax.Array:
        section, rest = lax.div(place(nth), tiles * together), lax.rem(place(nth), tiles * together)
        tile, pair = tiles - 1 - lax.div(rest, together), section * together + lax.rem(rest, together)
        row, head = lax.div(pair, heads), lax.rem(pair, heads)
        masked, seen = counts_gmem[row, tile, 0], counts_gmem[row, tile, 1]
        do(_Work(nth, row, head, lax.div(head, grouped), tile, masked, seen, before))
        return before + seen

    rounds = pl.cdiv(works, ctas)
    lax.fori_loop(0, rounds - jnp.where(place(rounds - 1) < works, 0, 1), one, 0)


def _swizzled(width: int, dtype: Any, block: int | None = None) -> tuple[Any, Any]:
    """Transforms of rows [..., width] in shared memory: the widest swizzle whose tiles make up a row, and a block.

    A wgmma contracts over whole tiles: over a row's for the scores, over a block's for the weighted values.
    """
    itemsize = jnp.dtype(dtype).itemsize
    common = width if block is None else math.gcd(width, block)
    columns = next(n // itemsize for n in (128, 64, 32) if common % (n // itemsize) == 0)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)
