"""Code for single threads inside a Mosaic GPU kernel: scalars with operators, loops, and the PTX that Pallas lacks.

Pallas' own operations work on arrays that a warpgroup holds together. Where each warp or thread must go its own way (a
warp that streams weights while others wait for activations), `plgpu.inline_mgpu` takes over, and this module is what
its body is written in. Memory is addressed by number: int32 for shared memory, int64 for global memory. Every access
is a volatile inline PTX instruction, so the compiler keeps their order and ptxas schedules them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

_scf: Any = scf  # untyped, as the older jaxlib's stubs have other signatures
_utils: Any = mosaic.utils


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    return ir.F32Type.get()


class Scalar:
    """A thread's int32, int64 (both unsigned where that matters), float32 or bool, with Python's operators."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value

    @property
    def type(self) -> ir.Type:
        return self.value.type

    def _is_float(self) -> bool:
        return isinstance(self.type, ir.F32Type)

    def like(self, other: Scalar | int | float) -> Scalar:
        """`other` as a Scalar of this one's type."""
        return other if isinstance(other, Scalar) else constant(other, self.type)

    def _apply(self, other: Scalar | int | float, integer: Any, floating: Any = None) -> Scalar:
        op = floating if self._is_float() else integer
        return Scalar(op(self.value, self.like(other).value))

    def __add__(self, other: Scalar | int | float) -> Scalar:
        return self._apply(other, arith.addi, arith.addf)

    def __sub__(self, other: Scalar | int | float) -> Scalar:
        return self._apply(other, arith.subi, arith.subf)

    def __mul__(self, other: Scalar | int | float) -> Scalar:
        return self._apply(other, arith.muli, arith.mulf)

    def __truediv__(self, other: Scalar | float) -> Scalar:
        return self._apply(other, None, arith.divf)

    def __floordiv__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.divui)

    def __mod__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.remui)

    def __and__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.andi)

    def __or__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.ori)

    def __xor__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.xori)

    def __lshift__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.shli)

    def __rshift__(self, other: Scalar | int) -> Scalar:
        return self._apply(other, arith.shrui)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Scalar | int | float) -> Scalar:
        return self.like(other) - self

    def _compare(self, other: Scalar | int | float, integer: Any, floating: Any) -> Scalar:
        other = self.like(other)
        if self._is_float():
            return Scalar(arith.cmpf(floating, self.value, other.value))
        return Scalar(arith.cmpi(integer, self.value, other.value))

    def __lt__(self, other: Scalar | int | float) -> Scalar:
        return self._compare(other, arith.CmpIPredicate.ult, arith.CmpFPredicate.OLT)

    def __ge__(self, other: Scalar | int | float) -> Scalar:
        return self._compare(other, arith.CmpIPredicate.uge, arith.CmpFPredicate.OGE)

    def equals(self, other: Scalar | int) -> Scalar:
        return self._compare(other, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)

    def differs(self, other: Scalar | int) -> Scalar:
        return self._compare(other, arith.CmpIPredicate.ne, arith.CmpFPredicate.UNE)

    def wide(self) -> Scalar:
        """An unsigned int32 as int64."""
        return Scalar(arith.extui(i64(), self.value))

    def float(self) -> Scalar:
        """An int32's bits as float32."""
        return Scalar(arith.bitcast(f32(), self.value))

    def bits(self) -> Scalar:
        """A float32's bits as int32."""
        return Scalar(arith.bitcast(i32(), self.value))


def constant(value: int | float, of: ir.Type | None = None) -> Scalar:
    """An int32, or a number of another type."""
    return Scalar(_utils.c(value, of or i32()))


def minimum(a: Scalar, b: Scalar | int) -> Scalar:
    """The lesser of two unsigned integers."""
    return Scalar(arith.minui(a.value, a.like(b).value))


def maximum(a: Scalar, b: Scalar | float) -> Scalar:
    """The greater of two float32s."""
    return Scalar(arith.maxnumf(a.value, a.like(b).value))


