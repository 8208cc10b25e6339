"""The k largest numbers of each row for Hopper, in one kernel.

A cluster of CTAs divides a row, and each finds the largest of its part in two looks at it. At the first, each two
neighbouring threads keep the largest of what they have read, a group. The k largest of all lie in the k groups with the
largest maxima, and none of them is less than the k-th of these maxima. At the second look, at those groups alone, what
is not less is put on a list. It is hardly longer than k, unless a row repeats itself as threads do; there is room for
all of the groups. Ranks come from comparing all pairs; a cluster's first CTA merges the CTAs' sorted lists.

A number is compared as 64 bits: its float32, made an unsigned integer of the same order, and its place, so that of
equal ones the first is greater. A NaN is the greatest of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import processors, products
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.threads import Scalar

MOST = 64  # numbers that can be asked for
WARPS = 16
THREADS = 32 * WARPS
GROUPS = THREADS // 2
TOGETHER = 4  # loads that a thread has on their way
SHARED_BYTES = 110_000  # of a CTA, of which two find room on a multiprocessor
SIGN = -(1 << 31)  # of a float32, by its bits


@dataclass(frozen=True)
class Plan:
    """Static numbers of a kernel for rows of `width`, of which the first `known` count, and how a row is divided."""

    rows: int
    width: int
    known: int
    k: int
    cluster: int

    @property
    def words(self) -> int:
        """That a thread loads at once."""
        return 4 if self.width % 4 == 0 else 1

    @property
    def turns(self) -> int:
        """Loads of a thread."""
        return -(-self.known // (self.cluster * THREADS * self.words))

    @property
    def part(self) -> int:
        """Numbers of a CTA."""
        return self.turns * THREADS * self.words

    @property
    def most_listed(self) -> int:
        return MOST * 2 * self.turns * self.words

    @property
    def shared_bytes(self) -> int:
        """A list, the groups' maxima, the CTAs' lists, ranks and places of groups, the least and the list's length."""
        pairs = self.most_listed + 2 + GROUPS + self.cluster * MOST + 2
        return 8 * pairs + 4 * (THREADS + MOST)


def plan_for(rows: int, width: int, known: int, k: int) -> Plan:
    """The smallest clusters that have room, or larger ones where multiprocessors would have nothing to do.

    Raises:
      NotImplementedError: for more than 64 numbers, or rows of too few or too many.
    """
    if not 0 < k <= MOST or known < GROUPS or width >= 2**31:
        raise NotImplementedError(f"the {k} largest of {known} numbers")
    plans = [Plan(rows, width, known, k, cluster) for cluster in (1, 2, 4, 8)]
    able = [plan for plan in plans if plan.shared_bytes <= SHARED_BYTES]
    if not able:
        raise NotImplementedError(f"rows of {known} numbers, more than shared memory has room for")
    return next((plan for plan in reversed(able) if plan.cluster * rows <= processors()), able[0])


def top_k(x: jax.Array, k: int, known: int) -> tuple[jax.Array, jax.Array]:
    """As `pallas_kernels.top_k`, for float32 rows.

    Raises:
      NotImplementedError: see `plan_for`.
    """
    if x.dtype != jnp.float32:
        raise NotImplementedError(f"numbers of {x.dtype}, not float32")
    rows, width = x.shape
    plan = plan_for(rows, width, known, k)
    results = [jax.ShapeDtypeStruct((rows, k), dtype) for dtype in (jnp.float32, jnp.int32)]
    blocks = rows * plan.cluster
    values, places = products.launch(
        "top_k", _Kernel(plan).emit, [x], results, blocks, WARPS, plan.shared_bytes, plan.cluster
    )
    return values, places


