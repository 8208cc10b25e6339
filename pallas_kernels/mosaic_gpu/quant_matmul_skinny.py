"""Products of up to 8 rows with block-quantised weights, each of whose bytes is read once.

Tiling. A warp multiplies tiles of 8 rows of weights with all rows of x, on m16n8k16 tensor cores: x is the 16-row
operand, 8 rows of weights the narrow one. The sum over the input is split between the `split` warps of a group in
chunks of `chunk` blocks, taken in turn, and their parts are added through shared memory, always in the same order.
A CTA of `warps` warps holds warps / split groups; each group's unit of work is `tiles` tiles.

Data. Weights go from memory straight into registers, `depth` chunks ahead of their use and also across units of work;
the first are asked for before x is touched. Four lanes hold a block of a row, 8 bytes each. Tensor cores do not care
which of a block's columns is which, so that a lane's bytes 0, 2 | 1, 3 of each word become pairs of bfloat16 with two
logical operations and a subtraction a pair: 128 + (v & 127) less 128, or 256 where v is negative, both as bfloat16 bit
patterns. That is exact, and so are the products; the scale multiplies the float32 sum of a block. x lies in shared
memory as [block, row, 32], its columns in the same order, so that a lane takes both operands of a block in one load.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import processors, products
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.products import EIGHT, Finish, Pair, Product, Work
from pallas_kernels.mosaic_gpu.threads import Scalar
from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.tuning import choose

SHARED_BYTES = 220_000  # of a CTA


@dataclass(frozen=True)
class Config:
    """How the work is laid out; see the module's docstring.

    Attributes:
      warps: of a CTA, a multiple of 4.
      split: warps that share a unit of work; divides `warps`.
      tiles: tiles of 8 rows in a unit; a multiple of 2 where tiles are joined in pairs.
      chunk: blocks of 32 that a warp asks for at a time; divides in / 32.
      depth: chunks asked for ahead.
      resident: CTAs a multiprocessor, each taking units in turn; 0 for a CTA for each unit of its groups.
    """

    warps: int = 8
    split: int = 8
    tiles: int = 1
    chunk: int = 4
    depth: int = 1
    resident: int = 0


def heuristic(out: int, width: int, joined: int) -> Config:
    """A configuration for weights [out, width] whose tiles are joined in pairs (`joined` 2) or not (1).

    Many tiles: each of 16 warps takes its own. Otherwise, where a row is long, 16 warps share a tile, so that they end
    together; and where it is short, 8 warps ask for all of their share at once.
    """
    blocks, tiles = width // BLOCK, out // EIGHT
    chunk = next(c for c in (4, 6, 2, 5, 3, 1) if blocks % c == 0)
    chunks = blocks // chunk
    alone = joined == 1 and tiles > 14 * processors()
    if not alone and (out * width < 2**23 or chunks < 16):
        warps = split = 8 if chunks > 4 else 4
        depth = max(1, min(24 // (chunk * joined), -(-chunks // split)))
        return Config(warps, split, joined, chunk, depth, resident=2 if tiles // joined > 2 * processors() else 0)
    split = 1 if alone else 16
    in_flight = 16  # blocks and tiles, that the registers hold beside the sums
    return Config(16, split, joined, chunk, max(1, min(in_flight // (chunk * joined), -(-chunks // split))), resident=1)


def search_space(out: int, width: int, joined: int) -> Iterable[Config]:
    """Configurations whose chunks in flight fit the registers and whose last round is nearly full."""
    blocks = width // BLOCK
    for warps, chunk, depth, tiles in itertools.product((4, 8, 16), (2, 4, 6, 8), (1, 2, 3, 4, 5), (1, 2, 4)):
        split = warps
        while split >= 1:
            in_flight = chunk * depth * tiles * joined
            idle = split * depth * chunk > 2 * blocks
            if blocks % chunk == 0 and in_flight <= (16 if warps == 16 else 32) and not idle:
                for resident in (0, 16 // warps, 32 // warps):
                    yield Config(warps, split, tiles * joined, chunk, depth, resident)
            split //= 2


def run(product: Product, config: Config | None = None) -> Sequence[jax.Array]:
    """Run a product of up to 8 rows; `config` is for measurements.

    Raises:
      NotImplementedError: for other dtypes and sizes.
    """
    operands, work, (m, width), out = product.operands(), product.work, product.x.shape, product.values.shape[0]
    if not 1 <= m <= EIGHT:
        raise NotImplementedError(f"{m} rows; 1 to {EIGHT}")
    if out % (EIGHT * work.joined) or width % BLOCK:
        raise NotImplementedError(f"weights {product.values.shape}")
    if config is None:
        space = functools.partial(search_space, out, width, work.joined)
        config = choose(product.op, f"M={m} out={out} in={width}", heuristic(out, width, work.joined), space)
    if width % (BLOCK * config.chunk):
        raise NotImplementedError(f"weights {product.values.shape} in chunks of {config.chunk} blocks")
    plan = _Plan(m, width, work, config)
    if plan.shared_bytes > SHARED_BYTES:
        raise NotImplementedError(f"{m} rows of {width}: more than shared memory holds")
    results = product.results()
    kernel = _Kernel(plan, [*operands, *results], product.norm[1] if product.norm else 0.0)
    return products.launch(
        product.name, kernel.emit, list(operands.values()), list(results.values()), plan.ctas, config.warps,
        plan.shared_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """Static numbers of a kernel for x [m, width]."""

    m: int
    width: int
    work: Work
    config: Config

    @property
    def groups(self) -> int:
        return self.config.warps // self.config.split

    @property
    def units(self) -> int:
        return -(-self.work.count // (self.config.tiles // self.work.joined))

    @property
    def rounds(self) -> int:
        """CTAs that it takes to do each unit once."""
        return -(-self.units // self.groups)

    @property
    def ctas(self) -> int:
        resident = processors() * self.config.resident
        return min(self.rounds, resident) if resident else self.rounds

    @property
    def chunks(self) -> int:
        return self.width // BLOCK // self.config.chunk

    @property
    def steps(self) -> int:
        """Turns of `depth` chunks that a warp takes a unit."""
        return -(-self.chunks // (self.config.split * self.config.depth))

    @property
    def block_bytes(self) -> int:
        """Of x in shared memory, for a block of columns."""
        return 2 * BLOCK * self.m

    @property
    def x_bytes(self) -> int:
        return self.width // BLOCK * self.block_bytes

    @property
    def sums_bytes(self) -> int:
        """Of the partial sums of a CTA's warps."""
        return 0 if self.config.split == 1 else self.config.tiles * self.config.warps * 256

    @property
    def shared_bytes(self) -> int:
        return self.x_bytes + self.sums_bytes * (1 if self.rounds == self.ctas else 2)