def maximum_unsigned(a: Scalar, b: Scalar) -> Scalar:
    """The greater of two unsigned integers."""
    return Scalar(arith.maxui(a.value, b.value))


def select(condition: Scalar, a: Scalar, b: Scalar | int | float) -> Scalar:
    """a where the condition holds, otherwise b."""
    return Scalar(arith.select(condition.value, a.value, a.like(b).value))


@contextlib.contextmanager
def when(condition: Scalar | None) -> Iterator[None]:
    """Code that runs only in threads where the condition holds, or in all without one."""
    if condition is None:
        yield
        return
    op = _scf.IfOp(condition.value)
    with ir.InsertionPoint(op.then_block):
        yield
        scf.yield_([])


def either(condition: Scalar, body: Callable[[], Sequence[Scalar]], otherwise: Sequence[Scalar]) -> list[Scalar]:
    """What `body` gives in threads where the condition holds, and `otherwise` in the others."""
    op = _scf.IfOp(condition.value, [x.type for x in otherwise], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_([x.value for x in body()])
    with ir.InsertionPoint(op.else_block):
        scf.yield_([x.value for x in otherwise])
    return [Scalar(r) for r in op.results]


def loop(
    start: Scalar | int, stop: Scalar | int, step: Scalar | int, carry: Sequence[Scalar],
    body: Callable[..., Sequence[Scalar]], rolled: bool = False,
) -> list[Scalar]:  # fmt: skip
    """`for i in range(start, stop, step): carry = body(i, *carry)`; gives the last carry back.

    `rolled` loops are not unrolled by ptxas, nor by LLVM, if their number of turns is not known to it (`kept`).
    """
    bounds = [x.value if isinstance(x, Scalar) else constant(x).value for x in (start, stop, step)]
    op = _scf.ForOp(*bounds, [c.value for c in carry])
    with ir.InsertionPoint(op.body):
        if rolled:
            ptx('.pragma "nounroll";')
        results = body(Scalar(op.induction_variable), *map(Scalar, op.inner_iter_args))
        scf.yield_([r.value for r in results])
    return [Scalar(r) for r in op.results]


def repeat_until(body: Callable[[], tuple[Scalar, Sequence[Scalar]]], types: Sequence[ir.Type]) -> list[Scalar]:
    """Run `body`, which gives (done, values), until it is done; gives the last values back."""
    op = _scf.WhileOp(list(types), [])
    before = op.before.blocks.append()
    with ir.InsertionPoint(before):
        done, values = body()
        again = arith.xori(done.value, _utils.c(1, ir.IntegerType.get_signless(1)))
        scf.condition(again, [v.value for v in values])
    after = op.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_([])
    return [Scalar(r) for r in op.results]


def ptx(code: str, *args: Scalar, results: Sequence[ir.Type] = (), convergent: bool = False) -> list[Scalar]:
    """Inline PTX with operands `$0`…: the results first, then the arguments.

    `convergent` instructions are those that a warp's threads execute together.
    """
    values: Any = _utils.inline_ptx(
        code, *(a.value for a in args), result_types=list(results) or None, has_side_effects=True,
        convergent=convergent,
    )  # fmt: skip
    return [Scalar(v) for v in values or ()]


def thread_index() -> Scalar:
    return Scalar(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)))


def kept(x: Scalar) -> Scalar:
    """x in a register: the compiler would rather compute it again wherever it is used."""
    return ptx("shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", x, results=[i32()], convergent=True)[0]


def first_of_warp(x: Scalar) -> Scalar:
    """x of the warp's first thread: the compiler knows then that all threads have the same."""
    return ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", x, results=[i32()], convergent=True)[0]


def block_index() -> Scalar:
    return Scalar(arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)))


def shared_address(ref: ir.Value) -> Scalar:
    """The address of a reference to shared memory."""
    return Scalar(llvm.ptrtoint(i32(), _utils.memref_ptr(ref)))


