"""All layers of a decode step in one persistent kernel, for Hopper.

One block on each SM runs the whole stack. A block's producer thread streams the weights of its share of every stage
through a ring in shared memory, stage after stage and layer after layer: weights depend on nothing, so it runs as far
ahead as the ring is long, and the memory is busy while stages wait for each other. Its other warps wait for a stage's
activations, multiply and hand the results on.

Stages of a layer: q|k|v, attention, output projection, gate|up, down. A stage's results go through global memory
(that is, L2) as 8-byte words of a value and a tag which numbers layers and steps: a reader polls the very words that
it needs until all have the tag, so that handing on costs one store and one load, without a barrier or fence. The idea
is NCCL's protocol LL. Words of two layers alternate; each block takes part in gate|up, so that nobody can be a layer
behind what others overwrite.

Weights are packed (`pack`) in groups of 16 rows and 128 inputs, 2,176 bytes, in the order in which the lanes of a warp
take them as the left operand of mma.m16n8k32 for int8. Activations are 16-bit integers with one scale for 128 of them,
finer than bfloat16 but for values a hundred times smaller than the greatest. Their high and low bytes are two columns
of the right operand, so that the sums over a block of 32 are exact; its scale multiplies them in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_step import (
    COPIES,
    DOWN_SPLIT,
    GROUP_BYTES,
    GROUP_INPUTS,
    GROUP_ROWS,
    DecoderSizes,
    Handover,
    HandoverWords,
    PackedWeights,
    check,
)  # fmt: skip
from pallas_kernels.mosaic_gpu import materialised, processors
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.threads import Scalar
from pallas_kernels.tuning import choose

SLOT_GROUPS = 8  # of a slot of the ring: one for each warp of a team
SLOT_BYTES = SLOT_GROUPS * GROUP_BYTES
KEYS = 16  # that a warp attends to at a time
MERGED = 4  # chunks of keys whose outputs are merged at a time
PAUSE = 20  # nanoseconds between two looks at what is waited for
HEAD_UNITS = 8  # of the head that are summed at a time
SCALE = 16.0  # results are handed on as float16 of their value over this, or as float32
LEVELS = 32512  # of an activation, so that neither byte of its integer overflows
MAGIC = 1.5 * 2.0**23  # a small integer added to this float32 is added to its bits
MAGIC_BITS = int(np.float32(MAGIC).view(np.int32))
SHARED_BYTES = 227 * 1024 - 1024
_MASKED = -1e30
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """How the kernel is laid out on the device."""

    blocks: int  # one an SM, all at once on the device
    teams: int  # of eight warps that multiply


def heuristic() -> Config:
    """One block for each SM."""
    return Config(blocks=processors(), teams=1)


def search_space() -> Iterable[Config]:
    """Configurations worth measuring."""
    return (dataclasses.replace(heuristic(), teams=teams) for teams in (1, 2, 3))


@dataclass(frozen=True)
class Stage:
    """A matrix product: units of 16 rows, each of so many groups, from a layer's group `first` on."""

    units: int
    groups: int
    first: int


