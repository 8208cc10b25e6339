"""What the kernels of a decode step have in common, for one row and for few: the frame, the ring and attention.

One block on each SM runs the whole stack, all of them at once: two such kernels side by side could wait for each other
for ever, but a program's kernels run one after the other.

A block's producer thread streams the weights of its share of every stage through a ring in shared memory, stage after
stage and layer after layer: weights depend on nothing, so it runs as far ahead as the ring is long, and the memory is
busy while stages wait for each other. It does not ask for all of that at once: what blocks hand each other would queue
behind. Its other warps wait for a stage's activations, multiply and hand the results on.

Stages of a layer: q|k|v, attention, output projection, gate|up, down. A stage's results go through global memory
(that is, L2) as words that tell which layer and step they are of: a reader polls the very words that it needs until all
are of its own, so that handing on costs one store and one load, without a barrier or fence. The idea is NCCL's protocol
LL. Words of two layers alternate; each block takes part in gate|up, so that nobody can be a layer behind what others
overwrite.

Weights are packed (`pack`) in groups of 16 rows and 128 inputs, 2,176 bytes, in the order in which the lanes of a warp
take them as the left operand of an m16n8 product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.decode_step import DOWN_SPLIT, GROUP_BYTES, GROUP_INPUTS, GROUP_ROWS, DecoderSizes, PackedWeights
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.threads import Scalar

SLOT_GROUPS = WARPS = 8  # of a slot of the ring: one for each warp that multiplies
SLOT_BYTES = SLOT_GROUPS * GROUP_BYTES
IN_FLIGHT = 2  # slots that are on their way: enough for the memory, and what stages hand on waits behind no more
MOST_SLOTS = 48  # of the ring, for which there are barriers
KEYS = 16  # that a warp attends to at a time
MERGED = 4  # chunks of keys whose outputs are merged at a time
HEAD_UNITS = 8  # of the head that are summed at a time
SCALE = 16.0  # results are handed on as float16 of their value over this, or as float32
SHARED_BYTES = 227 * 1024 - 1024
MASKED = -1e30
_LOG2E = math.log2(math.e)


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


class Frame:
    """Emits a kernel's code. Methods run in all threads of the multiplying warps unless they say otherwise."""

    rows = 1
    row_bytes = 4  # of a partial sum of a row of weights
    finishers = GROUP_ROWS  # threads that see to a unit's results
    chunks: int  # the most that a head's keys are split into
    attended = 1  # units of attention that a block sees to at a time
    position: Scalar  # of the row that is attended to
    keys: Scalar  # the layer's, in the cache
    values: Scalar

    def __init__(self, sizes: DecoderSizes, blocks: int, length: int) -> None:
        self.model, self.blocks, self.length = sizes, blocks, length
        self.threads = 32 * WARPS
        self.group = sizes.n_heads // sizes.n_kv_heads
        self.stages = _stages(sizes)
        self.layer_groups = sum(s.units * s.groups for s in self.stages)
        self.logits = Stage(sizes.vocab_size // GROUP_ROWS, sizes.d_model // GROUP_INPUTS, 0)
        self._layout()
        if self.slots < 2:
            raise NotImplementedError("no room for weights in shared memory")

    def _layout(self) -> None:
        """Shared memory: what the stages need, then as long a ring as fits."""
        m, offset = self.model, 0

        def take(size: int) -> int:
            nonlocal offset
            start, offset = offset, -(-(offset + size) // 128) * 128
            return start

        most = max(self._at_once(stage) * self._partials(stage) for stage in (*self.stages, self.logits))
        self.row_words = m.head_dim + 4  # of a head's output in shared memory, padded
        # Attention's outputs lie where partial sums do, of which there are none meanwhile.
        self.partial = self.outputs = take(
            max(GROUP_ROWS * self.row_bytes * most, self.attended * 4 * WARPS * self.group * self.row_words)
        )
        self.maxima = take(self.attended * 4 * WARPS * 8)
        self.sums = take(self.attended * 4 * WARPS * 8)
        self._lay_out_activations(take)
        # Of a unit of attention: queries, padded to eight, the new key and the new value.
        self.new_key, self.new_value, self.query_bytes = (2 * m.head_dim * n for n in (8, 9, 10))
        self.queries = take(self.attended * self.query_bytes)
        self.angles = take(4 * m.head_dim * self.rows)
        self.pointers = take(16 * m.n_layers)
        self.barriers = take(16 * MOST_SLOTS)
        self.ring = offset
        self.slots = min(MOST_SLOTS, (SHARED_BYTES - offset) // SLOT_BYTES)
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
        self._take_positions(t.global_address(position))
        self.first_tag = t.load_global(t.global_address(step))[0] * m.n_layers + 1
        self.full, self.empty = full, empty = self.base + self.barriers, self.base + self.barriers + 8 * MOST_SLOTS
        with t.when(self.thread.equals(0)):
            for slot in range(self.slots):
                t.init_barrier(full + 8 * slot, 1)
                t.init_barrier(empty + 8 * slot, SLOT_GROUPS)
            t.ptx("fence.mbarrier_init.release.cluster;")
            for i, cache in enumerate(caches):
                t.ptx("st.shared.b64 [$0], $1;", self.base + (self.pointers + 8 * i), t.global_address(cache))
        angles = t.global_address(angles)

        def take_angle(index: Scalar) -> None:
            t.store_shared(self.base + self.angles + index * 4, *t.load_global(angles + (index * 4).wide()))

        self._each(self.rows * m.head_dim, take_angle)
        # There are no queries where a group has less than eight.
        self._each(
            self.attended * self.query_bytes // 4,
            lambda index: t.store_shared(self.base + self.queries + index * 4, t.constant(0)),
        )
        t.synchronize(0, self.threads + 128)
        own, rest = self._registers()
        with t.when(self.thread >= self.threads):
            t.set_registers("dec", rest)
            with t.when(self.thread.equals(self.threads)):
                self._produce()
        with t.when(self.thread < self.threads):
            t.set_registers("inc", own)
            self._consume(t.global_address(x))

    # What the kernels for one row and for few do their own way.

    def _lay_out_activations(self, take: Callable[[int], int]) -> None:
        """Places in shared memory for the activations of a stage and what goes with them."""
        raise NotImplementedError

    def _take_positions(self, positions: Scalar) -> None:
        """The rows' positions, from global memory; all threads of the block."""
        raise NotImplementedError

    def _consume(self, x: Scalar) -> None:
        """The stages of all layers and the head; `x` is what the first layer gets."""
        raise NotImplementedError

    def _partials(self, stage: Stage) -> int:
        """Partial sums of a unit."""
        raise NotImplementedError

    def _at_once(self, stage: Stage) -> int:
        """The most units that a block multiplies by at once."""
        return HEAD_UNITS if stage is self.logits else self._most_units(stage)

    def _most_units(self, stage: Stage) -> int:
        """The most units of a block's share."""
        return -(-stage.units // self.blocks)

    def _in_pieces(
        self, stage: Stage, share: tuple[Scalar, Scalar], count: Scalar,
        body: Callable[[tuple[Scalar, Scalar], Scalar], Scalar],
    ) -> Scalar:  # fmt: skip
        """Run count = body(piece, count) for the pieces of a share that are multiplied by one after the other."""
        return body(share, count)

    def _finisher_place(self) -> Scalar:
        """Where this thread's first partial sum is among those of its unit."""
        raise NotImplementedError

    def _stream_keys(self, index: Scalar, turn: Scalar, count: Scalar) -> Scalar:
        """Stream a layer's keys and values through the ring too, where attention takes them from there."""
        return count

    def _no_sums(self) -> Sequence[Scalar]:
        """What a warp starts to add up with, from slot to slot."""
        return ()

    def _add_group(
        self, stage: Stage, place: Scalar, index: Scalar, exists: Scalar, unit: Scalar, group: Scalar, part: Scalar,
        sums: tuple[Scalar, ...],
    ) -> tuple[Scalar, ...]:  # fmt: skip
        """Multiply a warp's group in slot `place` with inputs 128 part…, where it exists: group `group` of the block's
        unit `unit`, `index` of all of its groups."""
        raise NotImplementedError

    # The assignment of work.

    def _share(self, stage: Stage, turn: Scalar) -> tuple[Scalar, Scalar]:
        """The first of a block's units and their number; `turn` is the block's place, which moves from stage to stage
        so that all blocks get the same in the long run."""
        each, rest = divmod(stage.units, self.blocks)
        return turn * each + t.minimum(turn, rest), t.select(turn < rest, t.constant(each + 1), each)

    def _next(self, stage: Stage, turn: Scalar) -> Scalar:
        """The block's place in the stage after `stage`."""
        blocks = self.blocks
        moved = turn + (blocks - stage.units % blocks)
        return t.select(moved < blocks, moved, moved - blocks)

    def _empty_slot(self, count: Scalar) -> tuple[Scalar, Scalar]:
        """The ring's slot number `count`, once it is empty and less than `IN_FLIGHT` are on their way, and the barrier
        that counts what comes in."""
        place, lap, earlier = count % self.slots, count // self.slots, count - IN_FLIGHT
        t.wait(self.empty + place * 8, (lap & 1) ^ 1)
        with t.when(count >= IN_FLIGHT):
            t.wait(self.full + earlier % self.slots * 8, earlier // self.slots & 1)
        return self.base + self.ring + place * SLOT_BYTES, self.full + place * 8

    def _produce(self) -> None:
        """Stream the block's weights through the ring; one thread."""
        model = self.model

        def stream(stage: Stage, base: Scalar, turn: Scalar, count: Scalar) -> Scalar:
            def piece(share: tuple[Scalar, Scalar], count: Scalar) -> Scalar:
                first, units = share
                total = units * stage.groups
                source = base + (first * stage.groups + stage.first).wide() * GROUP_BYTES

                def slot(i: Scalar, count: Scalar) -> Sequence[Scalar]:
                    target, barrier = self._empty_slot(count)
                    size = t.minimum(total - i, SLOT_GROUPS) * GROUP_BYTES
                    t.arrive_expecting(barrier, size)
                    t.copy_to_shared(target, source + i.wide() * GROUP_BYTES, size, barrier)
                    return (count + 1,)

                return t.loop(0, total, SLOT_GROUPS, [count], slot)[0]

            return self._in_pieces(stage, self._share(stage, turn), count, piece)

        def layer(index: Scalar, turn: Scalar, count: Scalar) -> Sequence[Scalar]:
            base = self.weights + index.wide() * (self.layer_groups * GROUP_BYTES)
            for stage in self.stages:
                count = stream(stage, base, turn, count)
                if stage == self.stages[0]:
                    count = self._stream_keys(index, turn, count)
                turn = self._next(stage, turn)
            return turn, count

        turn, count = t.loop(0, model.n_layers, 1, [self.block, t.constant(0)], layer)
        stream(self.logits, self.head, turn, count)

    def _each(self, items: int, body: Callable[[Scalar], None]) -> None:
        """Run body(index) for each item; threads beyond the last run nothing."""
        for first in range(0, items, self.threads):
            index = self.thread + first
            with t.when(index < items):
                body(index)

    def _part(self, unit: Scalar) -> Scalar:
        """The part of the inputs that a unit of down takes: first come all of the first part."""
        return unit // (self.stages[3].units // DOWN_SPLIT)

    def _parts_of(self, share: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """The parts that a share of down takes: the first one, and the one after the last."""
        first, units = share
        return self._part(first), self._part(first + units - 1) + 1

    def _in_parts(self, stage: Stage) -> bool:
        """Whether there are activations of several parts of the stage's inputs side by side."""
        return False

    def _enter_layer(self, index: Scalar) -> Scalar:
        """Say which layer it is; gives the address of its norms' scales and bias."""
        self.tag = self.first_tag + index
        pointers = self.base + self.pointers + index * 16
        self.keys, self.values = t.ptx("ld.shared.v2.b64 {$0, $1}, [$2];", pointers, results=[t.i64()] * 2)
        return self.vectors + (index * (4 * (2 * self.model.d_model + self.model.qkv_rows))).wide()

    def _place_in_head(self, unit: Scalar, row: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """Of a row of a unit of q|k|v: its head, whether that is rotated, its rotary pair and its dimension.

        Rows 8 apart in a tile are half a head apart where they are rotated.
        """
        m = self.model
        tiles = m.head_dim // GROUP_ROWS
        head, tile = unit // tiles, unit % tiles
        rotated, pair = head < m.n_heads + m.n_kv_heads, tile * 8 + (row & 7)
        within = t.select(rotated, pair + (row >> 3) * (m.head_dim // 2), tile * GROUP_ROWS + row)
        return head, rotated, pair, within

    def _store_in_cache(self, head: Scalar, row: Scalar | int, slot: Scalar, within: Scalar, rounded: Scalar) -> None:
        """Store the upper half of a word, of a key or value of a row of the batch, where there is such a slot."""
        m = self.model
        is_key = head < m.n_heads + m.n_kv_heads
        kv_head = head - t.select(is_key, t.constant(m.n_heads), m.n_heads + m.n_kv_heads)
        element = ((kv_head + row * m.n_kv_heads) * self.length + slot) * m.head_dim + within
        with t.when(slot < self.length):
            t.store_global_half(t.select(is_key, self.keys, self.values) + element.wide() * 2, rounded >> 16)

    # Products.

    def _multiply(
        self, stage: Stage, share: tuple[Scalar, Scalar], count: Scalar,
        begin: Callable[[Scalar], Callable[[Scalar, Scalar], None]],
    ) -> Scalar:  # fmt: skip
        """Multiply the block's units with the activations; `finishers` threads see to each unit's results.

        `count` counts the ring's slots; gives the count after this stage. `begin(unit)` runs before the product, where
        it may ask for what is needed later, in all threads; the function that it gives runs after it in whole warps,
        with the place of the first of its partial sums, and whether its unit is one of the block's.
        """
        first, units = share
        total = units * stage.groups
        t.synchronize(1, self.threads)
        with t.when(units.differs(0)):
            unit = t.minimum(self.thread // self.finishers, units - 1)
            finish = begin(first + unit)

            skipped, moved = divmod(SLOT_GROUPS, stage.groups)
            place, parity = count % self.slots, count // self.slots & 1

            def slot(i: Scalar, place: Scalar, parity: Scalar, unit: Scalar, part: Scalar, *sums: Scalar) -> Any:
                t.wait(self.full + place * 8, parity)
                offset = self._part(first + unit) * stage.groups if self._in_parts(stage) else 0
                index = i * SLOT_GROUPS + self.warp
                sums = self._add_group(stage, place, index, index < total, unit, part, part + offset, sums)
                t.synchronize_warp()
                with t.when(self.lane.equals(0)):
                    t.arrive(self.empty + place * 8)
                place, part = place + 1, part + moved
                stays, same = place < self.slots, part < stage.groups
                return (
                    t.select(stays, place, place - self.slots), t.select(stays, parity, parity ^ 1),
                    t.select(same, unit + skipped, unit + (skipped + 1)), t.select(same, part, part - stage.groups),
                    *sums,
                )  # fmt: skip

            state = [place, parity, self.warp // stage.groups, self.warp % stage.groups, *self._no_sums()]
            t.loop(0, (total + (SLOT_GROUPS - 1)) >> 3, 1, state, slot)
            t.synchronize(1, self.threads)
            finishers = units * self.finishers
            with t.when(self.thread < ((finishers + 31) & ~31)):
                place = unit * (GROUP_ROWS * self.row_bytes * self._partials(stage))
                finish(self.base + self.partial + place + self._finisher_place(), self.thread < finishers)
            t.synchronize(1, self.threads)  # warps that wait for the next stage would slow down those that finish
        return count + ((total + (SLOT_GROUPS - 1)) >> 3)

    # Attention.

    def _slot(self, position: Scalar) -> Scalar:
        """Where a position is in the cache."""
        return position % self.length if self.model.ring else position

    def _span(self) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """The first visible position; where the first chunk starts, passes over each chunk's keys, and chunks."""
        window, keys = self.model.window, KEYS * WARPS
        low = t.constant(0)
        if window is not None:
            low = t.select(self.position < window, t.constant(0), self.position - (window - 1))
        start = low // keys * keys
        blocks = (self.position - start) // keys + 1
        passes = (blocks + (self.chunks - 1)) // self.chunks
        return low, start, passes, (blocks + passes - 1) // passes

    def _nothing_attended(self) -> list[Scalar]:
        """What a warp starts with: the greatest score, the lane's sum of weights, and the weighted values."""
        return [t.constant(MASKED, t.f32()), *[t.constant(0.0, t.f32())] * (1 + self.model.head_dim // 4)]

    def _leave(self, state: Sequence[Scalar], place: Scalar | int = 0) -> None:
        """Leave what a warp has attended to in shared memory, as the output of the block's unit number `place`."""
        top, total, *output = state
        for distance in (1, 2):
            total = total + t.shuffle_xor(total, distance)
        row, warp = self.lane >> 2, self.warp + place * WARPS
        with t.when(row < self.group):
            at = (warp * 8 + row) * 4 + self.base
            t.store_shared(at, top, offset=self.maxima)
            t.store_shared(at, total, offset=self.sums)
            target = self.base + self.outputs + (warp * self.group + row) * (4 * self.row_words)
            for tile in range(self.model.head_dim // 8):
                first, second = self._columns(tile)
                t.store_shared(target + first * 4, output[2 * tile])
                t.store_shared(target + second * 4, output[2 * tile + 1])

    def _columns(self, tile: int) -> tuple[Scalar, Scalar]:
        """The two dimensions of a head that this lane's two columns of an output tile are."""
        block, within = divmod(tile, 8)
        quad = self.lane & 3
        if 64 * (block + 1) <= self.model.head_dim:  # a lane loads 8 dimensions of a value
            return quad * 16 + (64 * block + within), quad * 16 + (64 * block + within + 8)
        return quad * 8 + (64 * block + within), quad * 8 + (64 * block + within + 4)  # 4 dimensions

    def _pieces(self) -> list[tuple[Scalar, list[tuple[Scalar, int]]]]:
        """The rows that a lane takes of 16 keys (two) and values (four), as (row, [(offset in bytes, words)]).

        Keys are taken in another order than they lie in: 1, 0 for 0, 1 and so on in every other four.
        """
        width, row, quad = self.model.head_dim, self.lane >> 2, self.lane & 3
        of_key = [(quad * 16 + 64 * block, 4) for block in range(width // 32)]
        of_value = [(row * 16 + 128 * block, 4) for block in range(width // 64)]
        if width % 64:
            of_value.append((row * 8 + width // 64 * 128, 2))
        taken = row ^ (row >> 1 & 1)
        return [(taken + d, of_key) for d in (0, 8)] + [(at, of_value) for at in self._value_keys()]

    def _value_keys(self) -> list[Scalar]:
        """Which of 16 values a lane takes: lanes side by side take even and odd ones, in different banks of memory."""
        quad = self.lane & 3
        return [quad * 2 + d ^ (quad & 1) for d in (0, 1, 8, 9)]

    def _with_new(self, found: Sequence[Scalar], key: Scalar, low: Scalar, queries: Scalar) -> Sequence[Scalar]:
        """The words of `_pieces` of 16 keys, with this step's in its place, which the cache does not have yet.

        It takes the place of keys out of sight too: those weigh nothing, but only if they are numbers.
        """
        words, result = iter(found), []
        for i, (at, pieces) in enumerate(self._pieces()):
            outside, new = (key + at - low) >= self.position - low, self.new_key if i < 2 else self.new_value
            fresh = [w for at, n in pieces for w in t.load_shared(queries + at, n, offset=new)]
            result += [t.select(outside, a, b) for a, b in zip(fresh, words, strict=False)]
        return result

    def _attend_16(
        self, found: Sequence[Scalar], key: Scalar, low: Scalar, queries: Scalar, state: Sequence[Scalar]
    ) -> Sequence[Scalar]:
        """A warp's online softmax over 16 keys from `key` on: rows are the group's heads.

        `found` are the words of `_pieces`, where they are in the cache and can be seen; `queries` is where the unit's
        are in shared memory, with the new key and value; `state` begins as `_nothing_attended`.
        """
        m = self.model
        row, quad = self.lane >> 2, self.lane & 3
        top, total, *output = state
        zero = t.constant(0)
        visible = self.position - low
        words = iter(self._with_new(found, key, low, queries))
        rows = [[next(words) for _, n in pieces for _ in range(n)] for _, pieces in self._pieces()]
        k, v = rows[:2], rows[2:]
        value_keys = [key + at for at in self._value_keys()]

        scores = []
        for half in range(2):
            c = [t.constant(0.0, t.f32())] * 4
            for block in range(m.head_dim // 32):
                q = t.load_shared(queries + row * (2 * m.head_dim) + quad * 16, 4, offset=64 * block)
                for step in (0, 2):
                    first = 4 * block + step
                    c = t.mma([q[step], zero, q[step + 1], zero], k[half][first : first + 2], c, "bf16")
            scores += c[:2]
        scale = m.head_dim**-0.5 * _LOG2E
        scores = [
            t.select((at - low) < visible + 1, score * scale, MASKED)
            for at, score in zip(value_keys, scores, strict=True)
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