def global_address(ref: ir.Value) -> Scalar:
    """The address of a reference to global memory."""
    return Scalar(llvm.ptrtoint(i64(), _utils.memref_ptr(ref)))


# Memory. `words` are 32-bit, one, two or four; addresses are multiples of the size of the access.


def _vector(words: int) -> tuple[str, str]:
    names = ", ".join(f"${i}" for i in range(words))
    return ("", names) if words == 1 else (f".v{words}", f"{{{names}}}")


def load_shared(address: Scalar, words: int = 1, offset: int = 0) -> list[Scalar]:
    vector, names = _vector(words)
    return ptx(f"ld.shared{vector}.b32 {names}, [${words} + {offset}];", address, results=[i32()] * words)


def load_shared_half(address: Scalar, offset: int = 0) -> Scalar:
    """A float16 as float32."""
    code = f"{{ .reg .b16 h; ld.shared.b16 h, [$1 + {offset}]; cvt.f32.f16 $0, h; }}"
    return ptx(code, address, results=[f32()])[0]


def store_shared(address: Scalar, *words: Scalar, offset: int = 0) -> None:
    vector, names = _vector(len(words))
    words = tuple(w.bits() if w._is_float() else w for w in words)
    ptx(f"st.shared{vector}.b32 [${len(words)} + {offset}], {names};", *words, address)


def _load(kind: str, address: Scalar, words: int, offset: int, where: Scalar | None) -> list[Scalar]:
    vector, names = _vector(words)
    code = f"ld{kind}{vector}.b32 {names}, [${words} + {offset}];"
    if where is None:
        return ptx(code, address, results=[i32()] * words)
    zeros = "".join(f" @!${words + 1} mov.b32 ${i}, 0;" for i in range(words))
    return ptx(f"@${words + 1} {code}{zeros}", address, where, results=[i32()] * words)


def load_global(
    address: Scalar, words: int = 1, offset: int = 0, how: str = "", where: Scalar | None = None
) -> list[Scalar]:
    """`how` is a PTX qualifier, e.g. ".relaxed.gpu". Zeros where not `where`."""
    return _load(f"{how}.global", address, words, offset, where)


def load_constant(
    address: Scalar, words: int = 1, offset: int = 0, how: str = "", where: Scalar | None = None
) -> list[Scalar]:
    """Global memory that nobody writes meanwhile. `how` is e.g. ".L1::no_allocate". Zeros where not `where`."""
    return _load(f".global.nc{how}", address, words, offset, where)


def load_constant_half(address: Scalar, offset: int, where: Scalar | None) -> Scalar:
    """As `load_constant`, 16 bits as the low half of a word."""
    code = f"ld.global.nc.b16 h, [$1 + {offset}]; cvt.u32.u16 $0, h; }}"
    if where is None:
        return ptx("{ .reg .b16 h; " + code, address, results=[i32()])[0]
    return ptx("{ .reg .b16 h; mov.b16 h, 0; @$2 " + code, address, where, results=[i32()])[0]


def store_global(address: Scalar, *words: Scalar, offset: int = 0, how: str = "") -> None:
    vector, names = _vector(len(words))
    words = tuple(w.bits() if w._is_float() else w for w in words)
    ptx(f"st{how}.global{vector}.b32 [${len(words)} + {offset}], {names};", *words, address)


def store_global_half(address: Scalar, word: Scalar) -> None:
    """Store the low half of a word."""
    ptx("{ .reg .b16 low, high; mov.b32 {low, high}, $0; st.global.b16 [$1], low; }", word, address)


# Barriers.


def synchronize(name: int, threads: int) -> None:
    """Barrier number `name` among `threads` threads of the block."""
    ptx(f"bar.sync {name}, {threads};", convergent=True)


def synchronize_warp() -> None:
    """Barrier among the 32 threads of a warp."""
    ptx("bar.warp.sync -1;", convergent=True)


