"""Runs what `pallas_kernels.mosaic_gpu.threads` emits on the CPU: NumPy arrays with an element for each thread.

All threads of all blocks go through the code together, and those for which a condition does not hold are masked, so
what waits for others has nothing to wait for: this shows whether the arithmetic and the addresses are right, and not
whether the synchronisation is. Reading what nobody has written gives NaNs, and accesses outside of the arrays raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic_gpu import threads

SPACING = 1 << 32  # of the arrays' addresses
SHARED_BITS = 20  # of an address in shared memory; above them, the block's number + 1 where it is another's


def run(
    emit: Callable[..., None],
    arrays: Sequence[np.ndarray],
    shared: Sequence[int],
    blocks: int,
    block: int,
    cluster: int,
) -> list[np.ndarray]:
    """Emit a kernel's body and run it.

    Args:
      emit: called with a context and a reference for each array and each piece of shared memory.
      arrays: all of global memory; they are not changed.
      shared: sizes in bytes of the pieces of shared memory.
      blocks, block, cluster: blocks of the grid, threads of a block, blocks of a cluster.

    Returns:
      The arrays as the kernel leaves them.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = ir.Module.create()

        class Launch:
            pass

        launch: Any = Launch()
        launch.module = module
        starts = [SPACING * (i + 1) for i in range(len(arrays))]
        offsets = np.cumsum([0, *shared[:-1]])
        patched = {"global_address": threads.i64, "shared_address": threads.i32}
        originals = {name: getattr(threads, name) for name in patched}
        with ir.InsertionPoint(module.body):
            for name, kind in patched.items():
                setattr(threads, name, lambda at, kind=kind: threads.constant(int(at), kind()))
            try:
                emit(launch, *starts, *offsets)
            finally:
                for name, original in originals.items():
                    setattr(threads, name, original)
        machine = _Machine(arrays, sum(shared), blocks, block, cluster)
        for op in module.body.operations:
            if op.operation.name == "llvm.mlir.global":
                machine.add_global(op.operation.attributes)
        with np.errstate(all="ignore"):
            machine.run(module.body, [], np.ones(blocks * block, bool))
    for counter in machine.globals.values():
        assert not machine.memory[counter].any(), "a counter is not zero for the next launch"
    memory = machine.memory[: len(arrays)]
    return [m.view(array.dtype).reshape(array.shape) for m, array in zip(memory, arrays, strict=True)]


def launch(
    name: str, emit: Callable[..., None], operands: Sequence[Any], results: Sequence[jax.ShapeDtypeStruct],
    blocks: int, warps: int, shared_bytes: int, cluster: int = 1,
) -> list[jax.Array]:  # fmt: skip
    """In place of `products.launch`, for arrays and references that exist: references alone may be changed."""
    given = [np.asarray(x[...]) for x in operands]
    poisoned = [np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype) for x in results]
    memory = run(lambda _, *refs: emit(*refs), [*given, *poisoned], [shared_bytes], blocks, 32 * warps, cluster)
    for operand, value, found in zip(operands, given, memory, strict=False):
        if isinstance(operand, jax.Array):
            np.testing.assert_array_equal(value.astype(np.float32), found.astype(np.float32), f"an input of {name}")
        else:
            operand[...] = jnp.asarray(found)
    return [jnp.asarray(x) for x in memory[len(operands) :]]