def _stages(sizes: DecoderSizes) -> tuple[Stage, ...]:
    """q|k|v, output, gate|up, down."""
    stages, first = [], 0
    for (rows, width), split in zip(sizes.matrices(), (1, 1, 1, DOWN_SPLIT), strict=True):
        tiles, groups = rows // GROUP_ROWS, width // GROUP_INPUTS
        stages.append(Stage(tiles * split, groups // split, first))
        first += tiles * groups
    return tuple(stages)


def configure(sizes: DecoderSizes) -> Config:
    """The configuration for a decoder.

    Raises:
      NotImplementedError: if the kernel cannot run it.
    """
    check(sizes)
    config = choose("decode_step", f"{sizes.d_model}x{sizes.d_ff}", heuristic(), search_space)
    blocks = config.blocks
    if sizes.n_heads > 8 * sizes.n_kv_heads:
        raise NotImplementedError(
            f"at most 8 query heads for each key head, not {sizes.n_heads} for {sizes.n_kv_heads}"
        )
    if sizes.n_kv_heads > blocks:
        raise NotImplementedError(f"more key heads ({sizes.n_kv_heads}) than SMs ({blocks})")
    if sizes.d_ff // 8 < blocks:  # then blocks could be layers apart
        raise NotImplementedError(f"d_ff {sizes.d_ff} does not give each of {blocks} SMs work in every layer")
    return config


class _Kernel:
    """Emits the kernel's code. Methods run in all threads of the multiplying warps unless they say otherwise."""

    def __init__(self, sizes: DecoderSizes, config: Config, length: int) -> None:
        self.model, self.config, self.length = sizes, config, length
        self.warps = SLOT_GROUPS * config.teams
        self.threads = 32 * self.warps
        self.words = HandoverWords.of(sizes)
        self.chunks = max(1, min(sizes.chunks, config.blocks // sizes.n_kv_heads))
        self.group = sizes.n_heads // sizes.n_kv_heads
        self.stages = _stages(sizes)
        self.layer_groups = sum(s.units * s.groups for s in self.stages)
        self.logits = Stage(sizes.vocab_size // GROUP_ROWS, sizes.d_model // GROUP_INPUTS, 0)
        self._layout()

    def _layout(self) -> None:
        """Shared memory: what the stages need, then as long a ring as fits."""
        m, offset = self.model, 0

        def take(size: int) -> int:
            nonlocal offset
            start, offset = offset, -(-(offset + size) // 128) * 128
            return start

        most = [-(-s.units // self.config.blocks) * s.groups for s in self.stages]
        most.append(HEAD_UNITS * self.logits.groups)
        width = max(m.d_model, m.n_heads * m.head_dim, m.d_ff)
        self.partial = take(64 * max(most))
        self.row_words = m.head_dim + 4  # of a head's output in shared memory, padded
        self.outputs = take(4 * self.warps * self.group * self.row_words)
        self.maxima = take(4 * self.warps * 8)
        self.sums = take(4 * self.warps * 8)
        self.activations = take(2 * width)
        self.levels = take(4 * width // GROUP_INPUTS)
        self.squares = take(4 * self.warps)
        self.queries = take(2 * 8 * m.head_dim)
        self.new_key = take(2 * m.head_dim)
        self.new_value = take(2 * m.head_dim)
        self.angles = take(4 * m.head_dim)
        self.pointers = take(16 * m.n_layers)
        self.barriers = take(16 * 64)
        self.ring = offset
        self.slots = min(64, (SHARED_BYTES - offset) // SLOT_BYTES)
        self.shared_bytes = offset + self.slots * SLOT_BYTES

    def _registers(self) -> tuple[int, int]:
        """Registers of a multiplying thread, and of one of the producer's warpgroup."""
        each = min(255, (1 << 16) // (self.threads + 128)) // 8 * 8
        rest = 24
        return min(240, each + (each - rest) * 128 // self.threads // 8 * 8), rest

    def emit(self, *refs: Any) -> None:
        """All of the kernel. `refs`: position, step, x, angles, the `PackedWeights`, keys and values of each layer,
        the handover's words, result, shared memory."""
        position, step, x, angles, *packed = refs[:8]
        weights: Any = PackedWeights(*packed)
        *caches, space, result, shared = refs[8:]
        m = self.model
        self.base = t.kept(t.shared_address(shared))
        self.thread, self.block = t.kept(t.thread_index()), t.block_index()
        self.warp, self.lane = self.thread >> 5, self.thread & 31
        self.weights, self.space = t.global_address(weights.layers), t.global_address(space)
        self.vectors, self.result = t.global_address(weights.vectors), t.global_address(result)
        self.norm, self.head = t.global_address(weights.norm), t.global_address(weights.head)
        self.copy = (self.block % COPIES).wide() * (8 * self.words.total)
        self.position = t.load_global(t.global_address(position))[0]
        self.first_tag = t.load_global(t.global_address(step))[0] * m.n_layers + 1
        full, empty = self.base + self.barriers, self.base + self.barriers + 512
        with t.when(self.thread.equals(0)):
            for slot in range(self.slots):
                t.init_barrier(full + 8 * slot, 1)
                t.init_barrier(empty + 8 * slot, SLOT_GROUPS)
            t.ptx("fence.mbarrier_init.release.cluster;")
            for i, cache in enumerate(caches):
                t.ptx("st.shared.b64 [$0], $1;", self.base + (self.pointers + 8 * i), t.global_address(cache))
        with t.when(self.thread < m.head_dim):
            angle = t.load_global(t.global_address(angles) + (self.thread * 4).wide())
            t.store_shared(self.base + self.angles + self.thread * 4, *angle)
        zeros = 4 * m.head_dim  # words of the queries
        with t.when(self.thread < min(zeros, self.threads)):
            for i in range(0, zeros, self.threads):
                t.store_shared(self.base + self.queries + (self.thread + i) * 4, t.constant(0))
        t.synchronize(0, self.threads + 128)
        own, rest = self._registers()
        with t.when(self.thread >= self.threads):
            t.set_registers("dec", rest)
            with t.when(self.thread.equals(self.threads)):
                self._produce(full, empty)
        with t.when(self.thread < self.threads):
            t.set_registers("inc", own)
            self.full, self.empty, self.span = full, empty, self._span()
            self._consume(t.global_address(x))

    # The assignment of work.

    def _share(self, stage: Stage, turn: Scalar) -> tuple[Scalar, Scalar]:
        """The first of a block's units and their number; `turn` is the block's place, which moves from stage to stage
        so that all blocks get the same in the long run."""
        each, rest = divmod(stage.units, self.config.blocks)
        return turn * each + t.minimum(turn, rest), t.select(turn < rest, t.constant(each + 1), each)

    def _next(self, stage: Stage, turn: Scalar) -> Scalar:
        """The block's place in the stage after `stage`."""
        blocks = self.config.blocks
        moved = turn + (blocks - stage.units % blocks)
        return t.select(moved < blocks, moved, moved - blocks)

    def _produce(self, full: Scalar, empty: Scalar) -> None:
        """Stream the block's weights through the ring; one thread."""
        model = self.model

        def stream(stage: Stage, base: Scalar, turn: Scalar, count: Scalar) -> Scalar:
            first, units = self._share(stage, turn)
            total = units * stage.groups
            source = base + (first * stage.groups + stage.first).wide() * GROUP_BYTES

            def slot(i: Scalar, count: Scalar) -> Sequence[Scalar]:
                place, lap = count % self.slots, count // self.slots
                size = t.minimum(total - i, SLOT_GROUPS) * GROUP_BYTES
                barrier = full + place * 8
                t.wait(empty + place * 8, (lap & 1) ^ 1)
                t.arrive_expecting(barrier, size)
                target = self.base + self.ring + place * SLOT_BYTES
                t.copy_to_shared(target, source + i.wide() * GROUP_BYTES, size, barrier)
                return (count + 1,)

            return t.loop(0, total, SLOT_GROUPS, [count], slot)[0]

        def layer(index: Scalar, turn: Scalar, count: Scalar) -> Sequence[Scalar]:
            base = self.weights + index.wide() * (self.layer_groups * GROUP_BYTES)
            for stage in self.stages:
                count = stream(stage, base, turn, count)
                turn = self._next(stage, turn)
            return turn, count

        turn, count = t.loop(0, model.n_layers, 1, [self.block, t.constant(0)], layer)
        stream(self.logits, self.head, turn, count)

    # The stages.

    def _consume(self, x: Scalar) -> None:
        m, stages = self.model, self.stages
        norms = 2 * m.d_model + m.qkv_rows

        def layer(index: Scalar, turn: Scalar, count: Scalar, *x: Scalar) -> Sequence[Scalar]:
            self.tag = self.first_tag + index
            layer_bytes = COPIES * 8 * self.words.total
            self.here = self.space + ((index & 1) * layer_bytes).wide()
            before = self.space + (((index & 1) ^ 1) * layer_bytes).wide() + self.copy
            mine = self.here + self.copy
            vectors = self.vectors + (index * (4 * norms)).wide()
            pointers = self.base + self.pointers + index * 16
            self.keys, self.values = t.ptx("ld.shared.v2.b64 {$0, $1}, [$2];", pointers, results=[t.i64()] * 2)

            scales = self._of_items(vectors)

            def add(_: Scalar, *x: Scalar) -> Sequence[Scalar]:
                return self._residual(x, before, self.words.down, DOWN_SPLIT, self.tag - 1)

            x = tuple(t.loop(0, t.minimum(index, 1), 1, x, add))  # the first layer has nothing to add
            self._normal(x, scales)
            share = self._share(stages[0], turn)
            bias = vectors + 4 * 2 * m.d_model
            count = self._multiply(stages[0], share, count, lambda unit: self._qkv(unit, bias))
            self._attend(turn)
            turn = self._next(stages[0], turn)

            share = self._share(stages[1], turn)
            with t.when(share[1].differs(0)):
                self._merge(mine)
            count = self._multiply(stages[1], share, count, lambda unit: self._rows(stages[1], unit))
            turn = self._next(stages[1], turn)

            scales = self._of_items(vectors + 4 * m.d_model)
            x = self._residual(x, mine, self.words.out, 1, self.tag)
            self._normal(x, scales)
            share = self._share(stages[2], turn)
            count = self._multiply(stages[2], share, count, self._swiglu)
            turn = self._next(stages[2], turn)

            share = self._share(stages[3], turn)
            with t.when(share[1].differs(0)):
                self._hidden(mine, share)
            count = self._multiply(stages[3], share, count, lambda unit: self._rows(stages[3], unit))
            return self._next(stages[3], turn), count, *x

        start = [value for item in self._of_items(x) for value in item]
        turn, count, *last_x = t.loop(0, m.n_layers, 1, [self.block, t.constant(0), *start], layer)
        last = self.space + ((m.n_layers - 1) % 2 * COPIES * 8 * self.words.total) + self.copy
        scales = self._of_items(self.norm)
        tag = self.first_tag + (m.n_layers - 1)
        self._normal(self._residual(last_x, last, self.words.down, DOWN_SPLIT, tag), scales)
        first, units = self._share(self.logits, turn)

        def part(i: Scalar, count: Scalar) -> Sequence[Scalar]:
            share = first + i, t.minimum(units - i, HEAD_UNITS)
            return (self._multiply(self.logits, share, count, self._logits),)

        t.loop(0, units, HEAD_UNITS, [count], part)

    def _each(self, items: int, body: Callable[[Scalar], None]) -> None:
        """Run body(index) for each item; threads beyond the last run nothing."""
        for first in range(0, items, self.threads):
            index = self.thread + first
            with t.when(index < items):
                body(index)

    def _poll(self, pairs: Sequence[Scalar], tag: Scalar, singles: Sequence[Scalar] = ()) -> list[Scalar]:
        """The values of the two words at each address of `pairs`, and the one of `singles`, once all have the tag."""

        def attempt() -> tuple[Scalar, Sequence[Scalar]]:
            values, tags = [], []
            for address in pairs:
                a, tag_a, b, tag_b = t.load_global(address, 4, how=".relaxed.gpu")
                values += [a, b]
                tags += [tag_a, tag_b]
            for address in singles:
                a, tag_a = t.load_global(address, 2, how=".relaxed.gpu")
                values.append(a)
                tags.append(tag_a)
            t.ptx(f"nanosleep.u32 {PAUSE};")
            done = [found.equals(tag) for found in tags]
            return functools.reduce(lambda p, q: Scalar(arith.andi(p.value, q.value)), done), values

        values = t.repeat_until(attempt, [t.i32()] * (2 * len(pairs) + len(singles)))
        t.synchronize_warp()
        return values

    def _send(self, place: Scalar, value: Scalar, copies: int) -> None:
        """Hand a word on at `place`, counted in words."""
        for copy in range(copies):
            address = self.here + (place * 8).wide()
            t.store_global(address, value, self.tag, offset=copy * 8 * self.words.total, how=".relaxed.gpu")

    def _items(self) -> list[Scalar]:
        """The fours of x that this thread sees to; the last one again in place of those that do not exist."""
        count = self.model.d_model // 4
        return [t.minimum(self.thread + first, count - 1) for first in range(0, count, self.threads)]

    def _of_items(self, address: Scalar) -> list[list[Scalar]]:
        """The thread's fours of a vector float32 [D]."""
        return [[v.float() for v in t.load_global(address + (item * 16).wide(), 4)] for item in self._items()]

    def _residual(self, x: Sequence[Scalar], space: Scalar, start: int, parts: int, tag: Scalar) -> tuple[Scalar, ...]:
        """x, the thread's fours, with what the last stage made added, in `parts` that are to be summed."""
        starts = [8 * (start + part * self.model.d_model // 2) for part in range(parts)]
        words = self._poll([space + (item * 16).wide() + at for item in self._items() for at in starts], tag)
        halves = [half for word in words for half in t.unpack_halves(word)]
        added = [t.total(halves[4 * parts * (i // 4) + i % 4 :][: 4 * parts : 4]) for i in range(len(x))]
        return tuple(t.fma(a, t.constant(SCALE, t.f32()), old) for a, old in zip(added, x, strict=True))

    def _normal(self, x: Sequence[Scalar], scales: Sequence[Sequence[Scalar]]) -> None:
        """x times the norm's scale as activations, and the sums of squares; the root is applied to the result."""
        squares = t.constant(0.0, t.f32())
        for i, scale in enumerate(scales):
            index, values = self.thread + i * self.threads, x[4 * i : 4 * i + 4]
            valid = index < self.model.d_model // 4
            self._activate(index, valid, [a * b for a, b in zip(values, scale, strict=True)], 1.0)
            squares = squares + t.select(valid, t.total([v * v for v in values]), 0.0)
        for distance in (16, 8, 4, 2, 1):
            squares = squares + t.shuffle_xor(squares, distance)
        with t.when(self.lane.equals(0)):
            t.store_shared(self.base + self.squares + self.warp * 4, squares)

    def _activate(self, index: Scalar, valid: Scalar, values: Sequence[Scalar], factor: float) -> None:
        """Store activations 4 index… of `factor` times their value; a warp has those of a group."""
        tops = [v.bits() & 0x7FFFFFFF for v in values]  # as integers, so that NaN is the greatest
        top = t.maximum_of_warp(functools.reduce(t.maximum_unsigned, tops)).float()
        levels = t.reciprocal(top) * float(LEVELS)
        words = [t.fma(v, levels, t.constant(MAGIC, t.f32())).bits() for v in values]

        def bytes_of(words: Sequence[Scalar], selector: int) -> Scalar:
            first, second = (t.permute_bytes(words[i], words[i + 1], selector) for i in (0, 2))
            return t.permute_bytes(first, second, 0x5410)

        # The low byte counts from -128 to 127, and the high one with it.
        low, high = bytes_of(words, 0x40), bytes_of([word + 128 for word in words], 0x51)
        # [pair of blocks, byte, quarter of a block, block, 8 inputs]
        place = (index >> 4) * 128 + (index >> 1 & 3) * 16 + (index >> 3 & 1) * 8 + (index & 1) * 4 + self.base
        with t.when(valid):
            t.store_shared(place, high, offset=self.activations)
            t.store_shared(place, low, offset=self.activations + 64)
            with t.when(self.lane.equals(0)):
                t.store_shared(self.base + self.levels + (index >> 5) * 4, top * (factor / LEVELS))

    def _multiply(
        self, stage: Stage, share: tuple[Scalar, Scalar], count: Scalar,
        begin: Callable[[Scalar], Callable[[Scalar, Scalar], None]],
    ) -> Scalar:  # fmt: skip
        """Multiply the block's units with the activations; 16 threads see to each unit's results, one a row.

        `count` counts the ring's slots; gives the count after this stage. `begin(unit)` runs before the product, where
        it may ask for what is needed later, in all threads; the function that it gives runs after it in whole warps,
        with the place of the row's first partial sum, and whether the row is one of the block's.
        """
        first, units = share
        total = units * stage.groups
        t.synchronize(1, self.threads)
        with t.when(units.differs(0)):
            team, member = self.warp >> 3, self.warp & 7
            unit = t.minimum(self.thread // GROUP_ROWS, units - 1)
            finish = begin(first + unit)

            skipped, moved = divmod(SLOT_GROUPS * self.config.teams, stage.groups)
            number, index = count + team, team * SLOT_GROUPS + member
            place, parity = number % self.slots, number // self.slots & 1

            def slot(i: Scalar, place: Scalar, parity: Scalar, unit: Scalar, part: Scalar) -> Sequence[Scalar]:
                t.wait(self.full + place * 8, parity)
                index = i * SLOT_GROUPS + member
                with t.when(index < total):
                    offset = ((first + unit) % DOWN_SPLIT) * stage.groups if stage == self.stages[3] else 0
                    self._dot(place, part + offset, index)
                t.synchronize_warp()
                with t.when(self.lane.equals(0)):
                    t.arrive(self.empty + place * 8)
                place, part = place + self.config.teams, part + moved
                stays, same = place < self.slots, part < stage.groups
                return (
                    t.select(stays, place, place - self.slots), t.select(stays, parity, parity ^ 1),
                    t.select(same, unit + skipped, unit + (skipped + 1)), t.select(same, part, part - stage.groups),
                )  # fmt: skip

            state = [place, parity, index // stage.groups, index % stage.groups]
            t.loop(team, (total + (SLOT_GROUPS - 1)) >> 3, self.config.teams, state, slot)
            t.synchronize(1, self.threads)
            rows = units * GROUP_ROWS
            with t.when(self.thread < ((rows + 31) & ~31)):
                place = self.base + self.partial + unit * (64 * stage.groups) + (self.thread & 15) * 4
                finish(place, self.thread < rows)
        return count + ((total + (SLOT_GROUPS - 1)) >> 3)

    def _dot(self, place: Scalar, part: Scalar, index: Scalar) -> None:
        """A warp's group: 16 rows' partial sums over inputs 128 part…, to partial sum `index`."""
        member, blocks = self.warp & 7, range(GROUP_INPUTS // 32)
        weights = self.base + self.ring + place * SLOT_BYTES + member * GROUP_BYTES
        mine = weights + self.lane * 16
        # The columns of the right operand are high, low, high, low, …: of the result only the first two are wanted.
        x = self.base + self.activations + part * (2 * GROUP_INPUTS) + (self.lane & 3) * 16
        x = x + (self.lane >> 2 & 1) * 64
        w = [t.load_shared(mine, 4, offset=512 * block) for block in blocks]
        b = [word for pair in range(len(blocks) // 2) for word in t.load_shared(x, 4, offset=128 * pair)]
        scales = t.load_shared(weights + (self.lane >> 2) * 16, 4, offset=GROUP_ROWS * GROUP_INPUTS)
        level = t.load_shared(self.base + self.levels + part * 4)[0].float()
        start = [t.constant(MAGIC_BITS)] * 4
        sums = [t.mma_int8(w[i], b[2 * i : 2 * i + 2], start) for i in blocks]
        upper = lower = t.constant(0.0, t.f32())
        high = t.constant(256.0, t.f32())
        for block in blocks:
            scale = t.unpack_halves(scales[block])
            c = [s.float() - MAGIC for s in sums[block]]
            upper = t.fma(t.fma(c[0], high, c[1]), scale[0], upper)
            lower = t.fma(t.fma(c[2], high, c[3]), scale[1], lower)
        with t.when((self.lane & 3).equals(0)):
            target = self.base + self.partial + index * 64 + self.lane
            t.store_shared(target, upper * level)
            t.store_shared(target, lower * level, offset=32)

    def _sum(self, place: Scalar, groups: int) -> Scalar:
        """The sum of a row's partial sums."""
        return t.total([t.load_shared(place, 1, offset=64 * i)[0].float() for i in range(groups)])

    def _root(self) -> Scalar:
        """1 / sqrt(mean(x^2) + eps)."""
        parts = []
        for i in range(0, self.warps, 4):
            parts += [v.float() for v in t.load_shared(self.base + self.squares, 4, offset=4 * i)]
        return t.rsqrt(t.total(parts) * (1 / self.model.d_model) + self.model.eps)

    # What becomes of the results.

    def _qkv(self, unit: Scalar, bias: Scalar) -> Callable[[Scalar, Scalar], None]:
        """Bias, rotation, the cache."""
        m, groups = self.model, self.stages[0].groups
        tiles, row = m.head_dim // GROUP_ROWS, self.thread & 15
        head, tile = unit // tiles, unit % tiles
        rotated = head < m.n_heads + m.n_kv_heads
        # Rows 8 apart in a tile are half a head apart where they are rotated.
        pair = tile * 8 + (row & 7)
        within = t.select(rotated, pair + (row >> 3) * (m.head_dim // 2), tile * GROUP_ROWS + row)
        at = head * m.head_dim + within
        (own_bias,) = t.load_global(bias + (at * 4).wide())
        cos, sin = (t.load_shared(self.base + self.angles + pair * 4, offset=o)[0].float() for o in (0, 2 * m.head_dim))
        sin = t.select(row < 8, sin * -1.0, sin)

        def finish(place: Scalar, valid: Scalar) -> None:
            value = t.fma(self._sum(place, groups), self._root(), own_bias.float())
            turned = t.fma(t.shuffle_xor(value, 8), sin, value * cos)
            rounded = t.round_bf16(t.select(rotated, turned, value))
            with t.when(valid):
                self._send(at + self.words.qkv, rounded, 1)
                slot = self._slot(self.position)
                with t.when(head >= m.n_heads), t.when(slot < self.length):
                    is_key = head < m.n_heads + m.n_kv_heads
                    cache = t.select(is_key, self.keys, self.values)
                    kv_head = head - t.select(is_key, t.constant(m.n_heads), m.n_heads + m.n_kv_heads)
                    element = (kv_head * self.length + slot) * m.head_dim + within
                    t.store_global_half(cache + element.wide() * 2, rounded >> 16)

        return finish

    def _rows(self, stage: Stage, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        """Hand rows on as they are, in pairs."""
        row = self.thread & 15
        if stage == self.stages[3]:
            part, tile = unit % DOWN_SPLIT, unit // DOWN_SPLIT
            at = part * (self.model.d_model // 2) + tile * (GROUP_ROWS // 2) + (row >> 1) + self.words.down
        else:
            at = unit * (GROUP_ROWS // 2) + (row >> 1) + self.words.out

        def finish(place: Scalar, valid: Scalar) -> None:
            value = self._sum(place, stage.groups) * (1 / SCALE)
            word = t.pack_halves(value, t.shuffle_xor(value, 1))
            with t.when(valid), t.when((row & 1).equals(0)):
                self._send(at, word, COPIES)

        return finish

    def _swiglu(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        """silu(gate) * up; the gate's rows are the upper eight, and two features make a word."""
        row = self.thread & 15

        def finish(place: Scalar, valid: Scalar) -> None:
            value = self._sum(place, self.stages[2].groups) * self._root()
            other = t.shuffle_xor(value, 8)
            feature = value * other * t.sigmoid(value) * (1 / SCALE)
            word = t.pack_halves(feature, t.shuffle_xor(feature, 1))
            with t.when(valid), t.when((row & 9).equals(0)):
                self._send(unit * 4 + (row >> 1) + self.words.hidden, word, COPIES)

        return finish

    def _hidden(self, source: Scalar, share: tuple[Scalar, Scalar]) -> None:
        """The hidden activations that the block's units of the down projection take: of one unit, one part."""
        first, units = share
        pairs = self.model.d_ff // 4 // DOWN_SPLIT
        alone = units.equals(1)
        begin = t.select(alone, first % DOWN_SPLIT, 0)

        def part(i: Scalar) -> Sequence[Scalar]:
            base = source + (i * (16 * pairs)).wide() + 8 * self.words.hidden
            indices = [self.thread + first for first in range(0, pairs, self.threads)]
            values = self._poll([base + (t.minimum(index, pairs - 1) * 16).wide() for index in indices], self.tag)
            for j, index in enumerate(indices):
                halves = [half for word in values[2 * j : 2 * j + 2] for half in t.unpack_halves(word)]
                self._activate(i * pairs + index, index < pairs, halves, SCALE)
            return ()

        t.loop(begin, t.select(alone, begin + 1, DOWN_SPLIT), 1, [], part)

    def _logits(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        at = self.result + (unit * 64 + (self.thread & 15) * 4).wide()

        def finish(place: Scalar, valid: Scalar) -> None:
            with t.when(valid):
                t.store_global(at, self._sum(place, self.logits.groups) * self._root())

        return finish

    # Attention.

    def _slot(self, position: Scalar) -> Scalar:
        """Where a position is in the cache."""
        return position % self.length if self.model.ring else position

    def _span(self) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """The first visible position; where the first chunk starts, passes over each chunk's keys, and chunks."""
        window, keys = self.model.window, KEYS * self.warps
        low = t.constant(0)
        if window is not None:
            low = t.select(self.position < window, t.constant(0), self.position - (window - 1))
        start = low // keys * keys
        blocks = (self.position - start) // keys + 1
        passes = (blocks + (self.chunks - 1)) // self.chunks
        return low, start, passes, (blocks + passes - 1) // passes

    def _attend(self, turn: Scalar) -> None:
        """One key head's chunk, in blocks that have one; each warp takes 16 keys of a pass."""
        m, keys = self.model, KEYS * self.warps
        low, start, passes, chunks = self.span
        unit = (self.config.blocks - 1) - turn  # blocks without a unit of q|k|v first
        with t.when(unit < chunks * m.n_kv_heads):
            head, chunk = unit % m.n_kv_heads, unit // m.n_kv_heads
            start = start + chunk * passes * keys
            row_bytes = 2 * m.head_dim
            base = (head * self.length).wide() * row_bytes
            mine = start + self.warp * KEYS
            tiles = m.head_dim // 8
            zero, masked = t.constant(0.0, t.f32()), t.constant(_MASKED, t.f32())
            found = self._fetch(base, mine)  # before the queries are there
            self._take_queries(head)
            t.synchronize(1, self.threads)

            def attend(i: Scalar, *carry: Scalar) -> Sequence[Scalar]:
                found, state = carry[: -2 * tiles - 2], carry[-2 * tiles - 2 :]
                key = mine + i * keys
                following = self._fetch(base, key + keys)  # on its way while these are used
                return *following, *self._attend_16(found, key, low, state)

            carry = t.loop(0, passes, 1, [*found, masked, zero, *[zero] * (2 * tiles)], attend)
            top, total, *output = carry[len(found) :]
            for distance in (1, 2):
                total = total + t.shuffle_xor(total, distance)
            row = self.lane >> 2
            with t.when(row < self.group):
                place = (self.warp * 8 + row) * 4 + self.base
                t.store_shared(place, top, offset=self.maxima)
                t.store_shared(place, total, offset=self.sums)
                target = self.base + self.outputs + (self.warp * self.group + row) * (4 * self.row_words)
                for tile in range(tiles):
                    first, second = self._columns(tile)
                    t.store_shared(target + first * 4, output[2 * tile])
                    t.store_shared(target + second * 4, output[2 * tile + 1])
            t.synchronize(1, self.threads)
            self._each(self.group * m.head_dim // 2, lambda index: self._combine(index, head, chunk))

    def _columns(self, tile: int) -> tuple[Scalar, Scalar]:
        """The two dimensions of a head that this lane's two columns of an output tile are."""
        block, within = divmod(tile, 8)
        quad = self.lane & 3
        if 64 * (block + 1) <= self.model.head_dim:  # a lane loads 8 dimensions of a value
            return quad * 16 + (64 * block + within), quad * 16 + (64 * block + within + 8)
        return quad * 8 + (64 * block + within), quad * 8 + (64 * block + within + 4)  # 4 dimensions

    def _take_queries(self, head: Scalar) -> None:
        """The group's queries and the new key and value, as bfloat16."""
        m = self.model
        each = m.head_dim // 2  # pairs of a head
        pairs = (self.group + 2) * each
        indices = [self.thread + first for first in range(0, pairs, self.threads)]
        places = []
        for index in indices:
            index = t.minimum(index, pairs - 1)
            row, pair = index // each, index % each
            new = m.n_heads + (row - self.group) * m.n_kv_heads
            source = t.select(row < self.group, head * self.group + row, new + head)
            places.append(self.here + ((source * each + pair) * 16).wide() + 8 * self.words.qkv)
        values = self._poll(places, self.tag)
        for i, index in enumerate(indices):
            with t.when(index < pairs):
                row, pair = index // each, index % each
                word = t.permute_bytes(values[2 * i], values[2 * i + 1], 0x7632)
                target = t.select(row < self.group, row * (2 * m.head_dim) + self.queries, 0)
                target = t.select(row.equals(self.group), t.constant(self.new_key), target)
                target = t.select(row.equals(self.group + 1), t.constant(self.new_value), target)
                t.store_shared(self.base + target + pair * 4, word)

    def _pieces(self) -> list[tuple[Scalar, list[tuple[Scalar, int]]]]:
        """The rows that a lane takes of 16 keys (two) and values (four), as (row, [(offset in bytes, words)])."""
        width, row, quad = self.model.head_dim, self.lane >> 2, self.lane & 3
        of_key = [(quad * 16 + 64 * block, 4) for block in range(width // 32)]
        of_value = [(row * 16 + 128 * block, 4) for block in range(width // 64)]
        if width % 64:
            of_value.append((row * 8 + width // 64 * 128, 2))
        return [(row + d, of_key) for d in (0, 8)] + [(quad * 2 + d, of_value) for d in (0, 1, 8, 9)]

    def _fetch(self, base: Scalar, key: Scalar) -> list[Scalar]:
        """The words of `_pieces` of 16 keys and values from `key` on, from the cache."""
        result = []
        for i, (row, pieces) in enumerate(self._pieces()):
            at = key + row
            start = self._slot(t.select(at >= self.position, t.constant(0), at)) * (2 * self.model.head_dim)
            cache = (self.keys if i < 2 else self.values) + base
            result += [w for at, n in pieces for w in t.load_global(cache + (start + at).wide(), n)]
        return result

    def _attend_16(
        self, found: Sequence[Scalar], key: Scalar, low: Scalar, state: Sequence[Scalar]
    ) -> Sequence[Scalar]:
        """A warp's online softmax over 16 keys from `key` on: rows are the group's heads.

        `state` is the greatest score so far, the lane's sum of weights, and the weighted values.
        """
        m = self.model
        row, quad = self.lane >> 2, self.lane & 3
        top, total, *output = state
        zero = t.constant(0)
        rows, words = [], iter(found)
        for i, (at, pieces) in enumerate(self._pieces()):
            # This step's key is not in the cache yet, and later ones are never seen.
            is_new, new = (key + at) >= self.position, self.new_key if i < 2 else self.new_value
            fresh = [w for at, n in pieces for w in t.load_shared(self.base + at, n, offset=new)]
            rows.append([t.select(is_new, a, b) for a, b in zip(fresh, words, strict=False)])
        k, v = rows[:2], rows[2:]
        value_keys = [key + (quad * 2 + d) for d in (0, 1, 8, 9)]

        scores = []
        for half in range(2):
            c = [t.constant(0.0, t.f32())] * 4
            for block in range(m.head_dim // 32):
                q = t.load_shared(self.base + self.queries + row * (2 * m.head_dim) + quad * 16, 4, offset=64 * block)
                for step in (0, 2):
                    first = 4 * block + step
                    c = t.mma([q[step], zero, q[step + 1], zero], k[half][first : first + 2], c, "bf16")
            scores += c[:2]
        visible = self.position - low + 1
        scale = m.head_dim**-0.5 * _LOG2E
        scores = [
            t.select((at - low) < visible, score * scale, _MASKED) for at, score in zip(value_keys, scores, strict=True)
        ]
        new_top = functools.reduce(t.maximum, scores, top)
        for distance in (1, 2):
            new_top = t.maximum(new_top, t.shuffle_xor(new_top, distance))
        fade = t.exp2(top - new_top)
        weights = [t.exp2(score - new_top) for score in scores]
        total = functools.reduce(lambda a, b: a + b, weights, total * fade)
        p = [t.pack_bf16(weights[0], weights[1]), zero, t.pack_bf16(weights[2], weights[3]), zero]
        result = []
        for tile in range(m.head_dim // 8):
            word, selector = tile // 2, (0x5410, 0x7632)[tile % 2]
            b = [t.permute_bytes(v[i][word], v[i + 1][word], selector) for i in (0, 2)]
            nothing = t.constant(0.0, t.f32())
            c = t.mma(p, b, [output[2 * tile] * fade, output[2 * tile + 1] * fade, nothing, nothing], "bf16")
            result += c[:2]
        return new_top, total, *result

    def _combine(self, index: Scalar, head: Scalar, chunk: Scalar) -> None:
        """The warps' outputs for a pair of a head's dimensions: hand on their mean, and its weight's logarithm."""
        m = self.model
        each = m.head_dim // 2
        row, pair = index // each, index % each
        statistics = self.base + row * 4
        tops = [t.load_shared(statistics, offset=self.maxima + 32 * w)[0].float() for w in range(self.warps)]
        top = functools.reduce(t.maximum, tops)
        place = self.base + self.outputs + row * (4 * self.row_words) + pair * 8
        total = first = second = t.constant(0.0, t.f32())
        for warp in range(self.warps):
            share = t.exp2(tops[warp] - top)
            part = t.load_shared(statistics, offset=self.sums + 32 * warp)[0].float()
            a, b = t.load_shared(place, 2, offset=warp * self.group * 4 * self.row_words)
            total = t.fma(share, part, total)
            first, second = t.fma(share, a.float(), first), t.fma(share, b.float(), second)
        norm = t.reciprocal(total) * (1 / SCALE)
        start = (chunk * m.n_heads + head * self.group + row) * (each + 2) + self.words.attention
        self._send(start + pair, t.pack_halves(first * norm, second * norm), COPIES)
        with t.when(pair.equals(0)):
            self._send(start + each, (top + t.log2(total)).bits(), COPIES)

    def _merge(self, source: Scalar) -> None:
        """The chunks' outputs, weighted, as activations of the output projection."""
        m, chunks = self.model, self.span[3]
        quarters = m.head_dim // 4  # pairs of words of a head
        items = m.n_heads * quarters
        for first in range(0, items, self.threads):
            index = self.thread + first
            valid, near = index < items, t.minimum(index, items - 1)
            head, quarter = near // quarters, near % quarters

            def merge(i: Scalar, *state: Scalar, head: Scalar = head, quarter: Scalar = quarter) -> Sequence[Scalar]:
                top, total, *sums = state
                rows = []
                for chunk in range(MERGED):
                    row = (t.minimum(chunks - 1, i + chunk) * m.n_heads + head) * (m.head_dim // 2 + 2)
                    rows.append(source + ((row + self.words.attention) * 8).wide())
                words = [row + (quarter * 16).wide() for row in rows]
                data = self._poll(words, self.tag, [row + 4 * m.head_dim for row in rows])
                logs = [log.float() for log in data[2 * MERGED :]]
                known = [t.select(chunks >= i + (chunk + 1), log, _MASKED) for chunk, log in enumerate(logs)]
                new_top = functools.reduce(t.maximum, known, top)
                fade = t.exp2(top - new_top)
                total, sums = total * fade, [s * fade for s in sums]
                for chunk, log in enumerate(known):
                    share = t.exp2(log - new_top)
                    halves = [h for word in data[2 * chunk : 2 * chunk + 2] for h in t.unpack_halves(word)]
                    total, sums = total + share, [t.fma(share, h, s) for h, s in zip(halves, sums, strict=True)]
                return new_top, total, *sums

            zero = t.constant(0.0, t.f32())
            _, total, *sums = t.loop(0, chunks, MERGED, [t.constant(_MASKED, t.f32()), *[zero] * 5], merge)
            norm = t.reciprocal(total)
            self._activate(index, valid, [s * norm for s in sums], SCALE)


def decode_step(
    x: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    weights: PackedWeights,
    caches: Sequence[tuple[jax.Array, jax.Array]],
    handover: Handover,
    sizes: DecoderSizes,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]], Handover]:
    """The op; see `pallas_kernels.decode_step`.

    Raises:
      NotImplementedError: for more than one row, a cache that is not bfloat16, or sizes that do not fit.
    """
    config = configure(sizes)
    if x.shape[0] != 1:
        raise NotImplementedError(f"one row, not {x.shape[0]}")
    if x.dtype != jnp.bfloat16 or caches[0][0].dtype != jnp.bfloat16:
        raise NotImplementedError(f"bfloat16 only, not {x.dtype} and a cache of {caches[0][0].dtype}")
    if 2 * cos.shape[1] != sizes.head_dim:
        raise NotImplementedError(f"all of a head rotated, not {2 * cos.shape[1]} of {sizes.head_dim}")
    kernel = _Kernel(sizes, config, caches[0][0].shape[2])

    def body(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(lambda _, *inner: kernel.emit(*inner))(*refs)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1, sizes.vocab_size), jnp.float32),
        scratch_types=[plgpu.SMEM((kernel.shared_bytes,), jnp.int8)],
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.teams * 2 + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Lane),
        kernel_name="decode_step",
    )

    @jax.custom_batching.sequential_vmap
    def step(*operands: Any) -> Any:
        *inputs, arrays, words = operands
        # What the kernel changes goes in as references, which makes input and output one buffer.
        refs, words = [jax.new_ref(array) for array in arrays], jax.new_ref(words)
        logits = run(*inputs, *refs, words)
        return logits, [jax.freeze(ref) for ref in refs], jax.freeze(words)

    arrays = [array for layer in caches for array in layer]
    inputs = materialised((positions, handover.step, x.astype(jnp.float32), jnp.concatenate([cos, sin]), *weights))
    logits, arrays, words = step(*inputs, arrays, handover.words)
    return logits, list(zip(arrays[::2], arrays[1::2], strict=True)), Handover(words, handover.step + 1)