def arrive_in_cluster(order: str) -> None:
    """Tell the cluster's blocks that this one is here; `order` is "relaxed", or "release" for what it wrote too."""
    ptx(f"barrier.cluster.arrive.{order}.aligned;", convergent=True)


def wait_for_cluster() -> None:
    """Wait until all of the cluster's blocks have arrived."""
    ptx("barrier.cluster.wait.acquire.aligned;", convergent=True)


def address_in_cluster(address: Scalar, rank: Scalar | int) -> Scalar:
    """This place of shared memory in the cluster's block number `rank`."""
    code = "mapa.shared::cluster.u32 $0, $1, "
    if isinstance(rank, int):
        return ptx(f"{code}{rank};", address, results=[i32()])[0]
    return ptx(f"{code}$2;", address, rank, results=[i32()])[0]


def set_registers(direction: str, number: int) -> None:
    """Give registers back ("dec") or take them ("inc"); all of a warpgroup together."""
    ptx(f"setmaxnreg.{direction}.sync.aligned.u32 {number};", convergent=True)


def init_barrier(address: Scalar, arrivals: int) -> None:
    ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", address)


def arrive(address: Scalar, times: int = 1) -> None:
    ptx(f"mbarrier.arrive.shared::cta.b64 _, [$0], {times};", address)


def arrive_expecting(address: Scalar, bytes_: Scalar) -> None:
    ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", address, bytes_)


def wait(address: Scalar, parity: Scalar) -> None:
    """Wait until the barrier's phase of this parity has completed."""
    ptx(
        "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }",
        address,
        parity,
    )


def copy_to_shared(target: Scalar, source: Scalar, bytes_: Scalar, barrier: Scalar, once: bool = True) -> None:
    """Start a bulk copy from global memory, whose bytes `barrier` counts; `once`: nobody will read it again soon."""
    if not once:
        copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
        ptx(copy, target, source, bytes_, barrier)
        return
    policy = "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    ptx(f"{{ .reg .b64 policy; {policy} {copy} [$0], [$1], $2, [$3], policy; }}", target, source, bytes_, barrier)


def prefetch(source: Scalar, bytes_: int) -> None:
    """Start bringing global memory, a multiple of 16 bytes from an address that is one too, into L2."""
    ptx(f"cp.async.bulk.prefetch.L2.global [$0], {bytes_};", source)


def start_copy(target: Scalar, source: Scalar) -> None:
    """Start copying 16 bytes from global to shared memory."""
    ptx("cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", target, source)


def arrive_after_copies(address: Scalar) -> None:
    """Arrive at a barrier, which counts each thread, when the copies that this thread has started are done."""
    ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", address)


# Arithmetic.


def permute_bytes(a: Scalar, b: Scalar | int, selector: int) -> Scalar:
    return ptx(f"prmt.b32 $0, $1, $2, {selector};", a, a.like(b), results=[i32()])[0]


def pack_halves(low: Scalar, high: Scalar) -> Scalar:
    """Two float32s as float16s in one word, the first in the low half."""
    return ptx("cvt.rn.f16x2.f32 $0, $2, $1;", low, high, results=[i32()])[0]


def unpack_halves(word: Scalar) -> list[Scalar]:
    """The low and the high float16 of a word as float32."""
    code = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    return ptx(code, word, results=[f32()] * 2)


def unpack_bf16(word: Scalar) -> list[Scalar]:
    """The low and the high bfloat16 of a word as float32."""
    return [(word << 16).float(), (word & -0x10000).float()]


def int8_as_bf16(word: Scalar) -> Scalar:
    """Two int8, in the low byte of each half, as bfloat16, exactly.

    With 7 bits of mantissa, 0x4300 + i is 128 + i for i < 128, and 0x4380 is 256: take off 128, or 256 if negative.
    """
    code = (
        "{ .reg .b32 low, sign; lop3.b32 low, $1, 0x007f007f, 0x43004300, 0xea; "
        "lop3.b32 sign, $1, 0x00800080, 0x43004300, 0xea; sub.rn.bf16x2 $0, low, sign; }"
    )
    return ptx(code, word, results=[i32()])[0]