@dataclass(frozen=True)
class _Number:
    """A number of a row as two words, `order` and the inverse of its place; no number has the order 0."""

    order: Scalar
    inverse: Scalar

    def wide(self) -> Scalar:
        return (self.order.wide() << 32) | self.inverse.wide()

    def less(self, other: _Number) -> Scalar:
        return self.wide() < other.wide()

    def store(self, address: Scalar) -> None:
        t.store_shared(address, self.order, self.inverse)

    def words(self) -> list[Scalar]:
        return [self.order, self.inverse]

    def unless(self, condition: Scalar, other: _Number) -> _Number:
        """This number, or the other one where the condition holds."""
        return _Number(*(t.select(condition, b, a) for a, b in zip(self.words(), other.words(), strict=True)))


def _numbers(address: Scalar, count: int = 1) -> list[_Number]:
    """One number in shared memory, or two neighbours of which the first has an even place."""
    words = t.load_shared(address, 2 * count)
    return [_Number(*words[2 * i : 2 * i + 2]) for i in range(count)]


class _Kernel:
    """Emits the kernel's code, as each thread runs it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def emit(self, x: Any, values: Any, places: Any, shared: Any) -> None:
        plan = self.plan
        self.thread = t.kept(t.thread_index())
        block = t.block_index()
        self.rank, self.row = block % plan.cluster, block // plan.cluster
        self.x = t.global_address(x) + self.row.wide() * (4 * plan.width)
        self.first = self.rank * plan.part
        self.listed = t.kept(t.shared_address(shared))
        self.maxima = self.listed + 8 * (plan.most_listed + 2)
        self.sorted = self.maxima + 8 * GROUPS
        self.least = self.sorted + 8 * (plan.cluster * MOST)
        self.count = self.least + 8
        self.ranks = self.least + 16
        self.best = self.ranks + 4 * THREADS
        nothing = _Number(t.constant(0), t.constant(0))
        with t.when(self.thread < plan.cluster * MOST):
            nothing.store(self.sorted + self.thread * 8)
        with t.when(self.thread.equals(0)):
            t.store_shared(self.count, t.constant(0))
        if plan.cluster > 1:
            t.arrive_in_cluster("release")
        self._look_at_all()
        self._rank_groups()
        self._look_again()
        if plan.cluster > 1:
            t.wait_for_cluster()  # the first CTA's lists are empty
        self._sort()
        if plan.cluster > 1:
            t.arrive_in_cluster("release")
            t.wait_for_cluster()
        else:
            self._synchronize()
        with t.when(self.rank.equals(0) & (self.thread < plan.cluster * MOST)):
            self._merge(t.global_address(values), t.global_address(places))

    def _synchronize(self) -> None:
        t.synchronize(1, THREADS)

    def _load(self, turn: Scalar, thread: Scalar) -> list[_Number]:
        """What a thread loads in a turn; what does not exist has the order 0."""
        plan = self.plan
        place = self.first + (turn * THREADS + thread) * plan.words
        exists = (turn < plan.turns) & (place < plan.known)
        words = t.load_constant(self.x + place.wide() * 4, plan.words, where=exists)
        numbers = []
        for i, word in enumerate(words):
            bits = (word.float() + 0.0).bits()  # no negative zero, and no negative NaN
            order = bits ^ t.select(bits < SIGN, t.constant(SIGN), -1)
            whole = i == 0 or plan.known % plan.words == 0
            here = exists if whole else exists & (place + i < plan.known)
            numbers.append(_Number(t.select(here, order, 0), (place + i) ^ -1))
        return numbers

    def _look_at_all(self) -> None:
        """The largest number of each group."""

        def look(first: Scalar, order: Scalar, inverse: Scalar) -> list[Scalar]:
            best = _Number(order, inverse)
            for number in [n for i in range(TOGETHER) for n in self._load(first + i, self.thread)]:
                best = best.unless(best.order < number.order, number)  # places ascend
            return best.words()

        nothing = [t.constant(0), self.thread]  # not the same in any two threads
        best = _Number(*t.loop(0, self.plan.turns, TOGETHER, nothing, look))
        other = _Number(*(t.shuffle_xor(word, 1) for word in best.words()))
        with t.when((self.thread & 1).equals(0)):
            best.unless(best.less(other), other).store(self.maxima + self.thread * 4)
        self._synchronize()

    def _rank_groups(self) -> None:
        """The groups with the largest maxima, in any order, and the least of these maxima."""
        group, half = self.thread % GROUPS, self.thread // GROUPS
        (own,) = _numbers(self.maxima + group * 8)
        compared = GROUPS // 2
        rank = self._greater(own, self.maxima + half * (8 * compared), t.constant(compared))
        t.store_shared(self.ranks + self.thread * 4, rank)
        self._synchronize()
        with t.when(self.thread < GROUPS):
            rank = t.load_shared(self.ranks + self.thread * 4)[0]
            rank = rank + t.load_shared(self.ranks + self.thread * 4, offset=4 * GROUPS)[0]
            with t.when(rank < MOST):
                t.store_shared(self.best + rank * 4, group)
            with t.when(rank.equals(MOST - 1)):
                own.store(self.least)
        self._synchronize()

    def _greater(self, own: _Number, start: Scalar, count: Scalar) -> Scalar:
        """How many of `count` numbers in shared memory, an even number of them, are greater than a thread's own."""

        def compare(i: Scalar, found: Scalar) -> list[Scalar]:
            for other in _numbers(start + i * 8, 2):
                found = found + t.select(own.less(other), t.constant(1), 0)
            return [found]

        return t.loop(0, count, 2, [t.constant(0)], compare)[0]

    def _look_again(self) -> None:
        """Put what is not less than the least on the list."""
        plan = self.plan
        sharers = THREADS // MOST  # of a group
        group = t.load_shared(self.best + self.thread // sharers * 4)[0]
        (least,) = _numbers(self.least)

        def look(load: Scalar) -> list[Scalar]:
            for number in self._load(load // 2, group * 2 + load % 2):
                with t.when((number.less(least) ^ True) & number.order.differs(0)):
                    at = t.ptx("atom.shared.add.u32 $0, [$1], 1;", self.count, results=[t.i32()])[0]
                    number.store(self.listed + at * 8)
            return []

        t.loop(self.thread % sharers, 2 * plan.turns, sharers, [], look)
        self._synchronize()
        with t.when(self.thread.equals(0)):  # so that the list can be read by twos
            _Number(t.constant(0), t.constant(0)).store(self.listed + t.load_shared(self.count)[0] * 8)
        self._synchronize()

    def _sort(self) -> None:
        """The largest on the list, in order, to the cluster's first CTA."""
        count = t.load_shared(self.count)[0]
        target = self.sorted + self.rank * (8 * MOST)
        if self.plan.cluster > 1:
            target = t.address_in_cluster(target, 0)

        def place(i: Scalar) -> list[Scalar]:
            (own,) = _numbers(self.listed + i * 8)
            rank = self._greater(own, self.listed, count + count % 2)
            with t.when(rank < MOST):
                for offset, word in enumerate(own.words()):
                    code = f"st.shared::cluster.b32 [$1 + {4 * offset}], $0;"
                    t.ptx(code, word, target + rank * 8)
            return []

        t.loop(self.thread, count, THREADS, [], place)

    def _merge(self, values: Scalar, places: Scalar) -> None:
        """Each thread's number of all CTAs' lists to where it belongs in the results."""
        plan = self.plan
        own_list, own_place = self.thread // MOST, self.thread % MOST
        (own,) = _numbers(self.sorted + self.thread * 8)
        rank = own_place
        for i in range(1, plan.cluster):  # how many are greater in each of the other lists, by bisection
            start = self.sorted + (own_list + i) % plan.cluster * (8 * MOST)
            found = t.constant(0)
            for step in (32, 16, 8, 4, 2, 1, 1):
                (other,) = _numbers(start + (found + (step - 1)) * 8)
                found = found + t.select(own.less(other), t.constant(step), 0)
            rank = rank + found
        with t.when((rank < plan.k) & own.order.differs(0)):
            at = ((self.row * plan.k + rank) * 4).wide()
            bits = own.order ^ t.select(own.order < SIGN, t.constant(-1), SIGN)
            t.store_global(values + at, bits)
            t.store_global(places + at, own.inverse ^ -1)
