"""What becomes of the sums of a product that another kernel has left in memory, for Hopper.

A `products.Run` like the kernels that multiply, for those that have no epilogue of their own: a thread has two
neighbouring columns of a tile, or of both tiles of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import products
from pallas_kernels.mosaic_gpu import threads as t
from pallas_kernels.mosaic_gpu.products import EIGHT, Product

WARPS = 8  # of a CTA


def run(product: Product) -> Sequence[jax.Array]:
    """Finish a product whose sums are its `x`, [M, out]; norm and weights have been seen to.

    Raises:
      NotImplementedError: for 2^31 sums or more.
    """
    sums, work, results = product.x, product.work, product.results()
    if sums.size >= 2**31:
        raise NotImplementedError(f"2^31 sums or more: {sums.shape}")
    given = {"sums": sums, **{name: array for name, array in product.extra.items() if array is not None}}
    pairs = EIGHT // 2  # of columns of a tile
    items, threads = len(sums) * work.count * pairs, 32 * WARPS

    def emit(*refs: Any) -> None:
        pointers = dict(zip([*given, *results], map(t.global_address, refs[:-1]), strict=True))
        index = t.block_index() * threads + t.thread_index()
        near = t.minimum(index, items - 1)
        column, tile, row = near % pairs * 2, near // pairs % work.count, near // (pairs * work.count)
        finish = work.epilogue(pointers, row, tile, column, None)
        places = [row * sums.shape[1] + first + column for first in work.rows(tile)]
        finish([products.load_pair(pointers["sums"], place, sums.dtype) for place in places], index < items)

    return products.launch(
        product.name, emit, list(given.values()), list(results.values()), -(-items // threads), WARPS, 4
    )