def int8_as_f16(word: Scalar) -> list[Scalar]:
    """Four int8 as float16, exactly, in two words.

    With 10 bits of mantissa, 0x6400 + i is 1024 + i: the bytes plus 128 are put below 0x64, and 1152 is taken off.
    """
    code = "{ .reg .b32 bias; mov.b32 bias, 0x64806480; sub.rn.f16x2 $0, $1, bias; }"
    halves = [permute_bytes(word ^ -0x7F7F7F80, 0x64646464, selector) for selector in (0x4140, 0x4342)]
    return [ptx(code, pair, results=[i32()])[0] for pair in halves]


def fma(a: Scalar, b: Scalar, c: Scalar) -> Scalar:
    return ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, results=[f32()])[0]


def round_to_bits(x: Scalar, bits: int) -> Scalar:
    """x rounded to so many significant bits, by Veltkamp's splitting; for |x| < 2^(103 + bits)."""
    code = "{ .reg .f32 low; sub.rn.f32 low, $1, $2; sub.rn.f32 $0, $1, low; }"  # not to be contracted
    return ptx(code, x * float((1 << 24 - bits) + 1), x, results=[f32()])[0]


def rsqrt(x: Scalar) -> Scalar:
    return ptx("rsqrt.approx.f32 $0, $1;", x, results=[f32()])[0]


def exp2(x: Scalar) -> Scalar:
    return ptx("ex2.approx.ftz.f32 $0, $1;", x, results=[f32()])[0]


def reciprocal(x: Scalar) -> Scalar:
    return ptx("rcp.approx.f32 $0, $1;", x, results=[f32()])[0]


def sigmoid(x: Scalar) -> Scalar:
    return reciprocal(exp2(x * -math.log2(math.e)) + 1.0)


def total(parts: Sequence[Scalar]) -> Scalar:
    """The sum, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + list(parts[len(parts) & ~1 :])
    return parts[0]


def log2(x: Scalar) -> Scalar:
    return ptx("lg2.approx.f32 $0, $1;", x, results=[f32()])[0]


def pack_bf16(low: Scalar, high: Scalar) -> Scalar:
    """Two float32s as bfloat16s in one word, the first in the low half."""
    return ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, results=[i32()])[0]


def round_bf16(x: Scalar) -> Scalar:
    """The bits of a float32 rounded to a bfloat16, which are the upper half."""
    return ptx("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", x, results=[i32()])[0]


def shuffle_xor(x: Scalar, distance: int) -> Scalar:
    """The value of the thread whose lane differs from this one's by `distance`; all of the warp take part."""
    code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    bits = ptx(code, x.bits() if x._is_float() else x, results=[i32()], convergent=True)[0]
    return bits.float() if x._is_float() else bits


def maximum_of_warp(x: Scalar) -> Scalar:
    """The greatest of the warp's unsigned int32s."""
    return ptx("redux.sync.max.u32 $0, $1, -1;", x, results=[i32()], convergent=True)[0]


def mma_int8(a: Sequence[Scalar], b: Sequence[Scalar], c: Sequence[Scalar]) -> list[Scalar]:
    """c + a b on the tensor cores: a [16, 32] and b [32, 8] int8, c [16, 8] int32, in the fragments of m16n8k32."""
    code = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return ptx(code, *a, *b, *c, results=[i32()] * 4, convergent=True)


def mma(a: Sequence[Scalar], b: Sequence[Scalar], c: Sequence[Scalar], kind: str) -> list[Scalar]:
    """c + a b on the tensor cores: a [16, 16] and b [16, 8] of `kind` ("f16" or "bf16"), c [16, 8] float32.

    In the fragments of PTX's mma.m16n8k16.
    """
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return ptx(code, *a, *b, *c, results=[f32()] * 4, convergent=True)
