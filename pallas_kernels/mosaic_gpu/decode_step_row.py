"""All layers of a decode step of one row in one persistent kernel, for Hopper; `decode_step_frame` says how.

What the stages hand on are 8-byte words of a value, two float16 or a float32, and a tag that numbers layers and steps.

Activations are 16-bit integers with one scale for 128 of them, finer than bfloat16 but for values a hundred times
smaller than the greatest. Their high and low bytes are two columns of the right operand of mma.m16n8k32 for int8, so
that the sums over a block of 32 are exact; its scale multiplies them in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_step import COPIES, DOWN_SPLIT, GROUP_INPUTS, GROUP_ROWS, DecoderSizes, HandoverWords
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.decode_step_frame import (
    GROUP_BYTES,
    HEAD_UNITS,
    KEYS,
    MASKED,
    MERGED,
    SCALE,
    SLOT_BYTES,
    WARPS,
    Frame,
    Stage,
)
from pallas_kernels.mosaic_gpu.threads import Scalar

LEVELS = 32512  # of an activation, so that neither byte of its integer overflows
MAGIC = 1.5 * 2.0**23  # a small integer added to this float32 is added to its bits
MAGIC_BITS = int(np.float32(MAGIC).view(np.int32))


class RowKernel(Frame):
    """Emits the kernel's code; see `Frame`."""

    def __init__(self, sizes: DecoderSizes, blocks: int, length: int) -> None:
        super().__init__(sizes, blocks, length)
        most = max(map(self._at_once, self.stages))
        if most * self.finishers > self.threads:
            raise NotImplementedError(f"{most} tiles of 16 rows of a matrix for each SM")
        self.words = HandoverWords.of(sizes)
        self.chunks = max(1, min(sizes.chunks, blocks // sizes.n_kv_heads))

    def _lay_out_activations(self, take: Callable[[int], int]) -> None:
        m = self.model
        width = max(m.d_model, m.n_heads * m.head_dim, m.d_ff)
        self.activations = take(2 * width)
        self.levels = take(4 * width // GROUP_INPUTS)
        self.squares = take(4 * WARPS)

    def _take_positions(self, positions: Scalar) -> None:
        self.position = t.load_global(positions)[0]

    # The stages.

    def _consume(self, x: Scalar) -> None:
        m, stages, self.span = self.model, self.stages, self._span()
        self.copy = (self.block % COPIES).wide() * (8 * self.words.total)

        def layer(index: Scalar, turn: Scalar, count: Scalar, *x: Scalar) -> Sequence[Scalar]:
            vectors = self._enter_layer(index)
            layer_bytes = COPIES * 8 * self.words.total
            self.here = self.space + ((index & 1) * layer_bytes).wide()
            before = self.space + (((index & 1) ^ 1) * layer_bytes).wide() + self.copy
            mine = self.here + self.copy

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

    # Products.

    def _partials(self, stage: Stage) -> int:
        return stage.groups

    def _in_parts(self, stage: Stage) -> bool:
        return stage == self.stages[3]

    def _finisher_place(self) -> Scalar:
        return (self.thread & 15) * 4

    def _add_group(
        self, stage: Stage, place: Scalar, index: Scalar, exists: Scalar, unit: Scalar, group: Scalar, part: Scalar,
        sums: tuple[Scalar, ...],
    ) -> tuple[Scalar, ...]:  # fmt: skip
        with t.when(exists):
            self._dot(place, part, index)
        return sums

    def _dot(self, place: Scalar, part: Scalar, index: Scalar) -> None:
        """A warp's group: 16 rows' partial sums over inputs 128 part…, to partial sum `index`."""
        blocks = range(GROUP_INPUTS // 32)
        weights = self.base + self.ring + place * SLOT_BYTES + self.warp * GROUP_BYTES
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
        for i in range(0, WARPS, 4):
            parts += [v.float() for v in t.load_shared(self.base + self.squares, 4, offset=4 * i)]
        return t.rsqrt(t.total(parts) * (1 / self.model.d_model) + self.model.eps)

    # What becomes of the results.

    def _qkv(self, unit: Scalar, bias: Scalar) -> Callable[[Scalar, Scalar], None]:
        """Bias, rotation, the cache."""
        m, groups = self.model, self.stages[0].groups
        row = self.thread & 15
        head, rotated, pair, within = self._place_in_head(unit, row)
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
                with t.when(head >= m.n_heads):
                    self._store_in_cache(head, 0, self._slot(self.position), within, rounded)

        return finish

    def _rows(self, stage: Stage, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        """Hand rows on as they are, in pairs."""
        row = self.thread & 15
        if stage == self.stages[3]:
            part = self._part(unit)
            tile = unit - part * (stage.units // DOWN_SPLIT)
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
        """The hidden activations that the block's units of the down projection take."""
        pairs = self.model.d_ff // 4 // DOWN_SPLIT

        def part(i: Scalar) -> Sequence[Scalar]:
            base = source + (i * (16 * pairs)).wide() + 8 * self.words.hidden
            indices = [self.thread + first for first in range(0, pairs, self.threads)]
            values = self._poll([base + (t.minimum(index, pairs - 1) * 16).wide() for index in indices], self.tag)
            for j, index in enumerate(indices):
                halves = [half for word in values[2 * j : 2 * j + 2] for half in t.unpack_halves(word)]
                self._activate(i * pairs + index, index < pairs, halves, SCALE)
            return ()

        t.loop(*self._parts_of(share), 1, [], part)

    def _logits(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        at = self.result + (unit * 64 + (self.thread & 15) * 4).wide()

        def finish(place: Scalar, valid: Scalar) -> None:
            with t.when(valid):
                t.store_global(at, self._sum(place, self.logits.groups) * self._root())

        return finish

    # Attention.

    def _attend(self, turn: Scalar) -> None:
        """One key head's chunk, in blocks that have one."""
        m = self.model
        low, start, passes, chunks = self.span
        unit = (self.blocks - 1) - turn  # blocks without a unit of q|k|v first
        with t.when(unit < chunks * m.n_kv_heads):
            head, chunk = unit % m.n_kv_heads, unit // m.n_kv_heads
            self._attend_chunk(head, start + chunk * passes * (KEYS * WARPS), passes, low)
            self._each(self.group * m.head_dim // 2, lambda index: self._combine(index, head, chunk))

    def _attend_chunk(self, head: Scalar, start: Scalar, passes: Scalar, low: Scalar) -> None:
        """Leave each warp's outputs for so many passes over a head's keys from `start` on, of which it takes 16 of a
        pass."""
        m, keys = self.model, KEYS * WARPS
        base = (head * self.length).wide() * (2 * m.head_dim)
        mine = start + self.warp * KEYS
        found = self._fetch(base, mine)  # before the queries are there
        self._take_queries(head)
        t.synchronize(1, self.threads)
        nothing = self._nothing_attended()

        def attend(i: Scalar, *carry: Scalar) -> Sequence[Scalar]:
            found, state = carry[: -len(nothing)], carry[-len(nothing) :]
            key = mine + i * keys
            following = self._fetch(base, key + keys)  # on its way while these are used
            return *following, *self._attend_16(found, key, low, self.base + self.queries, state)

        carry = t.loop(0, passes, 1, [*found, *nothing], attend)
        self._leave(carry[len(found) :])
        t.synchronize(1, self.threads)

    def _fetch(self, base: Scalar, key: Scalar) -> list[Scalar]:
        """The words of `_pieces` of 16 keys and values from `key` on, from the cache."""
        result = []
        for i, (row, pieces) in enumerate(self._pieces()):
            at = key + row
            start = self._slot(t.select(at >= self.position, t.constant(0), at)) * (2 * self.model.head_dim)
            cache = (self.keys if i < 2 else self.values) + base
            result += [w for at, n in pieces for w in t.load_global(cache + (start + at).wide(), n)]
        return result

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
                target = t.select(row < self.group, row * (2 * m.head_dim), 0)
                target = t.select(row.equals(self.group), t.constant(self.new_key), target)
                target = t.select(row.equals(self.group + 1), t.constant(self.new_value), target)
                t.store_shared(self.base + target + pair * 4, word, offset=self.queries)

    def _combine(self, index: Scalar, head: Scalar, chunk: Scalar) -> None:
        """The warps' outputs for a pair of a head's dimensions: hand on their mean, and its weight's logarithm."""
        m = self.model
        each = m.head_dim // 2
        row, pair = index // each, index % each
        statistics = self.base + row * 4
        tops = [t.load_shared(statistics, offset=self.maxima + 32 * w)[0].float() for w in range(WARPS)]
        top = functools.reduce(t.maximum, tops)
        place = self.base + self.outputs + row * (4 * self.row_words) + pair * 8
        total = first = second = t.constant(0.0, t.f32())
        for warp in range(WARPS):
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
                known = [t.select(chunks >= i + (chunk + 1), log, MASKED) for chunk, log in enumerate(logs)]
                new_top = functools.reduce(t.maximum, known, top)
                fade = t.exp2(top - new_top)
                total, sums = total * fade, [s * fade for s in sums]
                for chunk, log in enumerate(known):
                    share = t.exp2(log - new_top)
                    halves = [h for word in data[2 * chunk : 2 * chunk + 2] for h in t.unpack_halves(word)]
                    total, sums = total + share, [t.fma(share, h, s) for h, s in zip(halves, sums, strict=True)]
                return new_top, total, *sums

            zero = t.constant(0.0, t.f32())
            _, total, *sums = t.loop(0, chunks, MERGED, [t.constant(MASKED, t.f32()), *[zero] * 5], merge)
            norm = t.reciprocal(total)
            self._activate(index, valid, [s * norm for s in sums], SCALE)
