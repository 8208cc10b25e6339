"""Decode attention for Hopper: each warp streams keys and values straight into the tensor cores' fragments.

A kv head's queries (G of them times T) are the narrow side of `mma.m16n8k16`. Sums over H and over keys may run in any
order, and so may the rows of a result, so a thread takes 16 consecutive bytes of a row wherever a fragment wants pairs
of elements: whole rows are read with wide loads, nothing passes through shared memory, no barrier stands between a warp
and its next keys, and what hides the memory's latency is all the warps' loads in flight, some 64 KB an SM.

    scores [queries, keys] = q [16, H] k^T [H, 8 keys]         the result's fragment is, packed to bfloat16,
    out^T  [H, queries]    = v^T [16 of H, 16 keys] weights^T   the second operand here: weights never move

Work is split four ways: a (row, kv head) pair has `splits` clusters of `cluster` blocks of `4 warpgroups` warps; warps
take units of `unit` keys in turn. Each keeps an online softmax in base 2 and its own sums. They are put together in a
fixed order: warps through shared memory, blocks through the cluster's, and clusters through global memory, by the one
that is done last. How many clusters a pair uses follows from how many keys its queries can see; the rest leave at once,
and a short row is one cluster's work, without a detour through memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import LaunchContext
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.flash_attention import Rows, Visibility
from pallas_kernels.mosaic_gpu import threads as th
from pallas_kernels.mosaic_gpu.threads import Scalar
from pallas_kernels.tuning import choose

SMS = 132
TILE = 8  # queries or keys of a fragment's narrow side
UNITS = 2  # that each warp of a cluster should have before the next cluster is worth its share of putting together
NO_POSITION = 2**31 - 1  # later than every query's


@dataclass(frozen=True)
class Config:
    """Clusters of a (row, kv head) pair, blocks of a cluster, groups of 4 warps of a block, keys that a warp takes."""

    splits: int = 1
    cluster: int = 1
    warpgroups: int = 2
    unit: int = 32


@dataclass(frozen=True)
class _Shape:
    """What the kernel is compiled for."""

    batch: int
    queries: int  # T
    heads: int
    kv_heads: int
    slots: int  # S
    width: int  # H
    int8: bool
    ordered: bool
    shared_positions: bool  # one row of key positions for all
    visibility: Visibility

    @property
    def columns(self) -> int:
        """Queries of a kv head."""
        return self.heads // self.kv_heads * self.queries

    @property
    def tiles(self) -> int:
        """Of 8 queries, that a warp works on together."""
        return 1 if self.columns <= TILE else 2

    @property
    def groups(self) -> int:
        """Of queries, each of which reads the keys anew."""
        return pl.cdiv(self.columns, TILE * self.tiles)

    @property
    def pairs(self) -> int:
        return self.batch * self.kv_heads * self.groups


def heuristic(shape: _Shape) -> Config:
    """A block an SM while there are few pairs, in clusters as large as can be, and no more than the slots can feed.

    Of more pairs than that, several on an SM, blocks are the smaller: an SM has 16 warps to keep busy, and a block's
    slots are free again sooner. int8 takes twice as many: its conversion keeps warps from their next loads for longer.
    """
    unit, blocks = (32, 2 * SMS) if shape.int8 else (16, SMS)
    cluster = max(c for c in (1, 2, 4, 8) if c == 1 or c * shape.pairs <= blocks)
    warpgroups = 2 if cluster > 1 else max(w for w in (1, 2, 4) if w == 1 or w * shape.pairs <= 4 * blocks)
    fed = pl.cdiv(shape.slots, UNITS * unit * 4 * warpgroups * cluster)
    return Config(max(1, min(blocks // (shape.pairs * cluster), fed)), cluster, warpgroups, unit)


def search_space(shape: _Shape) -> Iterable[Config]:
    """Every way to split that leaves no warp without work and no more than eight blocks an SM."""
    for unit in (16, 32):
        for warpgroups in (1, 2, 4):
            for cluster in (1, 2, 4, 8):
                for splits in (1, 2, 4, 8, 16, 32):
                    blocks = cluster * splits
                    fed = blocks * 4 * warpgroups * unit <= shape.slots and blocks * shape.pairs <= 8 * SMS
                    if fed or blocks == 1:
                        yield Config(splits, cluster, warpgroups, unit)


def flash_decode(
    q: jax.Array,
    k: Rows,
    v: Rows,
    positions: jax.Array,
    key_positions: jax.Array,
    visibility: Visibility,
    lse: bool,
    ordered: bool,
    config: Config | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """As `pallas_kernels.flash_decode`, for bfloat16 queries and H a multiple of 32 up to 128."""
    heads, width = q.shape[2:]
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"queries of {q.dtype}, not bfloat16")
    int8 = isinstance(k, tuple)
    keys, stored = k[0] if isinstance(k, tuple) else k, ["int8", "float16"] if int8 else ["bfloat16"]
    if any([str(x.dtype) for x in (rows if isinstance(rows, tuple) else (rows,))] != stored for rows in (k, v)):
        raise NotImplementedError("keys and values that are neither bfloat16 nor int8 with float16 scales")
    if width % 32 or width > 128:
        raise NotImplementedError(f"a head width of {width}, not 32, 64, 96 or 128")
    if visibility.nearest < 0:
        raise NotImplementedError("queries that see later positions")
    kv_heads, slots = keys.shape[1:3]

    @jax.custom_batching.custom_vmap
    def run(q: jax.Array, k: Rows, v: Rows, positions: jax.Array, key_positions: jax.Array) -> Any:
        batch, length = positions.shape
        in_order = ordered and not visibility.sinks
        one_row = key_positions.shape[0] == 1
        shape = _Shape(batch, length, heads, kv_heads, slots, width, int8, in_order, one_row, visibility)
        key = f"B={batch} T={length} S={slots} N={heads} K={kv_heads} H={width} {keys.dtype}"
        chosen = config or choose("flash_decode", key, heuristic(shape), lambda: search_space(shape))
        (k, *key_scales), (v, *value_scales) = (x if isinstance(x, tuple) else (x,) for x in (k, v))
        operands = [q, k, v, positions, *([] if in_order else [key_positions]), *key_scales, *value_scales]
        out, sums, *_ = _launch(shape, chosen, operands)
        return (out, sums) if lse else out

    @run.def_vmap
    def fold(size: int, batched: Any, *operands: Any) -> tuple[Any, Any]:
        """A batch of batches is a batch."""

        def rows(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        *others, key_positions = operands
        *others_batched, positions_batched = batched
        if positions_batched or key_positions.shape[0] != 1:
            batch = others[0].shape[1 if others_batched[0] else 0]
            key_positions = jnp.broadcast_to(key_positions, (*key_positions.shape[:-2], batch, slots))
            key_positions = rows(key_positions, positions_batched)
        result = run(*jax.tree.map(rows, others, others_batched), key_positions)
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), result), jax.tree.map(lambda _: True, result)

    return run(q, k, v, positions, key_positions)


def _buffers(shape: _Shape, config: Config) -> tuple[list[jax.ShapeDtypeStruct], list[int]]:
    """The kernel's results, of which the first two are the op's, and its pieces of shared memory in bytes."""
    columns = TILE * shape.tiles
    queries = (shape.batch, shape.queries, shape.heads)
    results = [((*queries, shape.width), jnp.bfloat16), (queries, jnp.float32)]
    if config.splits > 1:
        results += [((shape.pairs, config.splits, columns, n), jnp.float32) for n in (shape.width, 2)]
    sources = 4 * config.warpgroups + (config.cluster if config.cluster > 1 else 0)
    shared = [sources * columns * 4 * _stride(shape.width), sources * columns * 8 + 16, 8]
    return [jax.ShapeDtypeStruct(*result) for result in results], shared


def _launch(shape: _Shape, config: Config, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Run the kernel: q, keys, values, positions, key positions unless in order, and scales of keys and values."""

    def flash_decode_kernel(*refs: Any) -> None:
        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        inline(partial(_emit, shape, config, len(operands)))(*refs)

    results, shared = _buffers(shape, config)
    return plgpu.kernel(
        flash_decode_kernel,
        out_type=results,
        scratch_types=[plgpu.SMEM((size // 4,), jnp.int32) for size in shared],
        grid=(shape.pairs * config.splits,),
        grid_names=("pair",),
        cluster=(config.cluster,),
        cluster_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*operands)


@dataclass(frozen=True)
class _Thread:
    """Where in the work a thread stands. `quad` and `member` are its places in the fragments: 8 quads of 4 members."""

    shape: _Shape
    row: Scalar
    kv_head: Scalar
    first_column: Scalar
    quad: Scalar
    member: Scalar

    def column(self, tile: int) -> tuple[Scalar, Scalar]:
        """The query of this quad in a tile of 8, and whether there is one."""
        column = self.first_column + self.quad + TILE * tile
        return th.minimum(column, self.shape.columns - 1), column < self.shape.columns

    def query(self, column: Scalar) -> tuple[Scalar, Scalar]:
        """A column's index among all [B, T], and among all [B, T, N]."""
        group = self.shape.heads // self.shape.kv_heads
        token = self.row * self.shape.queries + column // group
        return token, token * self.shape.heads + self.kv_head * group + column % group


def _emit(shape: _Shape, config: Config, inputs: int, ctx: LaunchContext, *refs: ir.Value) -> None:
    """The kernel's body, as each thread runs it."""
    q, k, v, positions, *more = map(th.global_address, refs[:inputs])
    outputs, smem = map(th.global_address, refs[inputs:-3]), map(th.shared_address, refs[-3:])
    key_positions = None if shape.ordered else more.pop(0)
    warps = 4 * config.warpgroups
    index = th.thread_index()
    rank, cluster = th.block_index() % config.cluster, th.block_index() // config.cluster
    split, pair = cluster % config.splits, cluster // config.splits
    thread = _Thread(
        shape,
        row=pair // (shape.groups * shape.kv_heads),
        kv_head=pair // shape.groups % shape.kv_heads,
        first_column=pair % shape.groups * (TILE * shape.tiles),
        quad=index % 32 // 4,
        member=index % 4,
    )
    begin, units = _units(thread, positions, config.unit)
    together = warps * config.cluster
    active = th.constant(1)
    if config.splits > 1:
        active = _clamp((units + (UNITS * together - 1)) // (UNITS * together), 1, config.splits)
    with th.when(split < active):
        shared = _Shared(thread, config, *smem)
        shared.start()
        warp = (index // 32 * active + split) * config.cluster + rank  # few keys are spread over all multiprocessors
        source = _Source(thread, config.unit, k, v, key_positions, more)
        queries = _Queries(thread, q, positions)
        tops, totals, sums = _attend(source, queries, begin, units, warp, active * together)
        shared.put_warp(index // 32, tops, totals, sums)
        th.synchronize(1, 32 * warps)
        if config.cluster > 1:
            shared.put_block(rank)
        with th.when(rank.equals(0)):
            if config.cluster > 1:
                shared.wait_for_blocks()
            out = _Output(thread, next(outputs), next(outputs))
            if config.splits == 1:
                shared.for_items(lambda item: out.put(item, *shared.block(item)))
            else:
                counter = _counters(ctx, shape.pairs) + pair.wide() * 4
                _across_clusters(shared, out, next(outputs), next(outputs), counter, pair, split, active)


def _units(thread: _Thread, positions: Scalar, unit: int) -> tuple[Scalar, Scalar]:
    """The first unit of keys that some query may see, and how many there are from there."""
    shape = thread.shape
    if not shape.ordered:
        return th.constant(0), th.constant(pl.cdiv(shape.slots, unit))
    start = positions + (thread.row * (4 * shape.queries)).wide()
    seen = [th.load_global(start, offset=4 * t)[0] for t in range(shape.queries)]
    last = _clamp(_fold(arith.maxsi, seen) - (shape.visibility.nearest - 1), 0, shape.slots)
    begin = th.constant(0)
    if shape.visibility.window is not None:
        begin = _clamp(_fold(arith.minsi, seen) - (shape.visibility.window - 1), 0, shape.slots) // unit
    return begin, _clamp((last + (unit - 1)) // unit - begin, 0, shape.slots)


class _Queries:
    """A warp's queries as the scores' first operand, and which keys they see."""

    def __init__(self, thread: _Thread, q: Scalar, positions: Scalar) -> None:
        shape = self.shape = thread.shape
        self.words: list[list[Scalar]] = []  # of a tile: the quad's query, in the order of the keys' words
        self.last: list[Scalar] = []  # position that is seen
        self.first: list[Scalar] = []  # within the window
        for tile in range(shape.tiles):
            column, exists = thread.column(tile)
            token, query = thread.query(column)
            position = th.load_global(positions + token.wide() * 4)[0]
            position = th.select(exists, position, -1)
            self.last.append(position - shape.visibility.nearest)
            self.first.append(position - (shape.visibility.window or 0))
            start = q + query.wide() * (2 * shape.width)
            words: list[Scalar] = []
            for piece, dims in _key_pieces(shape):
                own = start + (thread.member * (2 * dims)).wide()
                for part in range(0, dims, 8):
                    words += th.load_global(own, 4, offset=2 * (piece + part))
            self.words.append(words)

    def operand(self, step: int) -> list[Scalar]:
        """The fragment [16, 16] of 16 of H."""
        low, high = (
            [words[2 * step + i] for words in self.words] + [th.constant(0)] * (2 - len(self.words)) for i in range(2)
        )
        return [*low, *high]

    def sees(self, tile: int, position: Scalar) -> Scalar:
        """Whether the quad's query sees a key at a position, which is not negative."""
        visibility = self.shape.visibility
        seen = _less(position, self.last[tile] + 1)
        if visibility.window is not None:
            near = _less(self.first[tile], position)
            seen &= near | _less(position, visibility.sinks) if visibility.sinks else near
        return seen


def _key_pieces(shape: _Shape) -> list[tuple[int, int]]:
    """How 4 threads divide a key, 16 bytes at most at a time: first element of each piece, and each thread's count."""
    most = 16 if shape.int8 else 8
    return [(start, min(most, (shape.width - start) // 4)) for start in range(0, shape.width, 4 * most)]


def _value_pieces(shape: _Shape) -> list[tuple[int, int]]:
    """How 8 threads divide a value."""
    return [(start, min(8, (shape.width - start) // 8)) for start in range(0, shape.width, 64)]


class _Source:
    """Keys and values as a warp reads them, `unit` at a time.

    In the keys' fragments a quad has one key of each tile of 8; in the scores' a member has two of each tile, whose
    values it reads.
    """

    def __init__(
        self, thread: _Thread, unit: int, k: Scalar, v: Scalar, key_positions: Scalar | None, scales: Sequence[Scalar]
    ) -> None:
        shape = self.shape = thread.shape
        self.unit, self.thread = unit, thread
        self.ragged = shape.slots % unit != 0
        self.size = 1 if shape.int8 else 2
        head = (thread.row * shape.kv_heads + thread.kv_head).wide() * shape.slots
        self.k, self.v = (base + head * (self.size * shape.width) for base in (k, v))
        self.scales = [base + head * 2 for base in scales]
        self.key_positions = key_positions
        if key_positions is not None and not shape.shared_positions:
            self.key_positions = key_positions + thread.row.wide() * (4 * shape.slots)

    def _at(self, base: Scalar, slot: Scalar, offset: int, stride: int) -> tuple[Scalar, int]:
        """Address and constant offset of what is `stride` bytes a slot; a slot beyond the last is the last."""
        if self.ragged:
            return base + th.minimum(slot + offset, self.shape.slots - 1).wide() * stride, 0
        return base + slot.wide() * stride, offset * stride

    def _row(self, base: Scalar, slot: Scalar, offset: int, pieces: Any, share: Scalar) -> list[Scalar]:
        """A thread's words of a row."""
        start, extra = self._at(base, slot, offset, self.size * self.shape.width)
        words: list[Scalar] = []
        for piece, count in pieces:
            own = start + (share * (self.size * count)).wide()
            words += th.load_constant(own, self.size * count // 4, extra + self.size * piece, ".L1::no_allocate")
        return words

    def keys(self, first: Scalar) -> list[list[Scalar]]:
        """Words of the quad's key of each tile."""
        thread = self.thread
        return [
            self._row(self.k, first + thread.quad, tile, _key_pieces(self.shape), thread.member)
            for tile in range(0, self.unit, TILE)
        ]

    def values(self, first: Scalar) -> list[list[Scalar]]:
        """Words of the values of the member's keys, two a tile."""
        thread = self.thread
        return [
            self._row(self.v, first + thread.member * 2, tile + i, _value_pieces(self.shape), thread.quad)
            for tile in range(0, self.unit, TILE)
            for i in range(2)
        ]

    def key_scales(self, first: Scalar) -> list[Scalar]:
        return self._numbers(self.scales[0], first, 2)

    def value_scales(self, first: Scalar) -> list[Scalar]:
        return self._numbers(self.scales[1], first, 2)

    def positions(self, first: Scalar) -> list[Scalar]:
        """Of the member's keys, two a tile; NO_POSITION where a slot is empty or beyond the last."""
        slots = [first + self.thread.member * 2 + (tile + i) for tile in range(0, self.unit, TILE) for i in range(2)]
        positions = slots
        if self.key_positions is not None:
            loaded = self._numbers(self.key_positions, first, 4)
            positions = [th.select(_less(at, 0), th.constant(NO_POSITION), at) for at in loaded]
        if self.ragged:
            exist = [slot < self.shape.slots for slot in slots]
            positions = [th.select(e, at, NO_POSITION) for e, at in zip(exist, positions, strict=True)]
        return positions

    def _numbers(self, base: Scalar, first: Scalar, size: int) -> list[Scalar]:
        """float16 (as float32) or int32 numbers of the member's keys, two a tile."""
        slot, result = first + self.thread.member * 2, []
        pairs = self.shape.slots % 2 == 0 and not self.ragged
        for tile in range(0, self.unit, TILE):
            for i in range(1 if pairs else 2):
                address, extra = self._at(base, slot, tile + i, size)
                if size == 4:
                    result += th.load_constant(address, 2 if pairs else 1, extra, ".L1::no_allocate")
                elif pairs:
                    result += th.unpack_halves(th.load_constant(address, 1, extra, ".L1::no_allocate")[0])
                else:
                    code = f"{{ .reg .b16 h; ld.global.nc.b16 h, [$1 + {extra}]; cvt.f32.f16 $0, h; }}"
                    result += th.ptx(code, address, results=[th.f32()])
        return result


def _attend(
    source: _Source, queries: _Queries, begin: Scalar, units: Scalar, first: Scalar, step: Scalar
) -> tuple[list[Scalar], list[Scalar], list[list[Scalar]]]:
    """A warp's share of the keys: units first, first + step, … of `units` from `begin`.

    Returns:
      For each tile of queries: the quad's query's top score, the sum of its weights, and the fragments of the tile's
      weighted values, [4] for each 16 of H.
    """
    shape, unit = source.shape, source.unit
    tiles, blocks = range(shape.tiles), shape.width // 16
    scale = math.log2(math.e) / math.sqrt(shape.width)

    def attend(key: Scalar, positions: Sequence[Scalar], carry: Sequence[Scalar]) -> list[Scalar]:
        tops, totals, sums = _split(carry, shape.tiles)
        key_scales = source.key_scales(key) if shape.int8 else None
        value_scales = source.value_scales(key) if shape.int8 else None
        keys, values = source.keys(key), source.values(key)
        scores: list[list[Scalar]] = [[] for _ in tiles]  # two a tile of keys
        for words in keys:
            operand = [pair for word in words for pair in _spread(word)] if shape.int8 else words
            products = [th.constant(0.0, th.f32())] * 4
            for i in range(blocks):
                products = th.mma(queries.operand(i), operand[2 * i : 2 * i + 2], products, "bf16")
            for tile in tiles:
                scores[tile] += products[2 * tile : 2 * tile + 2]
        minus_infinity = th.constant(-math.inf, th.f32())
        new_tops, new_totals, new_sums = [], [], []
        weights: list[list[Scalar]] = []
        for tile in tiles:
            masked = []
            for i, (score, position) in enumerate(zip(scores[tile], positions, strict=True)):
                score = score * (key_scales[i] * scale if key_scales else scale)
                masked.append(th.select(queries.sees(tile, position), score, minus_infinity))
            top = _fold(arith.maxnumf, masked)
            for distance in (1, 2):
                top = th.maximum(top, th.shuffle_xor(top, distance))
            top = th.maximum(top, tops[tile])
            base = _finite(top)
            decay = th.exp2(tops[tile] - base)
            exps = [th.exp2(score - base) for score in masked]
            new_tops.append(top)
            new_totals.append(totals[tile] * decay + _fold(arith.addf, exps))
            if value_scales:
                exps = [e * s for e, s in zip(exps, value_scales, strict=True)]
            weights.append([th.pack_bf16(*exps[i : i + 2]) for i in range(0, len(exps), 2)])
            decays = [_from_quad(decay, source.thread.member * 2 + i) for i in range(2)]
            new_sums.append([s * decays[i % 2] for i, s in enumerate(sums[tile])])
        for i in range(unit // 16):
            operands = _transposed(values[4 * i : 4 * i + 4], shape.int8)
            for tile in tiles:
                for j, operand in enumerate(operands):
                    at = slice(4 * j, 4 * j + 4)
                    new_sums[tile][at] = th.mma(operand, weights[tile][2 * i : 2 * i + 2], new_sums[tile][at], "bf16")
        return [*new_tops, *new_totals, *(s for tile in new_sums for s in tile)]

    zero = th.constant(0.0, th.f32())
    carry = [th.constant(-math.inf, th.f32())] * shape.tiles + [zero] * (shape.tiles * (1 + 4 * blocks))

    def ordered_step(i: Scalar, *carry: Scalar) -> list[Scalar]:
        key = (begin + i) * unit
        return attend(key, source.positions(key), carry)

    def step_unless_hidden(i: Scalar, *carried: Scalar) -> list[Scalar]:
        next_positions = source.positions(th.minimum(i + step, units - 1) * unit)
        positions, carry = carried[: unit // 4], carried[unit // 4 :]
        seen = _fold(arith.ori, [queries.sees(tile, position) for tile in tiles for position in positions])
        once = th.select(_any(seen), th.constant(1), 0)
        return [*next_positions, *th.loop(0, once, 1, carry, lambda _, *carry: attend(i * unit, positions, carry))]

    if shape.ordered:
        carry = th.loop(first, units, step, carry, ordered_step)
    else:
        positions = source.positions(th.minimum(first, units - 1) * unit)
        carry = th.loop(first, units, step, [*positions, *carry], step_unless_hidden)[unit // 4 :]
    tops, totals, sums = _split(carry, shape.tiles)
    for distance in (1, 2):
        totals = [total + th.shuffle_xor(total, distance) for total in totals]
    return tops, totals, sums


def _split(carry: Sequence[Scalar], tiles: int) -> tuple[list[Scalar], list[Scalar], list[list[Scalar]]]:
    """Tops, totals and sums of each tile."""
    tops, totals, sums = list(carry[:tiles]), list(carry[tiles : 2 * tiles]), list(carry[2 * tiles :])
    size = len(sums) // tiles
    return tops, totals, [sums[i * size : (i + 1) * size] for i in range(tiles)]


class _Shared:
    """Sums of warps and blocks in shared memory: tops and totals, and weighted values, of each query.

    An item is four of H of a query's values; the block's threads go through all items together.
    """

    def __init__(self, thread: _Thread, config: Config, sums: Scalar, tops: Scalar, barrier: Scalar) -> None:
        shape = thread.shape
        self.thread, self.config, self.sums, self.tops, self.barrier = thread, config, sums, tops, barrier
        self.columns, self.stride = TILE * shape.tiles, 4 * _stride(shape.width)
        self.warps = 4 * config.warpgroups
        self.fours = shape.width // 4
        self.items = min(self.columns, shape.columns) * self.fours

    def start(self) -> None:
        """Make the barrier that counts the bytes which the cluster's blocks send to the first."""
        if self.config.cluster > 1:
            with th.when(th.thread_index().equals(0)):
                th.init_barrier(self.barrier, 1)
                sent = self.config.cluster * (self.items * 16 + self.items // self.fours * 8)
                th.ptx("fence.mbarrier_init.release.cluster;")
                th.arrive_expecting(self.barrier, th.constant(sent))
            th.arrive_in_cluster("relaxed")

    def put_warp(
        self, warp: Scalar, tops: Sequence[Scalar], totals: Sequence[Scalar], sums: Sequence[Sequence[Scalar]]
    ) -> None:
        thread = self.thread
        for tile in range(thread.shape.tiles):
            column = warp * self.columns + TILE * tile
            with th.when(thread.member.equals(0)):
                th.store_shared(self.tops + (column + thread.quad) * 8, tops[tile], totals[tile])
            for i in range(2):
                row = self.sums + (column + (thread.member * 2 + i)) * self.stride
                block = 0
                for start, count in _value_pieces(thread.shape):
                    for part in range(0, count, 4):
                        at = [4 * (block + j) + 2 * half + i for j in range(2) for half in range(2)]
                        four = [sums[tile][x] for x in at]
                        th.store_shared(row + thread.quad * (4 * count), *four, offset=4 * (start + part))
                        block += 2

    def put_block(self, rank: Scalar) -> None:
        """The block's sums to the cluster's first block."""

        def put(item: Scalar) -> None:
            column, four = item // self.fours, item % self.fours
            top, total, values = self._from(0, self.warps, column, four)
            place = (rank + self.warps) * self.columns + column
            with th.when(four.equals(0)):
                _send(self.tops + place * 8, self.barrier, top, total)
            _send(self.sums + place * self.stride + four * 16, self.barrier, *values)

        th.wait_for_cluster()  # since `start`: the first block's barrier is there
        self.for_items(put)

    def wait_for_blocks(self) -> None:
        th.wait(self.barrier, th.constant(0))

    def block(self, item: Scalar) -> tuple[Scalar, Scalar, list[Scalar]]:
        """The cluster's top and total of an item's query, and the item's sums."""
        single = self.config.cluster == 1
        start, count = (0, self.warps) if single else (self.warps, self.config.cluster)
        return self._from(start, count, item // self.fours, item % self.fours)

    def for_items(self, body: Callable[[Scalar], None]) -> None:
        for start in range(0, self.items, 32 * self.warps):
            item = th.thread_index() + start
            with th.when(item < self.items):
                body(item)

    def _from(self, start: int, count: int, column: Scalar, four: Scalar) -> tuple[Scalar, Scalar, list[Scalar]]:
        tops, sums = self.tops + column * 8, self.sums + column * self.stride + four * 16
        places = [(start + i) * self.columns for i in range(count)]
        parts = [
            [x.float() for x in (*th.load_shared(tops, 2, 8 * p), *th.load_shared(sums, 4, self.stride * p))]
            for p in places
        ]
        return _together(parts)


@dataclass(frozen=True)
class _Output:
    """Results in global memory."""

    thread: _Thread
    out: Scalar
    sums: Scalar

    def put(self, item: Scalar, top: Scalar, total: Scalar, values: Sequence[Scalar]) -> None:
        shape = self.thread.shape
        column, four = self.thread.first_column + item // (shape.width // 4), item % (shape.width // 4)
        with th.when(column < shape.columns):
            _, query = self.thread.query(column)
            one, zero = th.constant(1.0, th.f32()), th.constant(0.0, th.f32())
            inverse = th.select(total.equals(0), zero, one / total)
            values = [x * inverse for x in values]
            at = self.out + query.wide() * (2 * shape.width) + (four * 8).wide()
            th.store_global(at, th.pack_bf16(*values[:2]), th.pack_bf16(*values[2:]))
            with th.when(four.equals(0)):
                th.store_global(self.sums + query.wide() * 4, (top + th.log2(total)) * math.log(2))


def _across_clusters(
    shared: _Shared, out: _Output, sums: Scalar, tops: Scalar, counter: Scalar, pair: Scalar, split: Scalar,
    active: Scalar,
) -> None:  # fmt: skip
    """A pair's clusters, whose first blocks are here, leave their sums in memory; the last one adds all up."""
    config, width, threads = shared.config, shared.thread.shape.width, 32 * shared.warps
    first = pair * config.splits
    shared_flag = shared.tops + 8 * (shared.warps + (config.cluster if config.cluster > 1 else 0)) * shared.columns

    def address(base: Scalar, split: Scalar, item: Scalar, numbers: int) -> Scalar:
        return base + ((first + split) * shared.columns + item // shared.fours).wide() * (4 * numbers)

    def leave(item: Scalar) -> None:
        top, total, values = shared.block(item)
        four = item % shared.fours
        with th.when(four.equals(0)):
            th.store_global(address(tops, split, item, 2), top, total)
        th.store_global(address(sums, split, item, width) + (four * 16).wide(), *values)

    def gather(item: Scalar) -> None:
        offset = (item % shared.fours * 16).wide()

        def more(start: Scalar, *carry: Scalar) -> list[Scalar]:
            parts = [list(carry)]
            for i in range(TILE):
                other = th.minimum(start + i, active - 1)
                top, total = th.load_global(address(tops, other, item, 2), 2, how=".relaxed.gpu")
                values = th.load_global(address(sums, other, item, width) + offset, 4, how=".relaxed.gpu")
                top = th.select(start + i < active, top.float(), -math.inf)
                parts.append([top, total.float(), *(x.float() for x in values)])
            top, total, values = _together(parts)
            return [top, total, *values]

        carry = [th.constant(-math.inf, th.f32())] + [th.constant(0.0, th.f32())] * 5
        top, total, *values = th.loop(0, active, TILE, carry, more)
        out.put(item, top, total, values)

    with th.when(active.equals(1)):
        shared.for_items(lambda item: out.put(item, *shared.block(item)))
    with th.when(active.differs(1)):
        shared.for_items(leave)
        th.ptx("fence.acq_rel.gpu;")
        th.synchronize(1, threads)
        with th.when(th.thread_index().equals(0)):
            arrived = th.ptx("atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", counter, results=[th.i32()])[0]
            th.store_shared(shared_flag, arrived)
        th.synchronize(1, threads)
        with th.when(th.load_shared(shared_flag)[0].equals(active - 1)):
            th.ptx("fence.acq_rel.gpu;")
            shared.for_items(gather)
            with th.when(th.thread_index().equals(0)):
                th.store_global(counter, th.constant(0))


def _counters(ctx: LaunchContext, count: int) -> Scalar:
    """int32 [count] in global memory that is zero whenever a kernel starts: who uses a counter resets it."""
    name, kind = "flash_decode_arrived", ir.Type.parse(f"!llvm.array<{count} x i32>")
    with ir.InsertionPoint(ctx.module.body):
        zeros: Any = np.zeros(count, np.int32)
        llvm.GlobalOp(
            kind, name, ir.Attribute.parse("#llvm.linkage<internal>"), value=ir.DenseElementsAttr.get(zeros),
            addr_space=ir.IntegerAttr.get(th.i32(), 1),
        )  # fmt: skip
    pointer = llvm.mlir_addressof(ir.Type.parse("!llvm.ptr<1>"), ir.FlatSymbolRefAttr.get(name))
    return Scalar(llvm.ptrtoint(th.i64(), pointer))


def _together(parts: Sequence[Sequence[Scalar]]) -> tuple[Scalar, Scalar, list[Scalar]]:
    """Top, total and sums over parts of keys, each (top, total, sums…), in this order."""
    top = _fold(arith.maxnumf, [part[0] for part in parts])
    base = _finite(top)
    factors = [th.exp2(part[0] - base) for part in parts]
    total, *values = [
        _fold(arith.addf, [factor * number for factor, number in zip(factors, numbers, strict=True)])
        for numbers in zip(*(part[1:] for part in parts), strict=True)
    ]
    return top, total, values


def _stride(width: int) -> int:
    """float32s from one query's sums in shared memory to the next's, so that threads hit different banks."""
    return width + 4


def _fold(op: Callable[[ir.Value, ir.Value], Any], xs: Sequence[Scalar]) -> Scalar:
    """All of `xs` under an operation, by halves."""
    while len(xs) > 1:
        pairs = [Scalar(op(a.value, b.value)) for a, b in zip(xs[::2], xs[1::2], strict=False)]
        xs = [*pairs, *xs[len(xs) // 2 * 2 :]]
    return xs[0]


def _less(a: Scalar, b: Scalar | int) -> Scalar:
    """a < b of signed integers."""
    return Scalar(arith.cmpi(arith.CmpIPredicate.slt, a.value, a.like(b).value))


def _clamp(x: Scalar, low: int, high: int) -> Scalar:
    """A signed integer, no less than low and no more than high."""
    return Scalar(arith.minsi(arith.maxsi(x.value, x.like(low).value), x.like(high).value))


def _finite(top: Scalar) -> Scalar:
    """A top score to subtract: 0 where there is none."""
    return th.select(top.equals(th.constant(-math.inf, th.f32())), th.constant(0.0, th.f32()), top)


def _any(condition: Scalar) -> Scalar:
    """Whether it holds in some thread of the warp."""
    code = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.u32 $0, 1, 0, p; }"
    return th.ptx(code, th.select(condition, th.constant(1), 0), results=[th.i32()], convergent=True)[0].differs(0)


def _from_quad(x: Scalar, quad: Scalar) -> Scalar:
    """A float32 of the first member of a quad."""
    code = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return th.ptx(code, x.bits(), quad * 4, results=[th.i32()], convergent=True)[0].float()


def _send(address: Scalar, barrier: Scalar, *words: Scalar) -> None:
    """Words to this place in the shared memory of the cluster's first block, whose barrier counts their bytes."""
    there = [th.address_in_cluster(x, 0) for x in (address, barrier)]
    names = ", ".join(f"${i + 2}" for i in range(len(words)))
    code = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v{len(words)}.b32 [$0], {{{names}}}, [$1];"
    th.ptx(code, *there, *(word.bits() for word in words))


def _transposed(rows: Sequence[Sequence[Scalar]], int8: bool) -> list[list[Scalar]]:
    """A thread's words of the values of four keys as operands [16 of H, 16 keys], as many as the words give."""
    operands = []
    for words in zip(*rows, strict=True):
        pairs = (words[0], words[1]), (words[2], words[3])
        if int8:
            for byte in (0, 2):
                selectors = [0x0400 + 0x0101 * (byte + i) for i in range(2)]
                operands.append([th.int8_as_bf16(th.permute_bytes(*pair, s)) for pair in pairs for s in selectors])
        else:
            operands.append([th.permute_bytes(*pair, s) for pair in pairs for s in (0x5410, 0x7632)])
    return operands


def _spread(word: Scalar) -> list[Scalar]:
    """Four int8 of a word as two words of two bfloat16 each."""
    return [th.int8_as_bf16(th.permute_bytes(word, word, selector)) for selector in (0x1100, 0x3322)]
