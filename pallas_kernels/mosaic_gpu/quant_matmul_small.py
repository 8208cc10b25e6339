"""Products of up to some hundred rows with block-quantised weights, for Hopper.

All that a CTA needs, `rows` rows of x and its share of the weights, is asked for when it starts, and waits in shared
memory. Its share is `units` units for each of its groups of warps, of `tiles` tiles of 16 rows of weights each. The
`split` warps of a group share the sum over the input, as do the CTAs of a cluster, of which each has a part of the
columns; partial sums are added through shared memory, a cluster's through distributed shared memory, always in the same
order.

Products are computed on the tensor cores, m16n8k16: a tile of weights, which is two times 8 neighbouring rows, is the
16-row operand, 8 rows of x the narrow one. Of int8 v, bfloat16 bit patterns are made by two logical operations and a
subtraction a pair: 128 + (v & 127) less 128, or 256 where v is negative. That is exact, and so are the products; the
scale multiplies the float32 sum of a block.

Loops stay loops: unrolled, with x in registers, it was as fast and had four times the code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import processors, products
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.products import EIGHT, Pair, Product, Work
from pallas_kernels.mosaic_gpu.threads import Scalar
from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.tuning import choose

SHARED_BYTES = 231_000  # of a CTA


@dataclass(frozen=True)
class Config:
    """How the work is laid out; see the module's docstring.

    Attributes:
      rows: of x that a CTA takes, a multiple of 8.
      warps: of a CTA, a multiple of 4.
      split: warps of a group; divides `warps`.
      tiles: of 16 rows of weights, in a unit.
      units: that each group of a CTA does.
      cluster: CTAs that share the columns; divides the blocks of a row.
    """

    rows: int
    warps: int
    split: int
    tiles: int
    units: int
    cluster: int = 1


@dataclass(frozen=True)
class Plan:
    """Static numbers of a kernel for x [m, width] times weights [16 count, width]."""

    m: int
    width: int
    count: int
    config: Config

    @property
    def blocks(self) -> int:
        return self.width // BLOCK

    @property
    def own_blocks(self) -> int:
        """Blocks of a row that a CTA sees to."""
        return self.blocks // self.config.cluster

    @property
    def parts(self) -> int:
        """Groups of 8 rows of x."""
        return self.config.rows // 8

    @property
    def row_groups(self) -> int:
        return -(-self.m // self.config.rows)

    @property
    def items(self) -> int:
        """Of a unit's results, what a warp finishes at once: those of a tile and 8 rows of x."""
        return self.config.tiles * self.parts

    @property
    def groups(self) -> int:
        return self.config.warps // self.config.split

    @property
    def ctas(self) -> int:
        """CTAs or clusters for a group of rows of x."""
        return -(-self.count // (self.config.units * self.groups * self.config.tiles))

    # Shared memory, in bytes. Rows are padded so that the lanes of a warp hit different banks.

    @property
    def x_stride(self) -> int:
        return -(-self.own_blocks * 2 * BLOCK // 128) * 128 + 64

    @property
    def values_stride(self) -> int:
        return -(-self.own_blocks * BLOCK // 128) * 128 + 32

    @property
    def tile_bytes(self) -> int:
        """A tile's values and, of whole rows, scales."""
        return 2 * EIGHT * self.values_stride + 4 * EIGHT * self.blocks

    @property
    def x_bytes(self) -> int:
        return self.config.rows * self.x_stride

    @property
    def unit_bytes(self) -> int:
        """Of the weights of all groups' units of a turn."""
        return self.groups * self.config.tiles * self.tile_bytes

    @property
    def sums_bytes(self) -> int:
        """Of all warps' partial sums for a unit."""
        return self.items * self.config.warps * 512

    @property
    def gathered(self) -> int:
        """A unit's items that a CTA finishes for its cluster."""
        return -(-self.items // self.config.cluster)

    @property
    def gathered_bytes(self) -> int:
        config = self.config
        if config.cluster == 1:
            return 0
        return config.units * self.groups * self.gathered * config.cluster * 512

    @property
    def buffers(self) -> int:
        """Of partial sums: two where there is room, so that a unit need not wait for the end of the one before."""
        once = self.config.units == 1 or self._bytes_with(2) > SHARED_BYTES
        return 1 if once else 2

    @property
    def shared_bytes(self) -> int:
        return self._bytes_with(self.buffers)

    def _bytes_with(self, buffers: int) -> int:
        weights = self.config.units * self.unit_bytes
        return self.x_bytes + weights + buffers * self.sums_bytes + self.gathered_bytes + 8 * (1 + self.config.units)

    def valid(self) -> bool:
        """Whether a thread's registers and a CTA's shared memory suffice, and the work can be cut up so."""
        config = self.config
        limit = min(255, 65536 // (32 * config.warps))
        return (
            config.warps % 4 == 0 and config.warps % config.split == 0
            and self.blocks % config.cluster == 0 and config.split <= self.own_blocks
            and 4 * self.items + 4 * self.parts + 60 <= limit and self.shared_bytes <= SHARED_BYTES
        )  # fmt: skip


def heuristic(m: int, out: int, width: int, normed: bool) -> Config:
    """A configuration for m rows of x, to be normalised or not, times weights [out, width].

    The least time by a model fitted to 1000 runs on an H100, nearly all of the shapes of Qwen2.5-0.5B, within 12 %.

    Raises:
      NotImplementedError: if there is none.
    """

    def microseconds(config: Config) -> float:
        plan = Plan(m, width, out // (2 * EIGHT), config)
        ctas = plan.ctas * plan.row_groups * config.cluster
        # A cluster of four or eight lies within one of the card's groups of some 16 SMs: not all of them find room.
        room = processors() if config.cluster <= 2 else processors() * 9 // 10
        threads, registers = 32 * config.warps, max(40, min(255, 4 * plan.items + 4 * plan.parts + 50))
        together = max(1, min((SHARED_BYTES + 1024) // (plan.shared_bytes + 1024), 65536 // (threads * registers)))
        rounds = -(-ctas // (room * together))
        busy = max(rounds, -(-ctas // processors()))
        blocks = -(-plan.own_blocks // config.split) * config.units  # of a warp
        instructions = blocks * (plan.parts + 6 + config.tiles * (40 + 6 * plan.parts)) * config.warps / 4
        sums = config.units * plan.items * config.warps
        bytes_ = plan.x_bytes + config.units * plan.unit_bytes
        norm = config.rows * plan.own_blocks if normed else 0
        return (
            1.26 + rounds * (0.81 + blocks / 47 + config.units / 11) + 0.85 * (config.cluster > 1)
            + busy * (instructions / 4000 + sums / 111 + bytes_ / 62e3 + norm / 590) + ctas * bytes_ / 14e6
        )  # fmt: skip

    space = list(search_space(m, out, width, normed))
    if not space:
        raise NotImplementedError(f"{m} rows times weights [{out}, {width}]: more than shared memory holds")
    return min(space, key=microseconds)


def search_space(m: int, out: int, width: int, normed: bool) -> Iterable[Config]:
    """Configurations worth measuring, which give most multiprocessors something to do where there is enough."""
    least = -(-m // 8) * 8
    for rows, warps, tiles, cluster, units in itertools.product(
        (8, 16, 32, 64), (4, 8, 16), (1, 2, 3, 4, 5, 6), (1,) if normed else (1, 2, 4, 8), (1, 2, 3, 4, 5, 6)
    ):
        if rows > least or -(-least // rows) > 4:
            continue
        for split in (warps, warps // 2, warps // 4):
            config = Config(rows, warps, split, tiles, units, cluster)
            plan = Plan(m, width, out // (2 * EIGHT), config)
            ctas = plan.ctas * plan.row_groups * cluster
            if plan.valid() and ctas <= 4 * processors() and (units == 1 or ctas >= processors() // 3):
                yield config


def run(product: Product, config: Config | None = None) -> Sequence[jax.Array]:
    """Run a product; `config` is for measurements.

    Raises:
      NotImplementedError: for other dtypes and sizes, or what shared memory cannot hold.
    """
    operands, (m, width), out = product.operands(), product.x.shape, product.values.shape[0]
    if m == 0 or out % (2 * EIGHT) or width % BLOCK:
        raise NotImplementedError(f"{m} rows and weights {product.values.shape}")
    if config is None:
        settings = m, out, width, product.norm is not None
        key = f"M={-(-m // 8) * 8} out={out} in={width}"
        space = functools.partial(search_space, *settings)
        config = choose(f"{product.op}_small", key, heuristic(*settings), space)
    plan = Plan(m, width, out // (2 * EIGHT), config)
    if not plan.valid() or (product.norm is not None and config.cluster > 1):
        raise NotImplementedError(f"{m} rows and weights {product.values.shape} with {config}")
    results = product.results()
    kernel = _Kernel(plan, product.work, [*operands, *results], product.norm[1] if product.norm else None)
    return products.launch(
        product.name, kernel.emit, list(operands.values()), list(results.values()),
        plan.ctas * plan.row_groups * config.cluster, config.warps, plan.shared_bytes, config.cluster,
    )  # fmt: skip


class _Kernel:
    """Emits the kernel's code, as each thread runs it."""

    def __init__(self, plan: Plan, work: Work, names: Sequence[str], eps: float | None) -> None:
        self.plan, self.config, self.work, self.names, self.eps = plan, plan.config, work, names, eps

    def emit(self, *refs: Any) -> None:
        """All of the kernel. `refs`: the arrays that `names` says, and shared memory."""
        plan, config = self.plan, self.config
        threads = 32 * config.warps
        self.pointers = {name: t.global_address(ref) for name, ref in zip(self.names, refs, strict=False)}
        self.x = t.kept(t.shared_address(refs[-1]))
        self.weights = self.x + plan.x_bytes
        self.sums = self.weights + config.units * plan.unit_bytes
        self.gathered = self.sums + plan.buffers * plan.sums_bytes
        self.arrived = self.gathered + plan.gathered_bytes
        thread, block = t.kept(t.thread_index()), t.block_index()
        self.lane, self.warp = thread & 31, thread >> 5
        self.row, self.quarter = self.lane >> 2, self.lane & 3  # of a tile or of 8 rows of x; of a block
        self.member, self.group = self.warp % config.split, self.warp // config.split
        self.rank, block = block % config.cluster, block // config.cluster
        self.first_row, self.cta = block % plan.row_groups * config.rows, block // plan.row_groups
        with t.when(thread.equals(0)):
            for i in range(1 + config.units):
                t.init_barrier(self.arrived + 8 * i, threads)
        t.synchronize(1, threads)
        if config.cluster > 1:
            t.arrive_in_cluster("relaxed")
        factors = self._ask_for_norm()
        self._ask_for_rows()
        t.loop(0, t.kept(t.constant(config.units)), 1, [], self._ask_for_weights)
        t.wait(self.arrived, t.constant(0))
        if self.eps is not None:
            self._normalise(factors)
            t.synchronize(1, threads)
        if config.cluster > 1:  # so that all of the cluster's CTAs have started
            t.wait_for_cluster()
        t.loop(0, t.kept(t.constant(config.units)), 1, [], self._unit)
        if config.cluster > 1:
            self._finish_cluster()

    def _rows(self, tile: Scalar) -> tuple[Scalar, Scalar]:
        """The first of each 8 rows of a tile: joined ones, or neighbours."""
        work = self.work
        found = work.rows(tile) if work.joined == 2 else [*work.rows(tile * 2), *work.rows(tile * 2 + 1)]
        return found[0], found[1]

    def _tile(self, unit: Scalar, index: Scalar) -> tuple[Scalar, Scalar]:
        """A tile, counted through the units of all groups in a turn, and whether it exists; the last one if not."""
        plan, config = self.plan, self.config
        tile = (self.cta * config.units + unit) * (plan.groups * config.tiles) + index
        return t.minimum(tile, plan.count - 1), tile < plan.count

    # What a CTA needs.

    def _copy(self, target: Scalar, source: Scalar, bytes_: int) -> None:
        """Start copying a row to shared memory, a warp together."""
        for start in range(0, bytes_, 512):
            at = self.lane * 16 + start
            with t.when(at < bytes_):
                t.start_copy(target + at, source + at.wide())

    def _vectors(self) -> list[Scalar]:
        """The lane's pieces of a row, of 8 elements; the last one again in place of those that do not exist."""
        count = self.plan.width // 8
        return [t.minimum(self.lane + first, count - 1) for first in range(0, count, 32)]

    def _ask_for_norm(self) -> list[list[Scalar]]:
        """The lane's pieces of the norm's scale. Before all weights are asked for: it would wait for them."""
        if self.eps is None:
            return []
        places = [self.pointers["norm"] + (vector * 32).wide() for vector in self._vectors()]
        return [[word.float() for offset in (0, 16) for word in t.load_constant(p, 4, offset)] for p in places]

    def _ask_for_rows(self) -> None:
        plan, config = self.plan, self.config
        bytes_ = 2 * BLOCK * plan.own_blocks

        def row(row: Scalar) -> Sequence[Scalar]:
            source = t.minimum(self.first_row + row, plan.m - 1) * (2 * plan.width) + self.rank * bytes_
            self._copy(self.x + row * plan.x_stride, self.pointers["x"] + source.wide(), bytes_)
            return ()

        t.loop(self.warp, config.rows, config.warps, [], row)
        t.arrive_after_copies(self.arrived)

    def _ask_for_weights(self, unit: Scalar) -> Sequence[Scalar]:
        plan, config = self.plan, self.config
        bytes_ = BLOCK * plan.own_blocks
        target = self.weights + unit * plan.unit_bytes

        def first_row(eight: Scalar) -> Scalar:
            return t.select((eight & 1).equals(0), *self._rows(self._tile(unit, eight >> 1)[0]))

        def row(index: Scalar) -> Sequence[Scalar]:
            eight, row = index // EIGHT, index % EIGHT
            source = (first_row(eight) + row) * plan.width + self.rank * bytes_
            place = target + (eight >> 1) * plan.tile_bytes + (index & 15) * plan.values_stride
            self._copy(place, self.pointers["values"] + source.wide(), bytes_)
            return ()

        def scales(eight: Scalar) -> Sequence[Scalar]:
            size = 2 * EIGHT * plan.blocks
            place = target + (eight >> 1) * plan.tile_bytes + 2 * EIGHT * plan.values_stride + (eight & 1) * size
            self._copy(place, self.pointers["scales"] + (first_row(eight) * (2 * plan.blocks)).wide(), size)
            return ()

        eights = 2 * plan.groups * config.tiles
        t.loop(self.warp, eights * EIGHT, config.warps, [], row)
        t.loop(self.warp, eights, config.warps, [], scales)
        t.arrive_after_copies(self.arrived + (unit + 1) * 8)
        return ()

    def _normalise(self, factors: Sequence[Sequence[Scalar]]) -> None:
        """x / sqrt(mean(x^2) + eps) times the norm's scale, in its place; a warp does whole rows, two at a time."""
        plan, config = self.plan, self.config
        together = 2 if config.rows % (2 * config.warps) == 0 else 1
        exist = [(self.lane + first) < plan.width // 8 for first in range(0, plan.width // 8, 32)]

        def rows(first: Scalar) -> Sequence[Scalar]:
            places = [
                [self.x + (first + config.warps * i) * plan.x_stride + vector * 16 for vector in self._vectors()]
                for i in range(together)
            ]
            held = [[[h for w in t.load_shared(p, 4) for h in t.unpack_bf16(w)] for p in row] for row in places]
            for row, values in zip(places, held, strict=True):
                squares = [
                    functools.reduce(lambda s, v: t.fma(v, v, s), eight, t.constant(0.0, t.f32())) for eight in values
                ]
                total = t.total([t.select(e, s, 0.0) for e, s in zip(exist, squares, strict=True)])
                for distance in (16, 8, 4, 2, 1):
                    total = total + t.shuffle_xor(total, distance)
                root = t.rsqrt(total * (1 / plan.width) + (self.eps or 0.0))
                for place, eight, scale, exists in zip(row, values, factors, exist, strict=True):
                    scaled = [v * root * f for v, f in zip(eight, scale, strict=True)]
                    with t.when(exists):
                        t.store_shared(place, *(t.pack_bf16(*scaled[j : j + 2]) for j in range(0, 8, 2)))
            return ()

        t.loop(self.warp, config.rows, config.warps * together, [], rows)

    # A unit of work.

    def _unit(self, unit: Scalar) -> Sequence[Scalar]:
        plan, config = self.plan, self.config
        threads = 32 * config.warps
        # Another warp begins in each unit, so that they can end beside each other; some items are beyond the last.
        items = [(self.member + unit) % config.split + i for i in range(0, plan.items, config.split)]
        finishes = [] if config.cluster > 1 else [self._begin(unit, self.group, item) for item in items]
        t.wait(self.arrived + (unit + 1) * 8, t.constant(0))
        sums = self._multiply(unit)
        base = self.sums
        if plan.buffers == 2:
            base = base + (unit & 1) * plan.sums_bytes
        elif config.units > 1:
            t.synchronize(1, threads)  # what the unit before left has been collected
        mine = base + (self.warp * 512 + self.lane * 8)
        for i in range(0, len(sums), 2):
            offset = 512 * config.warps * (i // 4) + 256 * (i // 2 % 2)
            t.store_shared(mine, sums[i], sums[i + 1], offset=offset)
        t.synchronize(1, threads)
        for i, item in enumerate(items):
            pairs = self._collect(base, item)
            if config.cluster == 1:
                finishes[i](pairs)
            else:
                with t.when(item < plan.items):
                    self._send(unit * plan.groups + self.group, item, pairs)
        return ()

    def _multiply(self, unit: Scalar) -> list[Scalar]:
        """The warp's share of the unit's products: sums [tile, part, 8 rows of weights, 2 rows of x]."""
        plan, config = self.plan, self.config
        first = self.member * plan.own_blocks // config.split
        last = (self.member + 1) * plan.own_blocks // config.split
        x = self.x + self.row * plan.x_stride + self.quarter * 16 + first * (2 * BLOCK)
        tiles = self.weights + unit * plan.unit_bytes + self.group * (config.tiles * plan.tile_bytes)
        values = tiles + self.row * plan.values_stride + self.quarter * 8 + first * BLOCK
        scales = tiles + self.row * (2 * plan.blocks) + (self.rank * plan.own_blocks + first) * 2
        zero = t.constant(0.0, t.f32())

        def block(_: Scalar, x: Scalar, values: Scalar, scales: Scalar, *sums: Scalar) -> Sequence[Scalar]:
            rows = [t.load_shared(x, 4, offset=EIGHT * plan.x_stride * part) for part in range(plan.parts)]
            new = list(sums)
            for tile in range(config.tiles):
                w, scale = [], []
                for eight in range(2):
                    offset = plan.tile_bytes * tile + EIGHT * plan.values_stride * eight
                    words = t.load_shared(values, 2, offset=offset)
                    w.append(
                        [t.int8_as_bf16(t.permute_bytes(word, word, s)) for word in words for s in (0x1100, 0x3322)]
                    )
                    offset = plan.tile_bytes * tile + 2 * EIGHT * (plan.values_stride + plan.blocks * eight)
                    scale.append(t.load_shared_half(scales, offset))
                upper, lower = w
                for part, row in enumerate(rows):
                    product = t.mma([upper[0], lower[0], upper[1], lower[1]], row[:2], [zero] * 4, "bf16")
                    product = t.mma([upper[2], lower[2], upper[3], lower[3]], row[2:], product, "bf16")
                    for i in range(4):
                        at = (tile * plan.parts + part) * 4 + i
                        new[at] = t.fma(product[i], scale[i // 2], new[at])
            return x + 2 * BLOCK, values + BLOCK, scales + 2, *new

        return t.loop(first, last, 1, [x, values, scales, *[zero] * (4 * plan.items)], block)[3:]

    def _collect(self, base: Scalar, item: Scalar) -> list[Pair]:
        """The group's sums of an item: of this lane's row of x and two columns in each 8 rows of the weights."""
        plan, config = self.plan, self.config
        at = t.minimum(item, plan.items - 1) * config.warps + self.group * config.split
        place = base + at * 512 + self.quarter * 64 + self.row * 4
        return [self._add_up(place + 256 * eight, config.split) for eight in range(2)]

    def _add_up(self, place: Scalar, count: int) -> Pair:
        """The sum of `count` pairs 512 bytes apart, whose halves are 32 bytes apart."""
        first, second = (
            t.total([t.load_shared(place, 1, offset=512 * i + half)[0].float() for i in range(count)])
            for half in (0, 32)
        )
        return first, second

    def _begin(self, unit: Scalar, group: Scalar, item: Scalar) -> Callable[[Sequence[Pair]], None]:
        """Ask for what an item's epilogue needs."""
        plan = self.plan
        tile, exists = self._tile(unit, group * self.config.tiles + t.minimum(item, plan.items - 1) // plan.parts)
        row = self.first_row + item % plan.parts * 8 + self.row
        m, exists = t.minimum(row, plan.m - 1), exists & (row < plan.m) & (item < plan.items)
        tiles = [tile] if self.work.joined == 2 else [tile * 2, tile * 2 + 1]
        finishes = [self.work.epilogue(self.pointers, m, own, self.quarter * 2, None) for own in tiles]

        def finish(pairs: Sequence[Pair]) -> None:
            for i, one in enumerate(finishes):
                one(pairs if len(finishes) == 1 else pairs[i : i + 1], exists)

        return finish

    # A cluster's sums.

    def _send(self, unit: Scalar, item: Scalar, pairs: Sequence[Pair]) -> None:
        """An item's sums to the CTA of the cluster that finishes it; `unit` counts all groups'."""
        plan, cluster = self.plan, self.config.cluster
        place = ((unit * plan.gathered + item // cluster) * cluster + self.rank) * 512
        place = self.gathered + place + self.quarter * 64 + self.row * 4
        there = t.address_in_cluster(place, item % cluster)
        for eight, pair in enumerate(pairs):
            for i, value in enumerate(pair):
                t.ptx(f"st.shared::cluster.b32 [$1 + {256 * eight + 32 * i}], $0;", value.bits(), there)

    def _finish_cluster(self) -> None:
        """Add the cluster's sums of this CTA's items and finish them."""
        plan, config = self.plan, self.config
        t.arrive_in_cluster("release")
        t.wait_for_cluster()

        def item(index: Scalar) -> Sequence[Scalar]:
            unit, item = index // plan.gathered, index % plan.gathered * config.cluster + self.rank
            finish = self._begin(unit // plan.groups, unit % plan.groups, item)
            place = self.gathered + index * (512 * config.cluster) + self.quarter * 64 + self.row * 4
            finish([self._add_up(place + 256 * eight, config.cluster) for eight in range(2)])
            return ()

        t.loop(self.warp, config.units * plan.groups * plan.gathered, config.warps, [], item)
