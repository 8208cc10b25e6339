"""The greatest element of each column of wgmma's accumulators, as they pass by, with its place.

Each thread keeps the greatest that it has seen of each of its columns (`keep`), from tile to tile. In the end the
threads of a warp agree (`store`), and XLA on what the warps have written: always in the same order. A NaN is the
greatest, and of equals the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu import threads as t

_ROWS = 64  # of an accumulator

Scalars = Sequence[t.Scalar]


def kept(tile_m: int) -> list[Any]:
    """The types of what a warpgroup keeps of `tile_m` rows of x in the greatest form: values and their columns of y.

    Only the registers matter, of which wgmma's layout gives each thread as many as an accumulator has of one half of
    its rows of weights.
    """
    shape, layout = (_ROWS, tile_m // 2), plgpu.Layout.WGMMA
    return [plgpu.ShapeDtypeStruct(shape, dtype, layout=layout) for dtype in (jnp.float32, jnp.int32)]


def keep(acc: jax.Array, columns: jax.Array, best: Sequence[jax.Array], known: int) -> list[jax.Array]:
    """What `kept` describes, once an accumulator [64, tile_m] has been seen; its columns of y are int32 [64]."""
    wgmma = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(wgmma, plgpu.Layout.WGMMA.reduce(1), wgmma, wgmma), return_type=kept(acc.shape[1]))
    def run(_: Any, acc: Any, columns: Any, *best: Any) -> list[Any]:
        found = _scalars(acc)
        values, places = (_scalars(a) for a in best)
        for half, place in enumerate(_scalars(columns)):  # a thread's rows r and r + 8 of the weights, by turns of two
            new = [x for i in range(2 * half, len(found), 4) for x in found[i : i + 2]]
            values, places = keep_greater(values, places, new, place, known)
        return [_like(a, scalars) for a, scalars in zip(best, (values, places), strict=True)]

    return run(acc, columns, *best)


def _scalars(array: Any) -> list[t.Scalar]:
    """The elements that each thread has of an array in registers."""
    count = array.layout.vector_length
    return [
        t.Scalar(llvm.extractelement(register, t.constant(i).value))
        for register in array.registers.flat
        for i in range(count)
    ]


def _like(array: Any, scalars: Sequence[t.Scalar]) -> Any:
    """An array in registers as `array` is, of these elements."""
    remaining, registers = iter(scalars), np.empty_like(array.registers)
    for index, old in np.ndenumerate(array.registers):
        register = llvm.mlir_undef(old.type)
        for i in range(array.layout.vector_length):
            register = llvm.insertelement(register, next(remaining).value, t.constant(i).value)
        registers[index] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=array.is_signed)


def keep_greater(
    values: Scalars, places: Scalars, new: Scalars, place: t.Scalar, known: int
) -> tuple[list[t.Scalar], list[t.Scalar]]:
    """A thread's greatest values and their places, now that it has seen `new` ones at `place`, beyond all before.

    The first of equal values is kept, and so is a NaN. Places from `known` on do not count.
    """
    counts = place < known
    greater = [((old >= x) ^ True) & old.equals(old) & counts for old, x in zip(values, new, strict=True)]
    return (
        [t.select(g, x, old) for g, x, old in zip(greater, new, values, strict=True)],
        [t.select(g, place, old) for g, old in zip(greater, places, strict=True)],
    )


def store_greatest(values: Scalars, places: Scalars, to: Scalars, stride: int) -> None:
    """Write what the threads of a warpgroup agree on, warp by warp, to global memory [tile_m, 4].

    Args:
      values, places: of each thread, as of an accumulator's columns.
      to: where the values and where the places go.
      stride: elements between two rows there.
    """
    thread = t.thread_index() % 128
    warp, lane = thread // 32, thread % 32
    best = list(zip(values, places, strict=True))
    for distance in (4, 8, 16):  # between the lanes that have the same columns
        best = [_greater(*pair, *(t.shuffle_xor(x, distance) for x in pair)) for pair in best]
    with t.when(lane < 4):
        for i, pair in enumerate(best):
            offset = ((lane * 2 + (8 * (i // 2) + i % 2)) * stride + warp) * 4
            for address, x in zip(to, pair, strict=True):
                t.store_global(address + offset.wide(), x)


def _greater(value: Any, place: Any, other: Any, other_place: Any) -> tuple[t.Scalar, t.Scalar]:
    """The greater of two values with its place; a NaN is the greatest, and of equals that of the lower place."""
    number, same = value.equals(value), other.equals(value) | value.differs(value) & other.differs(other)
    taken = ((value >= other) ^ True) & number | same & (other_place < place)
    return t.select(taken, other, value), t.select(taken, other_place, place)


def store(best: Sequence[jax.Array], values: Any, places: Any) -> None:
    """`store_greatest` of what `kept` describes, to references [tile_m, 4]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))
    def run(_: Any, values: Any, places: Any, *refs: Any) -> None:
        (stride, _one), _offset = ir.MemRefType(refs[0].type).get_strides_and_offset()
        store_greatest(_scalars(values), _scalars(places), [t.global_address(ref) for ref in refs], stride)

    run(*best, values, places)