class _Kernel:
    """Emits the kernel's code, as each thread runs it."""

    def __init__(self, plan: _Plan, names: Sequence[str], eps: float) -> None:
        self.plan, self.config, self.work, self.names, self.eps = plan, plan.config, plan.work, names, eps
        self.scale_blocks = math.gcd(math.gcd(plan.width // BLOCK, plan.config.chunk), 4)  # that one load can take

    def emit(self, *refs: Any) -> None:
        """All of the kernel. `refs`: the arrays that `names` says, and shared memory."""
        plan, config = self.plan, self.config
        self.pointers = {name: t.global_address(ref) for name, ref in zip(self.names, refs, strict=False)}
        self.x = t.kept(t.shared_address(refs[-1]))
        self.sums = self.x + plan.x_bytes
        self.thread, cta = t.thread_index(), t.block_index()
        self.lane, self.warp = self.thread & 31, t.first_of_warp(self.thread >> 5)
        self.member, self.group = self.warp % config.split, self.warp // config.split
        self.row, self.quarter = self.lane >> 2, self.lane & 3  # of a tile or of 8 rows of x; of a block
        buffers = [self._fetch(cta, 0, slot, None) for slot in range(config.depth)]
        finishes = self._begin(cta) if plan.rounds == plan.ctas else []
        self._stage()
        t.synchronize(1, 32 * config.warps)
        # Rows that are not there repeat the last one: what they give is dropped.
        place = self.x + t.minimum(self.row, plan.m - 1) * (2 * BLOCK) + self.quarter * 16
        if plan.rounds == plan.ctas:
            self._round(cta, None, buffers, place, finishes)
            return
        flat, length = [word for buffer in buffers for word in buffer], len(buffers[0])

        def turn(i: Scalar, *flat: Scalar) -> Sequence[Scalar]:
            round_ = cta + i * plan.ctas
            buffers = self._round(round_, i, _split(flat, length), place, self._begin(round_))
            return [word for buffer in buffers for word in buffer]

        t.loop(0, (plan.rounds + plan.ctas - 1 - cta) // plan.ctas, 1, flat, turn)

    def _stage(self) -> None:
        """Bring x to shared memory, normalised where asked, each lane's operands of a product in consecutive words.

        [block, row, quarter of a block, 4 words]. The lane of a row and a quarter multiplies by one word of each pair
        of words, 0 or 1 and 2 or 3, at a time: its other products go to rows 8 to 15 and are dropped, or the other way
        round.
        """
        plan, threads = self.plan, 32 * self.config.warps
        vectors = plan.width // 8  # a row's, of 16 bytes

        def put(row: Scalar, vector: Scalar, words: Sequence[Scalar]) -> None:
            place = self.x + vector // 4 * plan.block_bytes + row * (2 * BLOCK) + vector % 4 * 16
            pairs = [t.permute_bytes(words[i], words[i + 1], s) for i in (0, 2) for s in (0x5410, 0x7632)]
            t.store_shared(place, *pairs)

        if "norm" not in self.pointers:
            total = plan.m * vectors
            for first in range(0, total, 8 * threads):
                batch = []
                for start in range(first, min(first + 8 * threads, total), threads):
                    index = self.thread + start
                    where = index < total if start + threads > total else None
                    words = t.load_global(self.pointers["x"] + (index * 16).wide(), 4, where=where)
                    batch.append((index, where, words))
                for index, where, words in batch:
                    with t.when(where):
                        put(index // vectors, index % vectors, words)
            return

        # A row is normalised by one warp, or each part of it by one of several that all compute its mean square.
        sharers = max(1, self.config.warps // plan.m)
        for first in range(0, plan.m, self.config.warps):
            row, share = self.warp + first, t.constant(0)
            if sharers > 1:
                row, share = self.warp % plan.m, self.warp // plan.m
            with t.when(share < sharers if sharers > 1 else row < plan.m):
                self._normalise(row, share, sharers, vectors, put)

    def _normalise(self, row: Scalar, share: Scalar, sharers: int, vectors: int, put: Callable[..., None]) -> None:
        """Put this warp's share of a row of x, normalised."""
        turns = -(-vectors // 32)

        def load(vector: Scalar, where: Scalar | None) -> list[Scalar]:
            return t.load_global(self.pointers["x"] + ((row * vectors + vector) * 16).wide(), 4, where=where)

        def bound(vector: Scalar, last: int) -> Scalar | None:
            return vector < vectors if last >= vectors else None

        own = [(share + i * sharers) * 32 + self.lane for i in range(-(-turns // sharers))]
        wheres = [bound(vector, (sharers - 1 + i * sharers) * 32 + 31) for i, vector in enumerate(own)]

        def factors(i: int) -> list[Scalar]:
            address = self.pointers["norm"] + (own[i] * 32).wide()
            return [w.float() for offset in (0, 16) for w in t.load_constant(address, 4, offset, where=wheres[i])]

        held = [load(self.lane + 32 * turn, bound(self.lane + 32 * turn, turn * 32 + 31)) for turn in range(turns)]
        few = len(own) <= 4
        mine = held if sharers == 1 else [load(*where) for where in zip(own, wheres, strict=True)]
        scales = [factors(i) for i in range(len(own))] if few else []
        squares = [t.constant(0.0, t.f32())] * 4
        for words in held:
            for i, word in enumerate(words):
                for half in t.unpack_bf16(word):
                    squares[i] = t.fma(half, half, squares[i])
        total = (squares[0] + squares[1]) + (squares[2] + squares[3])
        for distance in (16, 8, 4, 2, 1):
            total = total + t.shuffle_xor(total, distance)
        root = t.rsqrt(total * (1 / self.plan.width) + self.eps)
        for i, vector in enumerate(own):
            if not few and i % 4 == 0:
                scales += [factors(j) for j in range(i, min(i + 4, len(own)))]
            results = []
            for j, word in enumerate(mine[i]):
                low, high = (half * root * scales[i][2 * j + k] for k, half in enumerate(t.unpack_bf16(word)))
                results.append(t.pack_bf16(low, high))
            with t.when(wheres[i]):
                put(row, vector, results)

    def _fetch(self, round_: Scalar, step: Scalar | int, slot: int, more: Scalar | None) -> list[Scalar]:
        """Ask for a chunk's weights and scales; zeros where there is none. `more`: whether there is such a turn."""
        plan, config = self.plan, self.config
        chunk = self._chunk(step, slot)
        if plan.chunks % (config.split * config.depth):
            more = _and(more, chunk < plan.chunks)
        words = []
        blocks, take = plan.width // BLOCK, self.scale_blocks
        for tile, exists in self._tiles(round_):
            where = _and(more, exists)
            for row in self.work.rows(tile):
                at = (row + self.row) * plan.width + chunk * (config.chunk * BLOCK) + self.quarter * 8
                address = self.pointers["values"] + at.wide()
                for block in range(config.chunk):
                    words += t.load_constant(address, 2, block * BLOCK, ".L1::no_allocate.L2::128B", where)
                for column in range(2):
                    at = ((row + self.quarter * 2 + column) * blocks + chunk * config.chunk) * 2
                    address = self.pointers["scales"] + at.wide()
                    for block in range(0, config.chunk, take):
                        if take == 1:
                            words.append(t.load_constant_half(address, block * 2, where))
                        else:
                            words += t.load_constant(address, take // 2, block * 2, where=where)
        return words

    def _tiles(self, round_: Scalar) -> list[tuple[Scalar, Scalar | None]]:
        """The group's tiles or pairs of tiles in a round, each with whether it exists."""
        plan = self.plan
        count = self.config.tiles // self.work.joined
        first = (round_ * plan.groups + self.group) * count
        all_exist = plan.rounds * plan.groups * count == self.work.count
        return [(first + i, None if all_exist else first + i < self.work.count) for i in range(count)]

    def _begin(self, round_: Scalar) -> list[Callable[[Sequence[Pair]], None]]:
        """Ask for what the epilogue of each tile or pair of a round needs; it keeps to what exists."""
        own = self.row < self.plan.m
        if self.config.split > 1:
            own = own & self.member.equals(0)

        def guarded(finish: Finish, exists: Scalar) -> Callable[[Sequence[Pair]], None]:
            return lambda sums: finish(sums, exists)

        found = []
        for tile, exists in self._tiles(round_):
            where = own if exists is None else own & exists
            found.append(guarded(self.work.epilogue(self.pointers, self.row, tile, self.quarter * 2, where), where))
        return found

    def _chunk(self, step: Scalar | int, slot: int) -> Scalar:
        """The warp's chunk of a turn."""
        return self.member + (step * self.config.depth + slot) * self.config.split

    def _multiply(
        self, chunk: Scalar, fetched: Sequence[Scalar], sums: Sequence[Scalar], place: Scalar
    ) -> list[Scalar]:
        """Add a chunk's products to sums [tile, 2], flat."""
        plan, config = self.plan, self.config
        per_tile = len(fetched) // config.tiles
        per_row = (per_tile - 2 * config.chunk) // 2
        address = place + chunk * (config.chunk * plan.block_bytes)
        sums, zeros = list(sums), [t.constant(0.0, t.f32())] * 4
        for block in range(config.chunk):
            x = t.load_shared(address, 4, offset=block * plan.block_bytes)
            for tile in range(config.tiles):
                own = fetched[tile * per_tile : (tile + 1) * per_tile]
                w = [t.int8_as_bf16(word >> shift) for word in own[2 * block : 2 * block + 2] for shift in (0, 8)]
                scales = []
                for column in range(2):
                    words = own[2 * config.chunk + column * per_row :][:per_row]
                    word, half = (block, 0) if self.scale_blocks == 1 else (block // 2, block % 2)
                    scales.append(t.unpack_halves(words[word])[half])
                upper, lower = (t.mma(x, [w[i], w[i + 2]], zeros, "bf16")[2 * i : 2 * i + 2] for i in range(2))
                for product in (upper, lower):
                    for column in range(2):
                        at = 2 * tile + column
                        sums[at] = t.fma(product[column], scales[column], sums[at])
        return sums

    def _round(
        self, round_: Scalar, turn: Scalar | None, buffers: Sequence[Sequence[Scalar]], place: Scalar,
        finishes: Sequence[Callable[[Sequence[Pair]], None]],
    ) -> list[list[Scalar]]:  # fmt: skip
        """Do a unit of work, whose first chunks are in `buffers`; give back the next unit's."""
        plan, config = self.plan, self.config
        sums = [t.constant(0.0, t.f32())] * (config.tiles * 2)
        whole = plan.chunks % (config.split * config.depth) == 0

        def turn_of(step: Scalar | None, buffers: Any, sums: Any) -> tuple[list[list[Scalar]], list[Scalar]]:
            """Use each buffer and fill it again; `step` None: the round has this one only."""
            buffers = [list(buffer) for buffer in buffers]
            for slot in range(config.depth):
                chunk = self._chunk(0 if step is None else step, slot)
                multiply = functools.partial(self._multiply, chunk, buffers[slot], sums, place)
                sums = multiply() if whole else t.either(chunk < plan.chunks, multiply, sums)
                if step is None and turn is None:
                    continue
                next_round, next_step = round_ + plan.ctas, t.constant(0)
                more = next_round < plan.rounds
                if step is not None:
                    inside = step + 1 < plan.steps
                    next_step = t.select(inside, step + 1, 0)
                    next_round = t.select(inside, round_, next_round)
                    more = inside if turn is None else next_round < plan.rounds
                buffers[slot] = self._fetch(next_round, next_step, slot, more)
            return buffers, sums

        if plan.steps == 1:
            buffers, sums = turn_of(None, buffers, sums)
        else:
            length, start = len(buffers[0]), [word for buffer in buffers for word in buffer]

            def step(index: Scalar, *carry: Scalar) -> Sequence[Scalar]:
                new, sums = turn_of(index, _split(carry[: len(start)], length), carry[len(start) :])
                return [*(word for buffer in new for word in buffer), *sums]

            carry = t.loop(0, plan.steps, 1, [*start, *sums], step)
            buffers, sums = _split(carry[: len(start)], length), carry[len(start) :]
        self._finish(turn, sums, finishes)
        return [list(buffer) for buffer in buffers]

    def _finish(
        self, turn: Scalar | None, sums: Sequence[Scalar], finishes: Sequence[Callable[[Sequence[Pair]], None]]
    ) -> None:
        """Add the group's sums and hand them to the epilogues."""
        plan, config, joined = self.plan, self.config, self.work.joined
        pairs = [(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]

        def done(pairs: Sequence[Pair]) -> None:
            for i, finish in enumerate(finishes):
                finish(pairs[i * joined : (i + 1) * joined])

        if config.split == 1:
            done(pairs)
            return
        base = self.sums + self.lane * 8
        if turn is not None:
            base = base + (turn & 1) * plan.sums_bytes
        mine = base + self.warp * 256
        for tile, pair in enumerate(pairs):
            t.store_shared(mine, *pair, offset=tile * config.warps * 256)
        t.synchronize(1, 32 * config.warps)
        base = base + self.group * (config.split * 256)
        with t.when(self.member.equals(0)):
            totals = []
            for tile in range(config.tiles):
                offset = tile * config.warps * 256
                loads = [t.load_shared(base, 2, offset=offset + k * 256) for k in range(config.split)]
                first, second = (
                    functools.reduce(lambda a, b: a + b, [w.float() for w in half]) for half in zip(*loads, strict=True)
                )
                totals.append((first, second))
            done(totals)


def _split(flat: Sequence[Scalar], length: int) -> list[list[Scalar]]:
    return [list(flat[start : start + length]) for start in range(0, len(flat), length)]


def _and(a: Scalar | None, b: Scalar | None) -> Scalar | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b
