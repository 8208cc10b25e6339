"""Products of up to 8 rows with block-quantised weights, each of whose bytes is read once.

    y[m, o] = epilogue(sum_b scales[o, b] * sum_i x[m, 32 b + i] values[o, 32 b + i])

x may be normalised on the way in (RMSNorm); the epilogue adds a bias and a residual, or joins pairs of rows of the
weights: silu(gate) * up, or a rotary position embedding.

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
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.tuning import choose

TILE = 8  # rows of weights
SMS = 132
MAX_ROWS = 8
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
    blocks, tiles = width // BLOCK, out // TILE
    chunk = next(c for c in (4, 6, 2, 5, 3, 1) if blocks % c == 0)
    chunks = blocks // chunk
    alone = joined == 1 and tiles > 14 * SMS
    if not alone and (out * width < 2**23 or chunks < 16):
        warps = split = 8 if chunks > 4 else 4
        depth = max(1, min(24 // (chunk * joined), -(-chunks // split)))
        return Config(warps, split, joined, chunk, depth, resident=2 if tiles // joined > 2 * SMS else 0)
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


def choose_config(op: str, rows: jax.Array, values: jax.Array, joined: int) -> Config:
    """The tuned or else the heuristic's configuration for rows [M, in] and weights [out, in]."""
    out, width = values.shape
    space = functools.partial(search_space, out, width, joined)
    return choose(op, f"M={rows.shape[0]} out={out} in={width}", heuristic(out, width, joined), space)


def matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    out_dtype: jnp.dtype,
    config: Config,
) -> jax.Array:
    """x [M, in] bf16 times int8 blocks [out, in] plus bias float32 [out] and residual bf16 [M, out] -> [M, out]."""
    out = values.shape[0]

    def rows(tile: _Int) -> list[_Int]:
        return [tile * TILE]

    def epilogue(m: _Int, pair: _Int, rows: list[_Int], refs: _Refs, where: _Where) -> _Finish:
        at, added = m * out + rows[0] + pair, []
        if bias is not None:
            added.append(_load_pair(refs["bias"], rows[0] + pair, bias.dtype, where))
        if residual is not None:
            added.append(_load_pair(refs["residual"], at, residual.dtype, where))

        def finish(sums: list[_Pair]) -> None:
            _store_pair(refs["out"], at, out_dtype, *functools.reduce(_add, added, sums[0]))

        return finish

    inputs = {"bias": bias, "residual": residual}
    outs = {"out": (out, out_dtype)}
    work = _Work(out // TILE, 1, rows, epilogue)
    (y,) = _call("quant_matmul", x, values, scales, None, inputs, outs, work, config)
    return y


def gate_up(
    x: jax.Array,
    norm: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    eps: float,
    config: Config,
) -> jax.Array:
    """silu(h Wg^T) * (h Wu^T), h = rms_norm(x): x [M, in] bf16, int8 blocks [2F, in] of Wg, then Wu -> [M, F] bf16."""
    width = values.shape[0] // 2

    def rows(tile: _Int) -> list[_Int]:
        return [tile * TILE, tile * TILE + width]

    def epilogue(m: _Int, pair: _Int, rows: list[_Int], refs: _Refs, where: _Where) -> _Finish:
        del where

        def finish(sums: list[_Pair]) -> None:
            results = [arith.mulf(_silu(gate), up) for gate, up in zip(*sums, strict=True)]
            _store_pair(refs["out"], m * width + rows[0] + pair, x.dtype, *results)

        return finish

    work = _Work(width // TILE, 2, rows, epilogue)
    (y,) = _call("gate_up", x, values, scales, (norm, eps), {}, {"out": (width, x.dtype)}, work, config)
    return y


def qkv_rope(
    x: jax.Array,
    norm: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
    config: Config,
    store: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As the op, for x [M, D] bf16 and cos and sin [M, H / 2] -> q [M, N H], k and v [M, K H] bf16.

    With `store`, keys and values [B, K, S, H] bf16 and slots int32 [B, T], M = B T: k and v are written to the slots
    (to none where the slot is not below S), and keys and values as they are then take the place of k and v; in the
    same memory where XLA can tell that nobody needs the old ones.
    """
    heads = n_heads + 2 * n_kv_heads
    width = values.shape[0] // heads
    half = width // 2
    tiles = half // TILE  # pairs of tiles in a head
    if cos.shape[-1] != half or width % (2 * TILE):
        raise NotImplementedError(f"heads of {width} of which {2 * cos.shape[-1]} are rotated")

    def rows(tile: _Int) -> list[_Int]:
        first = tile // tiles * width + tile % tiles * TILE
        return [first, first + half]

    def epilogue(m: _Int, pair: _Int, rows: list[_Int], refs: _Refs, where: _Where) -> _Finish:
        head, column = rows[0] // width, rows[0] % width + pair
        is_query, is_key = head < n_heads, head < n_heads + n_kv_heads  # or a query
        biases = [_load_pair(refs["bias"], row + pair, bias.dtype, where) for row in rows] if bias is not None else []
        cosines, sines = (_load_pair(refs[name], m * half + column, jnp.float32, where) for name in ("cos", "sin"))
        slots = _load(_at(refs["slots"], m * 4), 1, kind="global", where=where) if store is not None else []

        def finish(sums: list[_Pair]) -> None:
            if biases:
                sums = [_add(s, b) for s, b in zip(sums, biases, strict=True)]
            turned: list[list[ir.Value]] = [[], []]
            for a, b, cosine, sine in zip(*sums, cosines, sines, strict=True):
                c, s = arith.select(is_key, cosine, _f32(1.0)), arith.select(is_key, sine, _f32(0.0))
                turned[0].append(_fma(a, c, arith.negf(arith.mulf(b, s))))
                turned[1].append(_fma(b, c, arith.mulf(a, s)))
            target = arith.select(is_query, refs["q"], arith.select(is_key, refs["k"], refs["v"]))
            own = head - _select(is_query, 0, _select(is_key, n_heads, n_heads + n_kv_heads))
            place, kept = m * (n_kv_heads * width) + own * width, None
            if store is not None:
                n_slots, slot = store[0].shape[2], _Int(slots[0])
                place = ((m // store[2].shape[1] * n_kv_heads + own) * n_slots + slot) * width
                kept = arith.ori(is_query, slot < n_slots)
            place = _select(is_query, m * (n_heads * width) + own * width, place) + column

            def write() -> None:
                for at, results in zip((place, place + half), turned, strict=True):
                    _store_pair(target, at, x.dtype, *results)

            _only(kept, write)

        return finish

    inputs: dict[str, Any] = {"bias": bias, "cos": cos.astype(jnp.float32), "sin": sin.astype(jnp.float32)}
    outs = {"q": (n_heads * width, x.dtype)}
    work = _Work(heads * tiles, 2, rows, epilogue)
    if store is None:
        outs |= {"k": (n_kv_heads * width, x.dtype), "v": (n_kv_heads * width, x.dtype)}
        q, k, v = _call("qkv_rope", x, values, scales, (norm, eps), inputs, outs, work, config)
        return q, k, v
    keys, stored_values = (jax.new_ref(array) for array in store[:2])
    inputs |= {"k": keys, "v": stored_values, "slots": store[2]}
    (q,) = _call("qkv_rope_store", x, values, scales, (norm, eps), inputs, outs, work, config)
    return q, keys[...], stored_values[...]


@dataclass(frozen=True)
class _Work:
    """What a product is made of: tiles of weights, or pairs of tiles that are joined, and what becomes of their sums.

    Attributes:
      count: of tiles, or pairs.
      joined: 1, or 2 for pairs.
      rows: number of a tile or pair -> the first row of each tile.
      epilogue: (row of x, lane's even column in a tile, first rows, pointers, condition) -> function of each tile's
        pair of sums that stores the result; called before the sums are known, it asks for what it will need.
    """

    count: int
    joined: int
    rows: Callable[[_Int], list[_Int]]
    epilogue: Callable[[_Int, _Int, list[_Int], _Refs, _Where], _Finish]


# The kernel, written in the instructions of one thread.


@dataclass(frozen=True)
class _Int:
    """A 32-bit integer of the kernel, with Python's operators; division is unsigned."""

    value: ir.Value

    def __add__(self, other: _Int | int) -> _Int:
        return _Int(arith.addi(self.value, _i32(other)))

    def __sub__(self, other: _Int | int) -> _Int:
        return _Int(arith.subi(self.value, _i32(other)))

    def __mul__(self, other: _Int | int) -> _Int:
        return _Int(arith.muli(self.value, _i32(other)))

    def __floordiv__(self, other: _Int | int) -> _Int:
        return _Int(arith.divui(self.value, _i32(other)))

    def __mod__(self, other: _Int | int) -> _Int:
        return _Int(arith.remui(self.value, _i32(other)))

    def __lt__(self, other: _Int | int) -> Any:
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, _i32(other))

    def equals(self, other: _Int | int) -> Any:
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, _i32(other))


_inline_ptx: Any = getattr(utils, "inline_ptx", None)  # since jax 0.11
_Pair = tuple[ir.Value, ir.Value]
_Refs = dict[str, Any]  # pointers
_Where = ir.Value | None  # a condition, if there is one
_Finish = Callable[[list[_Pair]], None]


def _i32(x: _Int | int) -> ir.Value:
    return x.value if isinstance(x, _Int) else utils.c(x, ir.IntegerType.get_signless(32))


def _f32(x: float) -> ir.Value:
    return utils.c(x, ir.F32Type.get())


def _select(condition: ir.Value, x: _Int | int, y: _Int | int) -> _Int:
    return _Int(arith.select(condition, _i32(x), _i32(y)))


def _asm(ptx: str, kinds: str, *args: ir.Value, volatile: bool = False) -> list[ir.Value]:
    """Inline PTX with a result for each letter of `kinds`: r for an integer, f for a float."""
    types = {"r": ir.IntegerType.get_signless(32), "f": ir.F32Type.get()}
    if not kinds:
        _inline_ptx(ptx, *args, has_side_effects=True)
        return []
    return list(_inline_ptx(ptx, *args, result_types=[types[k] for k in kinds], has_side_effects=volatile))


def _barrier() -> None:
    _inline_ptx("bar.sync 0;", has_side_effects=True, convergent=True)


def _only(where: _Where, emit: Callable[[], None]) -> None:
    """Emit under a condition, if there is one."""
    if where is None:
        emit()
        return
    with utils.when(where):
        emit()


def _and(a: _Where, b: _Where) -> _Where:
    if a is None or b is None:
        return b if a is None else a
    return arith.andi(a, b)


def _fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", "f", a, b, c)[0]


def _silu(x: ir.Value) -> ir.Value:
    (power,) = _asm("ex2.approx.f32 $0, $1;", "f", arith.mulf(x, _f32(-math.log2(math.e))))
    return arith.divf(x, arith.addf(power, _f32(1.0)))


def _add(a: _Pair, b: _Pair) -> _Pair:
    return arith.addf(a[0], b[0]), arith.addf(a[1], b[1])


def _at(pointer: ir.Value, offset: _Int | int) -> ir.Value:
    """A global pointer, `offset` bytes on."""
    return arith.addi(pointer, arith.extsi(pointer.type, _i32(offset)))


def _load(
    address: ir.Value, words: int, offset: int = 0, kind: str = "global.nc", where: _Where = None
) -> list[ir.Value]:
    """1, 2 or 4 words at `address` plus `offset` bytes; zeros where not `where`."""
    names = [f"${i}" for i in range(words)]
    several = f".v{words}.b32 {{{','.join(names)}}}" if words > 1 else ".b32 $0"
    ptx, args = f"ld.{kind}{several}, [${words}+{offset}];", [address]
    if where is not None:
        zeros = "".join(f" @!${words + 1} mov.b32 {name}, 0;" for name in names)
        ptx, args = f"@${words + 1} {ptx}{zeros}", [address, where]
    return _asm(ptx, "r" * words, *args, volatile=True)


def _load_half(address: ir.Value, offset: int, where: _Where) -> list[ir.Value]:
    """A 16-bit word as the low half of a word; zero where not `where`."""
    ptx, args = f"{{.reg .b16 h; ld.global.nc.b16 h, [$1+{offset}]; cvt.u32.u16 $0, h;}}", [address]
    if where is not None:
        ptx = f"{{.reg .b16 h; mov.b16 h, 0; @$2 ld.global.nc.b16 h, [$1+{offset}]; cvt.u32.u16 $0, h;}}"
        args = [address, where]
    return _asm(ptx, "r", *args, volatile=True)


def _store_shared(address: ir.Value, words: Sequence[ir.Value], offset: int = 0) -> None:
    names = ",".join(f"${i + 1}" for i in range(len(words)))
    _asm(f"st.shared.v{len(words)}.b32 [$0+{offset}], {{{names}}};", "", address, *words)


def _as_float(word: ir.Value) -> ir.Value:
    return arith.bitcast(ir.F32Type.get(), word)


def _as_word(x: ir.Value) -> ir.Value:
    return arith.bitcast(ir.IntegerType.get_signless(32), x)


def _halves(word: ir.Value) -> _Pair:
    """The two bfloat16 of a word as float32."""
    low = _as_float(arith.shli(word, _i32(16)))
    return low, _as_float(arith.andi(word, _i32(-0x10000)))


def _pack(low: ir.Value, high: ir.Value) -> ir.Value:
    return _asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "r", high, low)[0]


def _load_pair(pointer: ir.Value, index: _Int, dtype: Any, where: _Where) -> _Pair:
    """Elements `index`, even, and the next one of an array of bfloat16 or float32, as float32; zeros if not `where`."""
    if jnp.dtype(dtype).itemsize == 2:
        return _halves(_load(_at(pointer, index * 2), 1, kind="global", where=where)[0])
    first, second = _load(_at(pointer, index * 4), 2, kind="global", where=where)
    return _as_float(first), _as_float(second)


def _store_pair(pointer: ir.Value, index: _Int, dtype: Any, first: ir.Value, second: ir.Value) -> None:
    """The opposite of `_load_pair`."""
    if jnp.dtype(dtype).itemsize == 2:
        _asm("st.global.b32 [$0], $1;", "", _at(pointer, index * 2), _pack(first, second))
    else:
        _asm("st.global.v2.f32 [$0], {$1,$2};", "", _at(pointer, index * 4), first, second)


def _unpack(word: ir.Value, base: ir.Value) -> _Pair:
    """Four int8 as two pairs of bfloat16, exactly: bytes 0 and 2, and bytes 1 and 3. `base` is two times 0x4300."""

    def pair(bytes_: ir.Value) -> ir.Value:
        # 128 as bfloat16 is 0x4300: its last bit counts 1, and its exponent's last bit another 128.
        low = _asm("lop3.b32 $0, $1, 0x007f007f, $2, 0xea;", "r", bytes_, base)  # (bytes & mask) | base
        sign = _asm("lop3.b32 $0, $1, 0x00800080, $2, 0xea;", "r", bytes_, base)
        return _asm("sub.rn.bf16x2 $0, $1, $2;", "r", *low, *sign)[0]

    return pair(word), pair(arith.shrui(word, _i32(8)))


def _scale(word: ir.Value, half: int) -> ir.Value:
    """The low or high float16 of a word as float32."""
    return _asm(f"{{.reg .b16 h<2>; mov.b32 {{h0,h1}}, $1; cvt.f32.f16 $0, h{half};}}", "f", word)[0]


def _multiply_tile(a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sequence[ir.Value]) -> list[ir.Value]:
    """c + a b on a tensor core: a [16, 16], b [16, 8], c [16, 8]."""
    names = ["{" + ",".join(f"${i + j}" for j in range(n)) + "}" for i, n in ((0, 4), (4, 4), (8, 2), (10, 4))]
    return _asm(f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {', '.join(names)};", "ffff", *a, *b, *c)


def _call(
    name: str,
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    norm: tuple[jax.Array, float] | None,
    extra: dict[str, Any],
    outs: dict[str, tuple[int, Any]],
    work: _Work,
    config: Config,
) -> Sequence[jax.Array]:
    """Build and run the kernel.

    Args:
      norm: scale float32 [in] and epsilon of an RMSNorm of x.
      extra: more arrays or references for the epilogue, by name; None if there is none.
      outs: the results' width and dtype, by name.
    """
    m, width = x.shape
    if x.dtype != jnp.bfloat16 or scales.dtype != jnp.float16:
        raise NotImplementedError(f"rows of {x.dtype} and scales of {scales.dtype}")
    if not 1 <= m <= MAX_ROWS:
        raise NotImplementedError(f"{m} rows; 1 to {MAX_ROWS}")
    if values.shape[0] % (TILE * work.joined) or width % (BLOCK * config.chunk) or values.size >= 2**31:
        raise NotImplementedError(f"weights {values.shape} in chunks of {config.chunk} blocks")
    inputs = {"x": x, "values": values, "scales": scales, "norm": norm[0].astype(jnp.float32) if norm else None}
    inputs |= extra
    given = {key: array for key, array in inputs.items() if array is not None}
    units = -(-work.count // (config.tiles // work.joined))
    rounds = -(-units // (config.warps // config.split))
    ctas = min(rounds, SMS * config.resident) if config.resident else rounds
    plan = _Plan(m, width, units, rounds, ctas, config, work)
    if plan.x_bytes + plan.sums_bytes > SHARED_BYTES:
        raise NotImplementedError(f"{m} rows of {width}: more than shared memory holds")

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType(),) * len(refs)))
        def emit(ctx: Any, cta: Any, *refs: Any) -> None:
            del ctx
            i64, i32 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32)
            names = [*given, *outs]
            pointers: _Refs = {
                key: llvm.ptrtoint(i64, utils.memref_ptr(ref)) for key, ref in zip(names, refs, strict=False)
            }
            x_smem, sums_smem = (llvm.ptrtoint(i32, utils.memref_ptr(ref)) for ref in refs[len(names) :])
            emitter = _Emitter(plan, pointers, x_smem, sums_smem, norm[1] if norm else 0.0)
            emitter.run(_Int(cta.registers.item()))

        emit(lax.axis_index("cta"), *refs)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((m, columns), dtype) for columns, dtype in outs.values()],
        scratch_types=[
            plgpu.SMEM((plan.x_bytes // 4,), jnp.int32),
            plgpu.SMEM((max(plan.sums_bytes // 4, 4),), jnp.float32),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=config.warps // 4,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return kernel(*given.values())


@dataclass(frozen=True)
class _Plan:
    """Static numbers of a kernel: rows of x and their width, units, rounds of a unit a group, CTAs."""

    m: int
    width: int
    units: int
    rounds: int
    ctas: int
    config: Config
    work: _Work

    @property
    def groups(self) -> int:
        return self.config.warps // self.config.split

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
    def buffers(self) -> int:
        return 1 if self.rounds == self.ctas else 2

    @property
    def sums_bytes(self) -> int:
        if self.config.split == 1:
            return 0
        return self.buffers * self.config.tiles * self.config.warps * 32 * 8


class _Emitter:
    """Writes the kernel's instructions."""

    def __init__(
        self,
        plan: _Plan,
        pointers: _Refs,
        x_smem: ir.Value,
        sums_smem: ir.Value,
        eps: float,
    ) -> None:
        self.plan, self.config, self.work, self.pointers = plan, plan.config, plan.work, pointers
        self.x_smem, self.sums_smem, self.eps = _Int(x_smem), _Int(sums_smem), eps
        thread = _Int(utils.thread_idx())
        self.thread, self.lane = thread, thread % 32
        self.warp = _Int(utils.warp_idx())
        self.member, self.group = self.warp % self.config.split, self.warp // self.config.split
        self.row, self.quarter = self.lane // 4, self.lane % 4  # of a tile or of 8 rows of x; of a block
        # From a shuffle, so that it stays in a register: an instruction takes one constant only.
        (self.base,) = _asm("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "r", _i32(0x43004300), volatile=True)
        blocks = plan.width // BLOCK
        self.scale_blocks = math.gcd(math.gcd(blocks, self.config.chunk), 4)  # that one load can take

    def run(self, cta: _Int) -> None:
        plan, config = self.plan, self.config
        buffers = [self.fetch(cta, 0, slot, None) for slot in range(config.depth)]
        finishes = self.begin(cta) if plan.rounds == plan.ctas else []
        self.stage()
        _barrier()
        # Rows that are not there repeat the last one: what they give is dropped.
        row = _select(self.row < plan.m - 1, self.row, plan.m - 1)
        place = self.x_smem + row * (2 * BLOCK) + self.quarter * 16
        if plan.rounds == plan.ctas:
            self.round(cta, None, buffers, place, finishes)
            return
        count = (_Int(_i32(plan.rounds + plan.ctas - 1)) - cta) // plan.ctas

        @utils.fori(count.value, buffers)
        def _rounds(i: ir.Value, buffers: list[list[ir.Value]]) -> list[list[ir.Value]]:
            round_ = cta + _Int(i) * plan.ctas
            return self.round(round_, _Int(i), buffers, place, self.begin(round_))

    def stage(self) -> None:
        """Bring x to shared memory, normalised where asked, each lane's operands of a product in consecutive words.

        [block, row, quarter of a block, 4 words]. The lane of a row and a quarter multiplies by one word of each pair
        of words, 0 or 1 and 2 or 3, at a time: its other products go to rows 8 to 15 and are dropped, or the other way
        round.
        """
        plan = self.plan
        vectors = plan.width // 8  # a row's, of 16 bytes

        def put(row: _Int, vector: _Int, words: Sequence[ir.Value]) -> None:
            block, quarter = vector // 4 * plan.block_bytes, vector % 4 * 16
            swapped = []
            for i in (0, 2):
                for order in (0x5410, 0x7632):
                    swapped += _asm(f"prmt.b32 $0, $1, $2, {order:#x};", "r", words[i], words[i + 1])
            _store_shared((self.x_smem + block + row * (2 * BLOCK) + quarter).value, swapped)

        if "norm" not in self.pointers:
            threads = 32 * self.config.warps
            total = plan.m * vectors
            turns = -(-total // threads)
            for first in range(0, turns, 8):
                batch = []
                for turn in range(first, min(first + 8, turns)):
                    index = self.thread + turn * threads
                    where = index < total if (turn + 1) * threads > total else None
                    words = _load(_at(self.pointers["x"], index * 16), 4, kind="global", where=where)
                    batch.append((index, where, words))
                for index, where, words in batch:
                    _only(where, functools.partial(put, index // vectors, index % vectors, words))
            return

        # A row is normalised by one warp, or each part of it by one of several that all compute its mean square.
        sharers = max(1, self.config.warps // plan.m)
        turns = -(-vectors // 32)
        for first in range(0, plan.m, self.config.warps):
            row, share = (
                (self.warp + first, _Int(_i32(0))) if sharers == 1 else (self.warp % plan.m, self.warp // plan.m)
            )
            active = share < sharers if sharers > 1 else row < plan.m
            _only(active, functools.partial(self.normalise, row, share, sharers, turns, vectors, put))

    def normalise(
        self, row: _Int, share: _Int, sharers: int, turns: int, vectors: int, put: Callable[..., None]
    ) -> None:
        """Put this warp's share of a row of x, normalised."""

        def load(vector: _Int, where: _Where) -> list[ir.Value]:
            return _load(_at(self.pointers["x"], (row * vectors + vector) * 16), 4, kind="global", where=where)

        def bound(vector: _Int, last: int) -> _Where:
            return vector < vectors if last >= vectors else None

        own = [(share + i * sharers) * 32 + self.lane for i in range(-(-turns // sharers))]
        wheres = [bound(vector, (sharers - 1 + i * sharers) * 32 + 31) for i, vector in enumerate(own)]

        def factors(i: int) -> list[ir.Value]:
            address = _at(self.pointers["norm"], own[i] * 32)
            return [word for offset in (0, 16) for word in _load(address, 4, offset=offset, where=wheres[i])]

        vectors_ = [self.lane + turn * 32 for turn in range(turns)]
        held = [load(vector, bound(vector, turn * 32 + 31)) for turn, vector in enumerate(vectors_)]
        few = len(own) <= 4
        mine = held if sharers == 1 else [load(*where) for where in zip(own, wheres, strict=True)]
        scales = [factors(i) for i in range(len(own))] if few else []
        squares = [_f32(0.0)] * 4
        for words in held:
            for i, word in enumerate(words):
                for half in _halves(word):
                    squares[i] = _fma(half, half, squares[i])
        total = arith.addf(arith.addf(squares[0], squares[1]), arith.addf(squares[2], squares[3]))
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        mean = _fma(total, _f32(1.0 / self.plan.width), _f32(self.eps))
        (inverse,) = _asm("rsqrt.approx.f32 $0, $1;", "f", mean)
        for i, vector in enumerate(own):
            if not few and i % 4 == 0:
                scales += [factors(j) for j in range(i, min(i + 4, len(own)))]
            results = []
            for j, word in enumerate(mine[i]):
                halves = [arith.mulf(half, inverse) for half in _halves(word)]
                scaled = [arith.mulf(h, _as_float(scales[i][2 * j + k])) for k, h in enumerate(halves)]
                results.append(_pack(*scaled))
            _only(wheres[i], functools.partial(put, row, vector, results))

    def fetch(self, round_: _Int, step: _Int | int, slot: int, more: _Where) -> list[ir.Value]:
        """Ask for a chunk's weights and scales; zeros where there is none. `more`: whether there is such a turn."""
        plan, config = self.plan, self.config
        chunk = self.chunk(step, slot)
        if plan.chunks % (config.split * config.depth):
            more = _and(more, chunk < plan.chunks)
        fetched = []
        blocks, take = plan.width // BLOCK, self.scale_blocks
        for row, where in [(row, _and(more, where)) for rows, where in self.tiles(round_) for row in rows]:
            place = (row + self.row) * plan.width + chunk * (config.chunk * BLOCK) + self.quarter * 8
            address = _at(self.pointers["values"], place)
            kind = "global.nc.L1::no_allocate.L2::128B"
            for block in range(config.chunk):
                fetched += _load(address, 2, offset=block * BLOCK, kind=kind, where=where)
            for column in range(2):
                place = ((row + self.quarter * 2 + column) * blocks + chunk * config.chunk) * 2
                address = _at(self.pointers["scales"], place)
                for block in range(0, config.chunk, take):
                    if take == 1:
                        fetched += _load_half(address, block * 2, where)
                    else:
                        fetched += _load(address, take // 2, offset=block * 2, where=where)
        return fetched

    def tiles(self, round_: _Int) -> list[tuple[list[_Int], _Where]]:
        """First rows of the group's tiles or pairs of tiles in a round, each with whether it exists."""
        plan = self.plan
        count = self.config.tiles // self.work.joined
        first = (round_ * plan.groups + self.group) * count
        all_exist = plan.rounds * plan.groups * count == self.work.count
        return [(self.work.rows(first + i), None if all_exist else first + i < self.work.count) for i in range(count)]

    def begin(self, round_: _Int) -> list[_Finish]:
        """Ask for what the epilogue of each tile or pair of a round needs; it keeps to what exists."""
        where = self.member.equals(0) if self.config.split > 1 else None
        if self.plan.m < MAX_ROWS:
            where = _and(where, self.row < self.plan.m)

        def guarded(rows: list[_Int], where: _Where) -> _Finish:
            finish = self.work.epilogue(self.row, self.quarter * 2, rows, self.pointers, where)
            return lambda sums: _only(where, functools.partial(finish, sums))

        return [guarded(rows, _and(where, exists)) for rows, exists in self.tiles(round_)]

    def chunk(self, step: _Int | int, slot: int) -> _Int:
        """The warp's chunk of a turn."""
        base = step * self.config.depth + slot  # int or _Int
        return self.member + base * self.config.split

    def multiply(self, chunk: _Int, fetched: list[ir.Value], sums: list[ir.Value], place: _Int) -> list[ir.Value]:
        """Add a chunk's products to sums [tile, 2], flat."""
        plan, config = self.plan, self.config
        tiles = config.tiles
        per_tile = len(fetched) // tiles
        per_row = (per_tile - 2 * config.chunk) // 2
        start = chunk * (config.chunk * plan.block_bytes)
        address = (place + start).value
        sums = list(sums)
        zeros = [_f32(0.0)] * 4
        for block in range(config.chunk):
            offset = block * plan.block_bytes
            x = _load(address, 4, offset=offset, kind="shared")
            for tile in range(tiles):
                own = fetched[tile * per_tile : (tile + 1) * per_tile]
                w = [*_unpack(own[2 * block], self.base), *_unpack(own[2 * block + 1], self.base)]
                scales = []
                for column in range(2):
                    words = own[2 * config.chunk + column * per_row :][:per_row]
                    word, half = (block, 0) if self.scale_blocks == 1 else (block // 2, block % 2)
                    scales.append(_scale(words[word], half))
                upper, lower = (_multiply_tile(x, [w[i], w[i + 2]], zeros)[2 * i : 2 * i + 2] for i in range(2))
                for product in (upper, lower):
                    for column in range(2):
                        at = 2 * tile + column
                        sums[at] = _fma(product[column], scales[column], sums[at])
        return sums

    def round(
        self,
        round_: _Int,
        turn: _Int | None,
        buffers: list[list[ir.Value]],
        place: _Int,
        finishes: list[_Finish],
    ) -> list[list[ir.Value]]:
        """Do a unit of work, whose first chunks are in `buffers`; give back the next unit's."""
        plan, config = self.plan, self.config
        sums = [_f32(0.0)] * (config.tiles * 2)
        whole = plan.chunks % (config.split * config.depth) == 0

        def turn_of(step: _Int | None, buffers: list[list[ir.Value]], sums: list[ir.Value]) -> Any:
            """Use each buffer and fill it again; `step` None: the round has this one only."""
            buffers = list(buffers)
            for slot in range(config.depth):
                chunk = self.chunk(0 if step is None else step, slot)
                sums = self.multiply_if(None if whole else chunk < plan.chunks, chunk, buffers[slot], sums, place)
                if step is None and turn is None:
                    continue
                next_round, next_step = round_ + plan.ctas, _Int(_i32(0))
                more = next_round < plan.rounds
                if step is not None:
                    inside = step + 1 < plan.steps
                    next_step = _select(inside, step + 1, 0)
                    next_round = _select(inside, round_, next_round)
                    more = inside if turn is None else next_round < plan.rounds
                buffers[slot] = self.fetch(next_round, next_step, slot, more)
            return [buffers, sums]

        if plan.steps == 1:
            buffers, sums = turn_of(None, buffers, sums)
        else:

            @utils.fori(_i32(plan.steps), [buffers, sums])
            def loop(step: ir.Value, carry: Any) -> Any:
                return turn_of(_Int(step), *carry)

            buffers, sums = loop.results
        self.finish(turn, sums, finishes)
        return buffers

    def multiply_if(
        self, where: _Where, chunk: _Int, fetched: list[ir.Value], sums: list[ir.Value], place: _Int
    ) -> list[ir.Value]:
        """`multiply` under a condition, if there is one."""
        if where is None:
            return self.multiply(chunk, fetched, sums, place)
        conditional: Any = scf.IfOp
        branch = conditional(where, [s.type for s in sums], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(self.multiply(chunk, fetched, sums, place))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(sums)
        return list(branch.results)

    def finish(self, turn: _Int | None, sums: list[ir.Value], finishes: list[_Finish]) -> None:
        """Add the group's sums and hand them to the epilogues."""
        plan, config, joined = self.plan, self.config, self.work.joined
        size = 32 * 8  # bytes, of a warp's pairs
        pairs = [(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]

        def done(pairs: list[_Pair]) -> None:
            for i, epilogue in enumerate(finishes):
                epilogue(pairs[i * joined : (i + 1) * joined])

        if config.split == 1:
            done(pairs)
            return
        base = self.sums_smem + self.lane * 8
        if turn is not None:
            base = base + turn % 2 * (plan.sums_bytes // 2)
        mine = base + self.warp * size
        for tile, pair in enumerate(pairs):
            _store_shared(mine.value, [_as_word(s) for s in pair], tile * config.warps * size)
        _barrier()
        base = base + self.group * (config.split * size)

        def collect() -> None:
            totals = []
            for tile in range(config.tiles):
                offset = tile * config.warps * size
                loads = [_load(base.value, 2, offset + k * size, "shared") for k in range(config.split)]
                total = (_f32(0.0), _f32(0.0))
                for first, second in loads:
                    total = _add(total, (_as_float(first), _as_float(second)))
                totals.append(total)
            done(totals)

        _only(self.member.equals(0), collect)