class _Machine:
    def __init__(self, arrays: Sequence[np.ndarray], shared: int, blocks: int, block: int, cluster: int) -> None:
        self.memory = [np.frombuffer(bytearray(array.tobytes()), np.uint8) for array in arrays]
        self.shared = np.full((blocks, shared), 0xFF, np.uint8)
        self.lanes, self.block, self.cluster = blocks * block, block, cluster
        self.globals: dict[str, int] = {}
        self.values: dict[ir.Value, Any] = {}

    def add_global(self, attributes: Any) -> None:
        """A variable of the module, which is zero."""
        self.globals[attributes["sym_name"].value] = len(self.memory)
        self.memory.append(np.zeros(np.asarray(attributes["value"]).nbytes, np.uint8))

    def run(self, block: ir.Block, arguments: Sequence[Any], mask: np.ndarray) -> list[Any]:
        """Run a block's operations in the threads of `mask`; gives what it yields."""
        for value, argument in zip(block.arguments, arguments, strict=True):
            self.values[value] = argument
        for op in block.operations:
            name, operands = op.operation.name, [self.values[x] for x in op.operation.operands]
            if name in ("scf.yield", "scf.condition"):
                return operands
            for value, result in zip(op.operation.results, self.step(name, op, operands, mask), strict=True):
                self.values[value] = result
        return []

    def step(self, name: str, op: Any, operands: list[Any], mask: np.ndarray) -> list[Any]:
        attributes = op.operation.attributes
        kind = str(op.operation.results[0].type) if len(op.operation.results) else ""
        if name in _ARITHMETIC:
            return [_ARITHMETIC[name](*operands)]
        if name == "arith.constant":
            return [
                _TYPES[kind](attributes["value"].value & _ONES[kind] if kind in _ONES else attributes["value"].value)
            ]
        if name in ("arith.cmpi", "arith.cmpf"):
            predicate = attributes["predicate"].value
            enum = arith.CmpIPredicate if name == "arith.cmpi" else arith.CmpFPredicate
            text = str(enum(predicate))
            a, b = (_signed(x) for x in operands) if text[0] == "s" else operands
            return [_COMPARISONS[text[-2:]](a, b)]
        if name in ("arith.extui", "arith.index_cast", "llvm.ptrtoint"):
            return [np.asarray(operands[0]).astype(_TYPES[kind])]
        if name == "arith.bitcast":
            return [np.asarray(operands[0]).view(_TYPES[kind])]
        if name == "gpu.thread_id":
            return [np.arange(self.lanes, dtype=np.uint64) % self.block]
        if name == "gpu.block_id":
            return [np.arange(self.lanes, dtype=np.uint64) // self.block]
        if name == "llvm.mlir.global":
            return []  # `add_global` has seen to it
        if name == "llvm.mlir.addressof":
            return [np.uint64(SPACING * (self.globals[attributes["global_name"].value] + 1))]
        if name == "llvm.extractvalue":
            return [operands[0][attributes["position"][0]]]
        if name == "scf.if":
            taken, left = mask & operands[0], mask & ~operands[0]
            if not len(op.operation.results):
                if taken.any():
                    self.run(op.operation.regions[0].blocks[0], [], taken)
                return []
            then, otherwise = (
                self.run(region.blocks[0], [], active) if active.any() else None
                for region, active in zip(op.operation.regions, (taken, left), strict=True)
            )
            if then is None or otherwise is None:
                return then or otherwise or []
            return [np.where(taken, a, b) for a, b in zip(then, otherwise, strict=True)]
        if name == "scf.for":
            return self.loop(op, operands, mask)
        if name == "scf.while":  # a wait: what it waits for has been done already
            again, *results = self.run(op.operation.regions[0].blocks[0], [], mask)
            assert not np.any(again & mask), "a wait that never ends"
            return results
        if name == "llvm.inline_asm":
            results = self.ptx(attributes["asm_string"].value, operands, mask)
            return [tuple(results)] if len(results) > 1 else results or [None] * len(op.operation.results)
        raise NotImplementedError(name)

    def loop(self, op: Any, operands: list[Any], mask: np.ndarray) -> list[Any]:
        i, stop, step = (np.broadcast_to(x, self.lanes) for x in operands[:3])
        carry = [np.broadcast_to(x, self.lanes) for x in operands[3:]]
        active = mask & (_signed(i) < _signed(stop))
        while active.any():
            results = self.run(op.operation.regions[0].blocks[0], [i, *carry], active)
            carry = [np.where(active, new, old) for new, old in zip(results, carry, strict=True)]
            i = i + step
            active &= _signed(i) < _signed(stop)
        return carry

    def ptx(self, code: str, operands: list[Any], mask: np.ndarray) -> list[Any]:
        operands = [np.broadcast_to(x, self.lanes) for x in operands]
        for pattern, action in _PTX:
            if match := re.search(pattern, code):
                return action(self, match, operands, mask) or []
        raise NotImplementedError(code)

    def spots(self, address: np.ndarray, mask: np.ndarray, bytes_: int, shared: bool) -> list[Any]:
        """(threads, memory as bytes, offsets) of an access of `bytes_` by the threads of `mask`."""
        assert not (address[mask] % bytes_).any(), "an address is not a multiple of the access's size"
        threads_ = np.nonzero(mask)[0]
        if shared:
            own = threads_ // self.block
            other = (address[threads_] >> SHARED_BITS).astype(np.int64)
            offsets = (address[threads_] & ((1 << SHARED_BITS) - 1)).astype(np.int64)
            assert np.all(offsets + bytes_ <= self.shared.shape[1]), "beyond the end of shared memory"
            flat = np.where(other > 0, other - 1, own) * self.shared.shape[1] + offsets
            return [(threads_, self.shared.reshape(-1), flat)]
        spots = []
        which = (address[threads_] // SPACING).astype(np.int64) - 1
        for array in np.unique(which):
            chosen = threads_[which == array]
            offsets = (address[chosen] % SPACING).astype(np.int64)
            assert np.all(offsets + bytes_ <= self.memory[array].size), f"beyond the end of array {array}"
            spots.append((chosen, self.memory[array], offsets))
        return spots

    def load(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        count, offset = int(match["vector"] or 1), int(match["offset"])
        size = 2 if match["bits"] == "16" else 4
        if len(operands) > 1:
            mask = mask & operands[1]
        dtype = np.uint16 if size == 2 else np.uint32
        results = np.zeros((count, self.lanes), dtype)
        for chosen, memory, offsets in self.spots(operands[0] + offset, mask, size * count, match["space"] == "shared"):
            bytes_ = memory[offsets[:, None] + np.arange(size * count)]
            results[:, chosen] = np.ascontiguousarray(bytes_).view(dtype).T
        if size == 2:
            as_float = "cvt.f32.f16" in match.string
            return [results[0].view(np.float16).astype(np.float32) if as_float else results[0].astype(np.uint32)]
        return list(results)

    def store(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        count, offset = int(match["vector"] or 1), int(match["offset"])
        self._store(
            operands[count] + np.asarray(offset, operands[count].dtype),
            operands[:count],
            mask,
            match["space"] == "shared",
        )

    def _store(self, address: np.ndarray, words: Sequence[np.ndarray], mask: np.ndarray, shared: bool) -> None:
        data = np.stack([np.asarray(w).view(np.uint32) for w in words], axis=-1)
        for chosen, memory, offsets in self.spots(address, mask, 4 * len(words), shared):
            bytes_ = np.ascontiguousarray(data[chosen]).view(np.uint8)
            memory[offsets[:, None] + np.arange(4 * len(words))] = bytes_

    def send(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        self._store(operands[0], operands[2:], mask, True)

    def map_to_rank(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        first = np.arange(self.lanes) // self.block // self.cluster * self.cluster
        rank = operands[1] if len(operands) > 1 else 0
        return [(operands[0] | ((first + rank + 1).astype(np.uint32) << SHARED_BITS)).astype(np.uint32)]

    def add_atomically(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        old = np.zeros(self.lanes, np.uint32)
        for chosen, memory, offsets in self.spots(operands[0], mask, 4, match["space"] == "shared"):
            for thread, at in zip(chosen, offsets, strict=True):
                word = memory[at : at + 4].view(np.uint32)
                old[thread] = word[0]
                word += np.uint32(1)
        return [old]

    def load_addresses(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        results = np.zeros((2, self.lanes), np.uint64)
        for chosen, memory, offsets in self.spots(operands[0], mask, 16, True):
            results[:, chosen] = np.ascontiguousarray(memory[offsets[:, None] + np.arange(16)]).view(np.uint64).T
        return list(results)

    def store_address(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        for chosen, memory, offsets in self.spots(operands[0], mask, 8, True):
            data = np.ascontiguousarray(operands[1][chosen])[:, None].view(np.uint8)
            memory[offsets[:, None] + np.arange(8)] = data

    def store_half(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        for chosen, memory, offsets in self.spots(operands[1], mask, 2, False):
            data = np.ascontiguousarray(operands[0][chosen])[:, None].view(np.uint8)
            memory[offsets[:, None] + np.arange(2)] = data[:, :2]

    def copy(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        target, source, sizes, _ = operands
        for thread in np.nonzero(mask)[0]:
            only, size = np.arange(self.lanes) == thread, int(sizes[thread])
            assert size % 16 == 0 and not (target[thread] % 16 or source[thread] % 16)
            ((_, shared, to),) = self.spots(target, only, 1, True)
            ((_, memory, start),) = self.spots(source, only, 1, False)
            assert start[0] + size <= memory.size, "a copy from beyond the end of an array"
            assert to[0] % self.shared.shape[1] + size <= self.shared.shape[1], "a copy beyond shared memory"
            shared[to[0] : to[0] + size] = memory[start[0] : start[0] + size]

    def copy_16(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> None:
        for chosen, memory, offsets in self.spots(operands[1], mask, 16, False):
            only = np.zeros(self.lanes, bool)
            only[chosen] = True
            ((_, shared, to),) = self.spots(operands[0], only, 16, True)
            shared[to[:, None] + np.arange(16)] = memory[offsets[:, None] + np.arange(16)]

    def multiply(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        """mma.m16n8k16: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float"""
        assert np.all(mask.reshape(-1, 32) == mask.reshape(-1, 32)[:, :1]), "a warp is divided at an mma"
        words = np.stack([np.ascontiguousarray(x).view(np.uint32) for x in operands[:6]]).reshape(6, -1, 8, 4, 1)
        dtype = np.float16 if match["kind"] == "f16" else ml_dtypes.bfloat16
        halves = words.view(np.uint16).view(dtype).astype(np.float32)  # [6, warps, quad, member, 2]
        a = halves[:4].reshape(2, 2, -1, 8, 4, 2)  # [half of k, half of rows, warps, row, k / 2, k]
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        b = halves[4:].transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)  # [warps, half, k / 2, k, column]
        c = np.stack(operands[6:]).reshape(2, 2, -1, 8, 4)  # [half of rows, column, warps, row, column / 2]
        c = c.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8) + a @ b
        return list(c.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.lanes))

    def multiply_int8(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        """mma.m16n8k32: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16832"""
        assert np.all(mask.reshape(-1, 32) == mask.reshape(-1, 32)[:, :1]), "a warp is divided at an mma"
        words = np.stack([np.ascontiguousarray(x).view(np.uint32) for x in operands[:6]]).reshape(6, -1, 8, 4, 1)
        bytes_ = words.view(np.int8).astype(np.int32)  # [6, warps, quad, member, 4]
        a = bytes_[:4].reshape(2, 2, -1, 8, 4, 4)  # [half of k, half of rows, warps, row, k / 4, k]
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 32)
        b = bytes_[4:].transpose(1, 0, 3, 4, 2).reshape(-1, 32, 8)  # [warps, half, k / 4, k, column]
        c = np.stack([_signed(x) for x in operands[6:]]).reshape(2, 2, -1, 8, 4)
        c = c.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8) + a @ b
        return list(c.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.lanes).view(np.uint32))

    def maximum(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        assert np.all(mask.reshape(-1, 32) == mask.reshape(-1, 32)[:, :1]), "a warp is divided at a reduction"
        return [np.repeat(operands[0].reshape(-1, 32).max(axis=1), 32)]

    def exchange(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        lane = np.arange(self.lanes)
        partner = (
            lane ^ int(match["distance"])
            if match["distance"]
            else lane // 32 * 32 + (operands[1].astype(np.int64) if len(operands) > 1 else 0)
        )
        assert np.all(mask[partner[mask]]), "a shuffle asks a thread that is elsewhere"
        return [operands[0][partner]]

    def vote(self, match: re.Match, operands: list[Any], mask: np.ndarray) -> list[Any]:
        held = ((operands[0] != 0) & mask).reshape(-1, 32).any(axis=1)
        return [np.repeat(held, 32).astype(np.uint32)]


def _signed(x: Any) -> Any:
    return np.asarray(x).view({"u": f"i{np.asarray(x).itemsize}"}.get(np.asarray(x).dtype.kind, np.asarray(x).dtype))


def _permute(match: re.Match, operands: list[Any]) -> np.ndarray:
    bytes_ = np.concatenate([np.ascontiguousarray(x)[:, None].view(np.uint8) for x in operands], axis=1)
    selector = int(match["selector"])
    order = [(selector >> (4 * i)) & 7 for i in range(4)]
    return np.ascontiguousarray(bytes_[:, order]).view(np.uint32)[:, 0]


def _pack(low: np.ndarray, high: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(np.stack([low, high], axis=1).astype(dtype)).view(np.uint32)[:, 0]


def _unpack(word: np.ndarray) -> list[np.ndarray]:
    return list(np.ascontiguousarray(word)[:, None].view(np.float16).astype(np.float32).T)


def _int8_to_bfloat16(word: np.ndarray) -> np.ndarray:
    parts = [((word & np.uint32(bits)) | np.uint32(0x43004300))[:, None] for bits in (0x007F007F, 0x00800080)]
    low, sign = (np.ascontiguousarray(x).view(ml_dtypes.bfloat16) for x in parts)
    return np.ascontiguousarray(low - sign).view(np.uint32)[:, 0]


def _pure(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda machine, match, operands, mask: [function(*operands)]


_TYPES: dict[str, Any] = {"i32": np.uint32, "i64": np.uint64, "f32": np.float32, "i1": np.bool_, "index": np.uint64}
_ONES = {"i32": (1 << 32) - 1, "i64": (1 << 64) - 1}

_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply, "arith.divui": np.floor_divide,
    "arith.remui": np.remainder, "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor, "arith.shli": np.left_shift, "arith.shrui": np.right_shift, "arith.addf": np.add,
    "arith.subf": np.subtract, "arith.mulf": np.multiply, "arith.divf": np.divide, "arith.minui": np.minimum,
    "arith.maxui": np.maximum,
    "arith.maxnumf": np.fmax, "arith.select": np.where,
    "arith.minsi": lambda a, b: np.minimum(_signed(a), _signed(b)).view(np.uint32),
    "arith.maxsi": lambda a, b: np.maximum(_signed(a), _signed(b)).view(np.uint32),
}  # fmt: skip

_ACCESS = r"(?P<space>global|shared)[\w:.]*?(\.v(?P<vector>\d))?\.b(?P<bits>16|32)"
_PTX: list[tuple[str, Callable[..., Any]]] = [
    (r"\bld\.[\w.]*?" + _ACCESS + r" [^\[]*\[\$\d+ \+ (?P<offset>\d+)\]", _Machine.load),
    (r"^st\.[\w.]*?" + _ACCESS + r" \[\$\d+ \+ (?P<offset>\d+)\]", _Machine.store),
    (r"^st\.async", _Machine.send),
    (r"^mapa\..* (0|\$2);$", _Machine.map_to_rank),
    (r"^atom\.[\w.]*?(?P<space>global|shared)\.add\.u32 .* 1;$", _Machine.add_atomically),
    (r"^mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<kind>f16|bf16)\.(f16|bf16)\.f32", _Machine.multiply),
    (r"^shfl\.sync\.(bfly\.b32 \$0, \$1, (?P<distance>\d+)|idx\.b32 \$0, \$1, (\$2|0)), 31, -1;$", _Machine.exchange),
    (r"vote\.sync\.any", _Machine.vote),
    (r"^prmt\.b32 .*, (?P<selector>\d+);$", lambda machine, match, operands, mask: [_permute(match, operands)]),
    (r"^cvt\.rn\.bf16x2\.f32 \$0, \$2, \$1;$", _pure(lambda low, high: _pack(low, high, ml_dtypes.bfloat16))),
    (r"sub\.rn\.bf16x2 \$0, low, sign", _pure(_int8_to_bfloat16)),
    (r"0x64806480; sub\.rn\.f16x2", _pure(lambda word: (word.view(np.float16) - np.float16(1152)).view(np.uint32))),
    (r"cvt\.f32\.f16 \$0, a; cvt\.f32\.f16 \$1, b", lambda machine, match, operands, mask: _unpack(*operands)),
    (r"^cvt\.rn\.bf16x2\.f32 \$0, \$1, 0f00000000;$", _pure(lambda high: _pack(high * 0, high, ml_dtypes.bfloat16))),
    (r"^mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.s8\.s8\.s32", _Machine.multiply_int8),
    (r"^redux\.sync\.max\.u32", _Machine.maximum),
    (r"^cvt\.rn\.f16x2\.f32 \$0, \$2, \$1;$", _pure(lambda low, high: _pack(low, high, np.float16))),
    (r"^ld\.shared\.v2\.b64", _Machine.load_addresses),
    (r"^st\.shared\.b64", _Machine.store_address),
    (r"st\.global\.b16 \[\$1\], low", _Machine.store_half),
    (r"cp\.async\.bulk\.shared", _Machine.copy),
    (r"^fma\.rn\.f32", _pure(lambda a, b, c: a * b + c)),
    (r"sub\.rn\.f32 low, \$1, \$2; sub\.rn\.f32 \$0, \$1, low;", _pure(lambda far, x: far - (far - x))),
    (r"^rsqrt\.", _pure(lambda x: 1 / np.sqrt(x))),
    (r"^rcp\.", _pure(lambda x: 1 / x)),
    (r"^ex2\.", _pure(np.exp2)),
    (r"^lg2\.", _pure(np.log2)),
    (r"^cp\.async\.cg\.shared\.global[\w:.]* \[\$0\], \[\$1\], 16;$", _Machine.copy_16),
    (r"^cp\.async\.mbarrier", lambda *_: None),
    (r"^(fence|bar\.sync|bar\.warp|barrier\.cluster|mbarrier|prefetch)|mbarrier\.try_wait", lambda *_: None),
    (r"^(setmaxnreg|\.pragma)", lambda *_: None),
]
