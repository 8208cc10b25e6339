"""All layers of a decode step of several rows in one persistent kernel, for Hopper.

As the kernel for one row, `decode_step_row`: the same blocks, ring, packed weights and stages. What differs:

Products. A group of 16 rows of weights and 128 inputs is the left operand of m16n8k16, eight rows of the batch are its
columns. Weights become float16 on the way, exactly and in fewer instructions than bfloat16, and activations are float16
over `SCALE` in shared memory, as they are handed on: up to a million, with ten bits down to 0.001, and fewer below. A
warp adds up the groups of a unit that it meets.

Handing on. A feature's results are float16, one a row. Every 32-bit word of them carries two bits that
number the layer, in place of the lowest bit of each half, so that a reader knows each word by itself: what lay there
before is from two layers ago, or from none. All words are written in every layer, by those who have nothing to say too.
To look at all of them again and again would keep L2 and the block's other warps from everything else, so each thread
looks at one of its words until it is there, and then at all.
The residual stream is not kept by the blocks: who makes a feature of a layer's sums adds what came before.

Attention. The keys and values that the cache has depend on nothing that the step makes, so they come through the ring,
between the weights of q|k|v and those of the output projection: they are there when the queries are, and memory does
not pause. Teams of warps take the ring's slots in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_step import (
    DOWN_SPLIT,
    GROUP_INPUTS,
    GROUP_ROWS,
    ROWS,
    DecoderSizes,
    HandoverOfRows,
)
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.decode_step_frame import (
    GROUP_BYTES,
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

MARKS = 0x00010001  # the bits of a word that number layers
POLLED = 24  # features' results, of 16 bytes, that a thread asks for at a time: mostly all that it takes
ATTENDED = 4  # the most units of attention that a block sees to at a time
FEATURE = 2 * ROWS  # bytes of a feature's results
PAIRS = 32  # of features: first all even ones are handed on, then the odd ones, so that lanes read what is side by side


def marks(tag: Any) -> Any:
    """The number of a layer in the bits of `MARKS`: never the same as two layers ago, nor as in what is zero."""
    number = tag % 3 + 1
    return (number & 1) | (number >> 1) << 16


def input_words(x: jax.Array, step: jax.Array, sizes: DecoderSizes) -> jax.Array:
    """x [B, D] as the layer before the first would hand it on, int32 [2, D, ROWS / 2]: all in the first part."""
    rows = jnp.pad(x.astype(jnp.float32) / SCALE, ((0, ROWS - len(x)), (0, 0)))
    pairs = rows.astype(jnp.float16).T.reshape(-1, PAIRS, 2, ROWS // 2, 2)
    words = lax.bitcast_convert_type(pairs.swapaxes(1, 2), jnp.int32).reshape(-1, ROWS // 2) & ~MARKS
    return jnp.stack([words, jnp.zeros_like(words)]) | marks(step[0] * sizes.n_layers)


class RowsKernel(Frame):
    """Emits the kernel's code; see `Frame`."""

    def __init__(self, sizes: DecoderSizes, blocks: int, length: int, rows: int) -> None:
        self.rows, self.chunks = rows, sizes.chunks_of(rows)
        self.row_bytes, self.finishers = 4 * ROWS, ROWS // 4 * GROUP_ROWS
        self.pairs = self.rows * sizes.n_kv_heads  # of a row and a key head
        self.attended = min(ATTENDED, -(-self.pairs * self.chunks // blocks))
        # A slot of the ring has the keys and values of a power of two of tokens, 16 for each warp of a team.
        fit = SLOT_BYTES // (4 * sizes.head_dim)
        self.slot_keys = min(KEYS * WARPS, 1 << (fit.bit_length() - 1))
        super().__init__(sizes, blocks, length)
        self.places = HandoverOfRows.of(sizes, rows)
        self.team = self.slot_keys // KEYS
        if not self.team or WARPS // self.team > self.slots:
            raise NotImplementedError(f"keys of {sizes.head_dim} in a ring of {self.slots} slots")

    def _at_once(self, stage: Stage) -> int:
        return min(super()._at_once(stage), self.threads // self.finishers)

    def _in_pieces(
        self, stage: Stage, share: tuple[Scalar, Scalar], count: Scalar,
        body: Callable[[tuple[Scalar, Scalar], Scalar], Scalar],
    ) -> Scalar:  # fmt: skip
        if stage == self.stages[3]:
            return self._by_parts(share, count, lambda _, own, count: self._in_batches(stage, own, count, body))
        return self._in_batches(stage, share, count, body)

    def _in_batches(
        self, stage: Stage, share: tuple[Scalar, Scalar], count: Scalar,
        body: Callable[[tuple[Scalar, Scalar], Scalar], Scalar],
    ) -> Scalar:  # fmt: skip
        """As `_in_pieces`, as many units at a time as the block has threads to finish them."""
        (first, units), most = share, self._at_once(stage)
        if most >= self._most_units(stage):
            return body(share, count)

        def batch(i: Scalar, count: Scalar) -> Sequence[Scalar]:
            return (body((first + i, t.minimum(units - i, most)), count),)

        return t.loop(0, units, most, [count], batch, rolled=True)[0]

    def _by_parts(
        self, share: tuple[Scalar, Scalar], count: Scalar,
        body: Callable[[Scalar, tuple[Scalar, Scalar], Scalar], Scalar],
    ) -> Scalar:  # fmt: skip
        """Run count = body(part, share of it, count) for the parts of the inputs that a share of down takes."""
        first, units = share
        tiles = self.stages[3].units // DOWN_SPLIT
        begin, end = self._parts_of(share)
        end = t.select(units.equals(0), begin, end)

        def part(i: Scalar, count: Scalar) -> Sequence[Scalar]:
            start = t.maximum_unsigned(first, i * tiles)
            return (body(i, (start, t.minimum(first + units, (i + 1) * tiles) - start), count),)

        return t.loop(begin, end, 1, [count], part, rolled=True)[0]

    def _lay_out_activations(self, take: Callable[[int], int]) -> None:
        m = self.model
        width = max(m.d_model, m.n_heads * m.head_dim, m.d_ff // DOWN_SPLIT)
        self.stride = 2 * width + 64  # of a row: lanes of a warp hit different banks
        self.activations = take(ROWS * self.stride)
        self.squares = take(4 * WARPS * ROWS)
        self.positions = take(4 * ROWS)
        self.weights_of_chunks = take(4 * self.chunks * ROWS * m.n_heads)

    def _take_positions(self, positions: Scalar) -> None:
        with t.when(self.thread < self.rows):
            (position,) = t.load_global(positions + (self.thread * 4).wide())
            t.store_shared(self.base + self.positions + self.thread * 4, position)

    def _position(self, row: Scalar | int) -> Scalar:
        (position,) = t.load_shared(self.base + self.positions + row * 4)
        return position

    # The stages.

    def _consume(self, x: Scalar) -> None:
        m, stages, places = self.model, self.stages, self.places
        self.most_chunks = t.constant(1)
        for row in range(self.rows):
            self.position = self._position(row)
            self.most_chunks = t.maximum_unsigned(self.most_chunks, self._span()[3])

        def layer(index: Scalar, turn: Scalar, count: Scalar) -> Sequence[Scalar]:
            vectors = self._enter_layer(index)
            self.mark = marks(self.tag)
            self.here = self.space + ((self.tag & 1) * places.total).wide()
            before = self.space + (((self.tag & 1) ^ 1) * places.total).wide() + places.down
            self.before = t.select(index.equals(0), x, before)

            self._normal(self.before, DOWN_SPLIT, self.tag - 1, vectors)
            bias = vectors + 4 * 2 * m.d_model
            count = self._products_of(stages[0], turn, count, lambda unit: self._qkv(unit, bias))
            count = self._attend(turn, count)
            turn = self._next(stages[0], turn)

            share = self._share(stages[1], turn)
            with t.when(share[1].differs(0)):
                self._merge(self.here)
            count = self._products_of(stages[1], turn, count, self._out)
            turn = self._next(stages[1], turn)

            self._normal(self.here + places.out, 1, self.tag, vectors + 4 * m.d_model)
            count = self._products_of(stages[2], turn, count, self._swiglu)
            turn = self._next(stages[2], turn)

            def part(i: Scalar, own: tuple[Scalar, Scalar], count: Scalar) -> Scalar:
                self._hidden(self.here + places.hidden, i)
                multiply = functools.partial(self._multiply, stages[3], begin=self._down)
                return self._in_batches(stages[3], own, count, lambda piece, count: multiply(piece, count))

            count = self._by_parts(self._share(stages[3], turn), count, part)
            return self._next(stages[3], turn), count

        turn, count = t.loop(0, m.n_layers, 1, [self.block, t.constant(0)], layer)
        tag = self.first_tag + (m.n_layers - 1)
        last = self.space + ((tag & 1) * places.total).wide() + places.down
        self._normal(last, DOWN_SPLIT, tag, self.norm)
        self._products_of(self.logits, turn, count, self._logits)

    def _products_of(
        self, stage: Stage, turn: Scalar, count: Scalar, begin: Callable[[Scalar], Callable[[Scalar, Scalar], None]]
    ) -> Scalar:
        """Multiply the block's share of a stage but the last one, piece by piece."""
        return self._in_pieces(
            stage, self._share(stage, turn), count, lambda piece, count: self._multiply(stage, piece, count, begin)
        )

    def _wait_for(self, places: Sequence[tuple[Scalar, int]], mark: Scalar) -> list[list[Scalar]]:
        """The words at each (address, number of words) once all carry the mark; without their marks."""

        def look() -> tuple[Scalar, Sequence[Scalar]]:
            (word,) = t.load_global(places[-1][0], how=".relaxed.gpu")
            return ((word ^ mark) & MARKS).equals(0), []

        if len(places) > 2:
            t.repeat_until(look, [])
            t.synchronize_warp()

        def attempt() -> tuple[Scalar, Sequence[Scalar]]:
            words = [w for at, n in places for w in t.load_global(at, n, how=".relaxed.gpu")]
            wrong = functools.reduce(lambda a, b: a | b, [word ^ mark for word in words]) & MARKS
            return wrong.equals(0), [word & ~MARKS for word in words]

        words = iter(t.repeat_until(attempt, [t.i32()] * sum(n for _, n in places)))
        t.synchronize_warp()
        return [[next(words) for _ in range(n)] for _, n in places]

    def _take_features(self, places: Sequence[Scalar], mark: Scalar) -> list[list[Scalar]]:
        """All rows' results of the feature at each address, once they are there."""
        words = self._wait_for([(place, 4) for place in places], mark)
        return [[half for word in four for half in t.unpack_halves(word)] for four in words]

    def _take_pairs(
        self, source: Scalar, indices: Sequence[Scalar], parts: int, mark: Scalar
    ) -> list[tuple[list[Scalar], list[Scalar]]]:
        """All rows' results of the features 2 i and 2 i + 1, for each of `indices`, the sums of so many parts of x."""
        distance = self.model.d_model * FEATURE
        places = [
            source + (self._pair_place(index) + (f * PAIRS * FEATURE + part * distance)).wide()
            for index in indices for f in range(2) for part in range(parts)
        ]  # fmt: skip
        found = self._take_features(places, mark)
        sums = [
            [t.total(list(values)) for values in zip(*found[i : i + parts], strict=True)]
            for i in range(0, len(found), parts)
        ]
        return list(zip(sums[::2], sums[1::2], strict=True))

    def _wait_for_logs(self, places: Sequence[Scalar]) -> list[Scalar]:
        """The float32 at each address, once the tags beside them are this layer's."""

        def attempt() -> tuple[Scalar, Sequence[Scalar]]:
            pairs = [t.load_global(place, 2, how=".relaxed.gpu") for place in places]
            wrong = functools.reduce(lambda a, b: a | b, [tag ^ self.tag for _, tag in pairs])
            return wrong.equals(0), [value for value, _ in pairs]

        values = t.repeat_until(attempt, [t.i32()] * len(places))
        t.synchronize_warp()
        return [value.float() for value in values]

    def _hand_on(self, place: Scalar, values: Sequence[Scalar]) -> None:
        """Hand four results on, over `SCALE` already, at `place`, counted in bytes.

        They are rounded to what a mark leaves of a float16: cut off, they would shrink x in each layer.
        """
        values = [t.round_to_bits(value, 10) for value in values]
        words = [t.pack_halves(*values[i : i + 2]) & ~MARKS | self.mark for i in range(0, len(values), 2)]
        t.store_global(self.here + place.wide(), *words, how=".relaxed.gpu")

    def _seen(self, address: Scalar) -> list[Scalar]:
        """Four rows' results of a feature that this block has waited for before."""
        words = t.load_global(address, 2, how=".relaxed.gpu")
        return [half for word in words for half in t.unpack_halves(word & ~MARKS)]

    def _normal(self, source: Scalar, parts: int, tag: Scalar, scales: Scalar) -> None:
        """x, the sum of so many parts, times the norm's scale as activations, and the sums of squares; the root is
        applied to the result."""
        m, mark = self.model, marks(tag)
        pairs = m.d_model // 2
        near, exist = self._own_pairs(pairs)
        # The scales may come from memory, behind weights: they are asked for before there is something to wait for.
        factors = [[w.float() for w in t.load_global(scales + (index * 8).wide(), 2)] for index in near]
        squares = [t.constant(0.0, t.f32())] * ROWS
        together = POLLED // (2 * parts)
        for start in range(0, len(near), together):
            these = slice(start, start + together)
            found = self._take_pairs(source, near[these], parts, mark)
            for index, exists, factor, (a, b) in zip(near[these], exist[these], factors[these], found, strict=True):
                words = [t.pack_halves(x * factor[0], y * factor[1]) for x, y in zip(a, b, strict=True)]
                self._activate_pair(index, exists, words)
                for row, (x, y) in enumerate(zip(a, b, strict=True)):
                    new = t.fma(x, x, t.fma(y, y, squares[row]))
                    squares[row] = new if exists is None else t.select(exists, new, squares[row])
        # Each exchange adds up two lanes' sums and leaves each with half of the rows, until a lane has one.
        distance = 16
        while len(squares) > 1:
            half, upper = len(squares) // 2, (self.lane & distance).differs(0)
            mine = [t.select(upper, squares[half + i], squares[i]) for i in range(half)]
            other = [t.select(upper, squares[i], squares[half + i]) for i in range(half)]
            squares = [a + t.shuffle_xor(b, distance) for a, b in zip(mine, other, strict=True)]
            distance //= 2
        (square,) = squares
        while distance:
            square, distance = square + t.shuffle_xor(square, distance), distance // 2
        lanes = 32 // ROWS  # of a row
        with t.when((self.lane % lanes).equals(0)):
            place = (self.warp * ROWS + self.lane // lanes) * 4
            t.store_shared(self.base + self.squares + place, square)

    def _own_pairs(self, pairs: int) -> tuple[list[Scalar], list[Scalar | None]]:
        """Which of so many pairs of features a thread takes, and which of these exist, None being that all do."""
        thread = self._turned()
        own = [thread + start for start in range(0, pairs, self.threads)]
        exist = [None if start + self.threads <= pairs else own[-1] < pairs for start in range(0, pairs, self.threads)]
        return [t.minimum(index, pairs - 1) for index in own], exist

    def _turned(self) -> Scalar:
        """The thread's number, warps turned by another number in each block: all ask for the same words, and would ask
        the same parts of L2 at once."""
        return self.thread + self.block * 32 & self.threads - 1

    def _activate_pair(self, index: Scalar, exists: Scalar | None, words: Sequence[Scalar]) -> None:
        """Store activations 2 index and the next one, a word for each row."""
        with t.when(exists):
            place = self.base + self.activations + index * 4
            for row, word in enumerate(words):
                t.store_shared(place, word, offset=row * self.stride)

    def _roots(self) -> list[Scalar]:
        """For this thread's rows SCALE / sqrt(mean(x^2) + eps), by which products with x over SCALE are multiplied."""
        sums = self._added_up(self.base + self.squares + self._own()[1] * 4, WARPS, 4 * ROWS)
        return [t.rsqrt(s * (SCALE**2 / self.model.d_model) + self.model.eps) * SCALE for s in sums]

    # Products.

    def _partials(self, stage: Stage) -> int:
        """Partial sums of a unit: one for each warp where each gets some of its groups, otherwise one a group."""
        return WARPS if self._adds_up(stage) else stage.groups

    def _adds_up(self, stage: Stage) -> bool:
        return stage.groups >= WARPS

    def _no_sums(self) -> Sequence[Scalar]:
        return [t.constant(0.0, t.f32())] * 4

    def _add_group(
        self, stage: Stage, place: Scalar, index: Scalar, exists: Scalar, unit: Scalar, group: Scalar, part: Scalar,
        sums: tuple[Scalar, ...],
    ) -> tuple[Scalar, ...]:  # fmt: skip
        def multiplied() -> Sequence[Scalar]:
            return self._products(place, part, sums if self._adds_up(stage) else self._no_sums())

        new = t.either(exists, multiplied, sums)
        last = exists
        if self._adds_up(stage):
            index = unit * WARPS + self.warp
            last = exists & (group + WARPS >= stage.groups)  # the warp's next group is another unit's
        with t.when(last):
            row, quarter = self.lane >> 2, self.lane & 3
            target = self.base + self.partial + index * (GROUP_ROWS * self.row_bytes) + row * self.row_bytes
            t.store_shared(target + quarter * 8, *new[:2])
            t.store_shared(target + quarter * 8, *new[2:], offset=8 * self.row_bytes)
        return tuple(t.select(last, t.constant(0.0, t.f32()), x) for x in new)

    def _products(self, place: Scalar, part: Scalar, sums: Sequence[Scalar]) -> Sequence[Scalar]:
        """`sums` and a warp's group's products: of rows lane / 4 and 8 on with two rows of the batch."""
        weights = self.base + self.ring + place * SLOT_BYTES + self.warp * GROUP_BYTES
        mine, row = weights + self.lane * 16, self.lane >> 2
        x = self.base + self.activations + row * self.stride + part * (2 * GROUP_INPUTS) + (self.lane & 3) * 16
        blocks = range(GROUP_INPUTS // 32)
        own = [t.load_shared(mine, 4, offset=512 * block) for block in blocks]
        columns = [t.load_shared(x, 4, offset=64 * block) for block in blocks]
        scales = t.load_shared(weights + row * 16, 4, offset=GROUP_ROWS * GROUP_INPUTS)
        zero, new = t.constant(0.0, t.f32()), list(sums)
        for words, inputs, scale in zip(own, columns, map(t.unpack_halves, scales), strict=True):
            operands = []
            for half in range(2):
                upper, lower = map(t.int8_as_f16, words[2 * half : 2 * half + 2])
                operands.append([upper[0], lower[0], upper[1], lower[1]])
            product = t.mma(operands[0], inputs[:2], [zero] * 4, "f16")
            product = t.mma(operands[1], inputs[2:], product, "f16")
            new = [t.fma(product[i], scale[i // 2], new[i]) for i in range(4)]
        return new

    def _finisher_place(self) -> Scalar:
        feature, first = self._own()
        return feature * self.row_bytes + first * 4

    def _feature(self, place: Scalar, stage: Stage) -> list[Scalar]:
        """The sums of this thread's feature and four rows."""
        return self._added_up(place, self._partials(stage), GROUP_ROWS * self.row_bytes)

    def _added_up(self, place: Scalar, count: int, distance: int) -> list[Scalar]:
        """The sum of `count` times four float32, `distance` bytes apart."""
        parts = [[v.float() for v in t.load_shared(place, 4, offset=distance * i)] for i in range(count)]
        return [t.total(list(values)) for values in zip(*parts, strict=True)]

    # What becomes of the results.

    def _own(self) -> tuple[Scalar, Scalar]:
        """Which of a unit's features this thread finishes, and the first of its four rows; 16 lanes on is the feature
        8 on."""
        within = self.thread % self.finishers
        return within % 32 // 2, (within // 32 * 2 + within % 2) * 4

    def _pair_place(self, index: Scalar) -> Scalar:
        """Where the results of the even feature of a pair are among the features', in bytes; see `PAIRS`."""
        return (index + (index & -PAIRS)) * FEATURE

    def _feature_place(self, feature: Scalar) -> Scalar:
        """Where this thread's rows' results of a feature are, in the order of `PAIRS`."""
        return self._pair_place(feature >> 1) + (feature & 1) * (PAIRS * FEATURE) + self._own()[1] * 2

    def _qkv(self, unit: Scalar, bias: Scalar) -> Callable[[Scalar, Scalar], None]:
        m = self.model
        feature, first = self._own()
        head, rotated, pair, within = self._place_in_head(unit, feature)
        at = head * m.head_dim + within
        (own_bias,) = t.load_global(bias + (at * 4).wide())
        roots = self._roots()

        def finish(place: Scalar, valid: Scalar) -> None:
            results = []
            for i, (value, root) in enumerate(zip(self._feature(place, self.stages[0]), roots, strict=True)):
                row = t.minimum(first + i, self.rows - 1)
                value = t.fma(value, root, own_bias.float())
                angle = self.base + self.angles + (pair + row * m.head_dim) * 4
                cos, sin = (t.load_shared(angle, offset=o)[0].float() for o in (0, 2 * m.head_dim))
                sin = t.select(feature < 8, sin * -1.0, sin)
                turned = t.fma(t.shuffle_xor(value, 16), sin, value * cos)
                results.append(t.round_bf16(t.select(rotated, turned, value)))
            with t.when(valid):
                rounded = [(word & -0x10000).float() * (1 / SCALE) for word in results]
                self._hand_on(at * FEATURE + first * 2 + self.places.qkv, rounded)
                with t.when(head >= m.n_heads):
                    for i, result in enumerate(results):
                        row = first + i
                        slot = self._slot(self._position(t.minimum(row, self.rows - 1)))
                        with t.when(row < self.rows):
                            self._store_in_cache(head, row, slot, within, result)

        return finish

    def _out(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        """x with attention's part added."""
        at = self._feature_place(unit * GROUP_ROWS + self._own()[0])
        size = self.model.d_model * FEATURE
        parts = [self._seen(self.before + (at + part * size).wide()) for part in range(DOWN_SPLIT)]

        def finish(place: Scalar, valid: Scalar) -> None:
            sums = [self._feature(place, self.stages[1]), *parts]
            with t.when(valid):
                self._hand_on(at + self.places.out, [t.total(list(values)) for values in zip(*sums, strict=True)])

        return finish

    def _down(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        """One of two parts of x with the feed-forward half's added: the first one has the old x in it."""
        part = self._part(unit)
        tile = unit - part * (self.stages[3].units // DOWN_SPLIT)
        at = self._feature_place(tile * GROUP_ROWS + self._own()[0])
        old = self._seen(self.here + (at + self.places.out).wide())

        def finish(place: Scalar, valid: Scalar) -> None:
            sums = self._feature(place, self.stages[3])
            values = [a + t.select(part.equals(0), b, 0.0) for a, b in zip(sums, old, strict=True)]
            with t.when(valid):
                self._hand_on(at + part * (self.model.d_model * FEATURE) + self.places.down, values)

        return finish

    def _swiglu(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        feature, _ = self._own()
        roots = self._roots()

        def finish(place: Scalar, valid: Scalar) -> None:
            values = [v * root for v, root in zip(self._feature(place, self.stages[2]), roots, strict=True)]
            other = [t.shuffle_xor(value, 16) for value in values]
            results = [a * b * t.sigmoid(a) * (1 / SCALE) for a, b in zip(values, other, strict=True)]
            with t.when(valid), t.when(feature < 8):
                self._hand_on(self._feature_place(unit * 8 + feature) + self.places.hidden, results)

        return finish

    def _hidden(self, source: Scalar, part: Scalar) -> None:
        """One part of the hidden features as activations."""
        pairs = self.model.d_ff // 2 // DOWN_SPLIT
        base = source + (part * (pairs * 2 * FEATURE)).wide()
        near, exist = self._own_pairs(pairs)
        together = POLLED // 2
        for start in range(0, len(near), together):
            these = slice(start, start + together)
            places = [base + (self._pair_place(n) + f * PAIRS * FEATURE).wide() for n in near[these] for f in range(2)]
            found = self._wait_for([(place, 4) for place in places], self.mark)
            for index, exists, a, b in zip(near[these], exist[these], found[::2], found[1::2], strict=True):
                words = [t.permute_bytes(*pair, s) for pair in zip(a, b, strict=True) for s in (0x5410, 0x7632)]
                self._activate_pair(index, exists, words)

    def _logits(self, unit: Scalar) -> Callable[[Scalar, Scalar], None]:
        feature, first = self._own()
        at = self.result + ((unit * GROUP_ROWS + feature) * 4).wide()
        roots = self._roots()

        def finish(place: Scalar, valid: Scalar) -> None:
            values = [v * root for v, root in zip(self._feature(place, self.logits), roots, strict=True)]
            for i, value in enumerate(values):
                with t.when(valid), t.when(first + i < self.rows):
                    t.store_global(at + ((first + i) * (4 * self.model.vocab_size)).wide(), value)

        return finish

    # Attention.

    def _unit(self, unit: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """Of a unit of attention, a chunk of a row's keys of a head: row, key head, chunk, and whether there are such
        keys; `position` becomes the row's."""
        pair, chunk = unit % self.pairs, unit // self.pairs
        row, head = pair // self.model.n_kv_heads, pair % self.model.n_kv_heads
        self.position = self._position(row)
        return row, head, chunk, chunk < self._span()[3]

    def _keys_of(self, unit: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Of a unit: its row's first visible key, the first key of its chunk, and its slots of the ring."""
        _, _, chunk, exists = self._unit(unit)
        low, start, passes, _ = self._span()
        begin = start + chunk * passes * (KEYS * WARPS)
        keys = t.minimum(self.position + 1 - begin, passes * (KEYS * WARPS))
        return low, begin, t.select(exists, (keys + (self.slot_keys - 1)) // self.slot_keys, 0)

    def _units_from(self, turn: Scalar) -> tuple[Scalar, int]:
        """A block's first unit, and how many there are of all; blocks without a unit of q|k|v come first."""
        return (self.blocks - 1) - turn, self.pairs * self.chunks

    def _stream_keys(self, index: Scalar, turn: Scalar, count: Scalar) -> Scalar:
        m = self.model
        self._enter_layer(index)
        each = 2 * m.head_dim  # bytes of a key, or of a value

        def unit(unit: Scalar, count: Scalar) -> Sequence[Scalar]:
            low, begin, slots = self._keys_of(unit)
            base = (unit % self.pairs * self.length).wide() * each

            def slot(i: Scalar, count: Scalar) -> Sequence[Scalar]:
                target, barrier = self._empty_slot(count)
                first = begin + i * self.slot_keys
                start = t.maximum_unsigned(first, low)
                end = t.minimum(first + self.slot_keys, self.position)
                keys = t.select(start < end, end - start, 0)
                t.arrive_expecting(barrier, keys * (2 * each))
                target = target + (start - first) * each
                place = self._slot(start)
                before = t.minimum(keys, self.length - place) if m.ring else keys  # of the end of a ring
                for cache, offset in ((self.keys, 0), (self.values, self.slot_keys * each)):
                    with t.when(keys.differs(0)):
                        source = cache + base + (place * each).wide()
                        t.copy_to_shared(target + offset, source, before * each, barrier, once=False)
                    if m.ring:
                        with t.when(before < keys):
                            rest = target + offset + before * each
                            t.copy_to_shared(rest, cache + base, (keys - before) * each, barrier, once=False)
                return (count + 1,)

            return t.loop(0, slots, 1, [count], slot)

        first, units = self._units_from(turn)
        return t.loop(first, units, self.blocks, [count], unit)[0]

    def _attend(self, turn: Scalar, count: Scalar) -> Scalar:
        """Chunks of the keys of rows and key heads, some at a time; gives the count of the ring's slots after them."""
        m = self.model
        first, units = self._units_from(turn)

        def some(first: Scalar, count: Scalar) -> Sequence[Scalar]:
            exist = [self._unit(t.minimum(unit, units - 1))[3] & (unit < units) for unit in self._together(first)]

            def attend() -> Sequence[Scalar]:
                self._take_queries(first)
                t.synchronize(1, self.threads)

                def unit(place: Scalar, count: Scalar) -> Sequence[Scalar]:
                    return (self._attend_unit(first + place * self.blocks, place, count),)

                present = t.minimum((units - 1 - first) // self.blocks + 1, self.attended)
                found = t.loop(0, present, 1, [count], unit, rolled=True)
                t.synchronize(1, self.threads)
                return found

            count = t.either(functools.reduce(lambda a, b: a | b, exist), attend, [count])[0]
            items = self.group * m.head_dim // 4

            def combine(index: Scalar) -> None:
                place = index // items
                unit = first + place * self.blocks
                with t.when(unit < units):
                    self._combine_of(index % items, place, *self._unit(unit))

            self._each(self.attended * items, combine)
            return (count,)

        return t.loop(first, units, self.attended * self.blocks, [count], some, rolled=True)[0]

    def _together(self, first: Scalar) -> list[Scalar]:
        """The units that a block sees to together with its unit `first`."""
        return [first + place * self.blocks for place in range(self.attended)]

    def _with_new(self, found: Sequence[Scalar], key: Scalar, low: Scalar, queries: Scalar) -> Sequence[Scalar]:
        """As the frame's; most keys are among others that the cache has, and are in registers already."""
        mixed = functools.partial(super()._with_new, found, key, low, queries)
        return t.either((key < low) | (self.position < key + KEYS), mixed, found)

    def _attend_unit(self, unit: Scalar, place: Scalar, count: Scalar) -> Scalar:
        """Leave each warp's outputs for a unit; teams of warps take the ring's slots in turn.

        A team waits until a slot's last load is used up, and then for this one: others may be two laps apart.
        """
        m, teams = self.model, WARPS // self.team
        low, begin, slots = self._keys_of(unit)
        mine, within = self.warp // self.team, self.warp % self.team * KEYS
        queries = self.base + self.queries + place * self.query_bytes

        def slot(number: Scalar, *carry: Scalar) -> Sequence[Scalar]:
            at, parity = number % self.slots, number // self.slots & 1
            t.wait(self.empty + at * 8, parity ^ 1)
            t.wait(self.full + at * 8, parity)
            source = self.base + self.ring + at * SLOT_BYTES + within * (2 * m.head_dim)
            found = []
            for i, (row, pieces) in enumerate(self._pieces()):
                start = source + row * (2 * m.head_dim)
                offset = 0 if i < 2 else self.slot_keys * 2 * m.head_dim
                found += [w for at_, n in pieces for w in t.load_shared(start + at_, n, offset=offset)]
            t.synchronize_warp()
            with t.when(self.lane.equals(0)):
                t.arrive(self.empty + at * 8, teams)
            key = begin + (number - count) * self.slot_keys + within
            return self._attend_16(found, key, low, queries, carry)

        first = count + ((mine - count) & (teams - 1))
        self._leave(t.loop(first, count + slots, teams, self._nothing_attended(), slot), place)
        return count + slots

    def _take_queries(self, first: Scalar) -> None:
        """The groups' queries and the new keys and values of the units from `first` on, as bfloat16."""
        m = self.model
        each = m.head_dim // 2

        def heads(index: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
            """Of a number of a unit and one of its heads, the new key and value being the last: unit, own number, row,
            and first feature."""
            place, own = index // (self.group + 2), index % (self.group + 2)
            unit = t.minimum(first + place * self.blocks, self.pairs * self.chunks - 1) % self.pairs
            row, head = unit // m.n_kv_heads, unit % m.n_kv_heads
            new = m.n_heads + (own - self.group) * m.n_kv_heads
            source = t.select(own < self.group, head * self.group + own, new + head)
            return place, own, row, source * m.head_dim

        items = self.attended * (self.group + 2) * each
        indices = [self.thread + start for start in range(0, items, self.threads)]
        targets, odd, places = [], [], []
        for index in indices:
            number, pair = t.minimum(index, items - 1) // each, index % each
            place, own, row, feature = heads(number)
            # Two rows' results are a word.
            word = self.here + ((feature + pair * 2) * FEATURE + (row >> 1) * 4 + self.places.qkv).wide()
            places += [(word, 1), (word + FEATURE, 1)]
            odd.append((row & 1).differs(0))
            # Behind the queries are the new key and value, the queries padded to eight.
            skipped = t.select(own < self.group, t.constant(0), 8 - self.group)
            targets.append(place * self.query_bytes + (own + skipped) * (2 * m.head_dim) + pair * 4)
        halves = []
        for i, (word,) in enumerate(self._wait_for(places, self.mark)):
            low, high = t.unpack_halves(word)
            halves.append(t.select(odd[i // 2], high, low) * SCALE)
        for i, index in enumerate(indices):
            with t.when(index < items):
                target = self.base + self.queries + targets[i]
                t.store_shared(target, t.pack_bf16(*halves[2 * i : 2 * i + 2]))

    def _combine_of(
        self, index: Scalar, place: Scalar, row: Scalar, head: Scalar, chunk: Scalar, exists: Scalar
    ) -> None:
        """The warps' outputs for four of a head's dimensions: hand on their mean, and its weight's logarithm; or that
        there is none."""
        m = self.model
        each = m.head_dim // 4
        query, four = index // each, index % each

        def combined() -> Sequence[Scalar]:
            statistics = self.base + query * 4 + place * (32 * WARPS)
            tops = [t.load_shared(statistics, offset=self.maxima + 32 * w)[0].float() for w in range(WARPS)]
            top = functools.reduce(t.maximum, tops)
            outputs = self.base + self.outputs + (place * (WARPS * self.group) + query) * (4 * self.row_words)
            total, values = t.constant(0.0, t.f32()), [t.constant(0.0, t.f32())] * 4
            for warp in range(WARPS):
                share = t.exp2(tops[warp] - top)
                part = t.load_shared(statistics, offset=self.sums + 32 * warp)[0].float()
                words = t.load_shared(outputs + four * 16, 4, offset=warp * self.group * 4 * self.row_words)
                total = t.fma(share, part, total)
                values = [t.fma(share, word.float(), value) for word, value in zip(words, values, strict=True)]
            norm = t.reciprocal(total) * (1 / SCALE)
            return [top + t.log2(total), *(value * norm for value in values)]

        zero = t.constant(0.0, t.f32())
        log, *values = t.either(exists, combined, [t.constant(MASKED, t.f32()), *[zero] * 4])
        output = (chunk * ROWS + row) * m.n_heads + head * self.group + query
        self._hand_on((output * each + four) * 8 + self.places.attention, values)
        with t.when(four.equals(0)):
            address = self.here + (output * 8 + self.places.weights).wide()
            t.store_global(address, log.bits(), self.tag, how=".relaxed.gpu")

    def _merge(self, source: Scalar) -> None:
        """The chunks' outputs, weighted, as activations of the output projection."""
        m = self.model
        if self.chunks > 1:
            self._weigh_chunks(source)
            t.synchronize(1, self.threads)
        each = m.head_dim // 8  # pieces of a head's output
        items = self.rows * m.n_heads * each
        together, thread = min(POLLED // 2, -(-items // self.threads)), self._turned()

        def some(start: Scalar) -> Sequence[Scalar]:
            own = [start + thread + turn * self.threads for turn in range(together)]
            near = [t.minimum(index, items - 1) for index in own]

            def take(first: Scalar | int) -> list[list[Scalar]]:
                places = [(source + ((index + first * each) * 16 + self.places.attention).wide(), 4) for index in near]
                return self._wait_for(places, self.mark)

            def add(chunk: Scalar, *sums: Scalar) -> Sequence[Scalar]:
                first, new = chunk * (ROWS * m.n_heads), []
                for i, words in enumerate(take(first)):
                    at = (first + near[i] // each) * 4 + self.base
                    weight = t.load_shared(at, offset=self.weights_of_chunks)[0].float()
                    halves = [half for word in words for half in t.unpack_halves(word)]
                    new += [t.fma(weight, half, s) for half, s in zip(halves, sums[8 * i :], strict=False)]
                return new

            if self.chunks == 1:
                outputs = take(0)
            else:
                zeros = [t.constant(0.0, t.f32())] * (8 * together)
                sums = t.loop(0, self.most_chunks, 1, zeros, add, rolled=True)
                words = [t.pack_halves(*sums[j : j + 2]) for j in range(0, len(sums), 2)]
                outputs = [words[j : j + 4] for j in range(0, len(words), 4)]
            for i, index in enumerate(own):
                place, piece = near[i] // each, near[i] % each
                row, head = place // m.n_heads, place % m.n_heads
                target = self.base + self.activations + row * self.stride + (head * m.head_dim + piece * 8) * 2
                with t.when(index < items):
                    t.store_shared(target, *outputs[i])
            return ()

        t.loop(0, t.kept(t.constant(items)), together * self.threads, [], some, rolled=True)

    def _weigh_chunks(self, source: Scalar) -> None:
        """Each chunk's weight in the output of a row's head, to shared memory; a thread sees to all of one output."""
        heads = self.rows * self.model.n_heads
        mine = self.base + self.weights_of_chunks

        def output(start: Scalar) -> Sequence[Scalar]:
            place = t.minimum(start + self.thread, heads - 1)

            def look(i: Scalar, top: Scalar, total: Scalar) -> Sequence[Scalar]:
                own = [t.minimum(i + n, self.chunks - 1) * (ROWS * self.model.n_heads) + place for n in range(MERGED)]
                logs = self._wait_for_logs([source + (at * 8 + self.places.weights).wide() for at in own])
                with t.when(start + self.thread < heads):  # others have the last output, which is being weighed already
                    for at, log in zip(own, logs, strict=True):
                        t.store_shared(mine + at * 4, log)
                known = [t.select(i + n < self.chunks, log, MASKED) for n, log in enumerate(logs)]
                new_top = functools.reduce(t.maximum, known, top)
                shares = [t.exp2(log - new_top) for log in known]
                return new_top, functools.reduce(lambda a, b: a + b, shares, total * t.exp2(top - new_top))

            start_ = [t.constant(MASKED, t.f32()), t.constant(0.0, t.f32())]
            top, total = t.loop(0, self.most_chunks, MERGED, start_, look, rolled=True)
            norm = t.reciprocal(total)

            def weigh(chunk: Scalar) -> Sequence[Scalar]:
                at = mine + (chunk * (ROWS * self.model.n_heads) + place) * 4
                t.store_shared(at, t.exp2(t.load_shared(at)[0].float() - top) * norm)
                return ()

            with t.when(start + self.thread < heads):
                t.loop(0, self.most_chunks, 1, [], weigh, rolled=True)
            return ()

        t.loop(0, t.kept(t.constant(heads)), self.threads, [], output, rolled=True)
