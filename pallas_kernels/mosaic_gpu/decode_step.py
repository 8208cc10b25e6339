"""All layers of a decode step in one persistent kernel, for Hopper: which kernel, laid out how.

`decode_step_frame` is what the kernels have in common, `decode_step_row` the one for a row, `decode_step_rows` the one
for few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step import ROWS, DecoderSizes, Handover, PackedWeights, check
from pallas_kernels.mosaic_gpu import materialised, processors
from pallas_kernels.mosaic_gpu.decode_step_frame import WARPS, Frame
from pallas_kernels.mosaic_gpu.decode_step_row import RowKernel
from pallas_kernels.mosaic_gpu.decode_step_rows import RowsKernel, input_words


def blocks_for(sizes: DecoderSizes) -> int:
    """The kernel's blocks for a decoder, one for each SM.

    Raises:
      NotImplementedError: if the kernel cannot run it.
    """
    check(sizes)
    blocks = processors()
    if sizes.n_heads > 8 * sizes.n_kv_heads:
        raise NotImplementedError(
            f"at most 8 query heads for each key head, not {sizes.n_heads} for {sizes.n_kv_heads}"
        )
    if sizes.n_kv_heads > blocks:
        raise NotImplementedError(f"more key heads ({sizes.n_kv_heads}) than SMs ({blocks})")
    if sizes.d_ff // 8 < blocks:  # then blocks could be layers apart
        raise NotImplementedError(f"d_ff {sizes.d_ff} does not give each of {blocks} SMs work in every layer")
    RowKernel(sizes, blocks, 1)  # raises if its shared memory does not suffice
    return blocks


def kernel_for(sizes: DecoderSizes, length: int, rows: int) -> Frame:
    """The kernel for so many rows on a cache of `length` slots.

    Raises:
      NotImplementedError: if there is none.
    """
    blocks = blocks_for(sizes)
    if rows > ROWS:
        raise NotImplementedError(f"at most {ROWS} rows, not {rows}")
    return RowKernel(sizes, blocks, length) if rows == 1 else RowsKernel(sizes, blocks, length, rows)


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
      NotImplementedError: for too many rows, a cache that is not bfloat16, or sizes that do not fit.
    """
    if x.dtype != jnp.bfloat16 or caches[0][0].dtype != jnp.bfloat16:
        raise NotImplementedError(f"bfloat16 only, not {x.dtype} and a cache of {caches[0][0].dtype}")
    if 2 * cos.shape[1] != sizes.head_dim:
        raise NotImplementedError(f"all of a head rotated, not {2 * cos.shape[1]} of {sizes.head_dim}")
    rows = len(x)
    kernel = kernel_for(sizes, caches[0][0].shape[2], rows)
    given = x.astype(jnp.float32) if rows == 1 else input_words(x, handover.step, sizes)

    def body(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(lambda _, *inner: kernel.emit(*inner))(*refs)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, sizes.vocab_size), jnp.float32),
        scratch_types=[plgpu.SMEM((kernel.shared_bytes,), jnp.int8)],
        grid=(kernel.blocks,),
        grid_names=("block",),
        num_threads=WARPS // 4 + 1,
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
    inputs = materialised((positions, handover.step, given, jnp.stack([cos, sin], axis=1), *weights))
    logits, arrays, words = step(*inputs, arrays, handover.words)
    return logits, list(zip(arrays[::2], arrays[1::2], strict=True)), Handover(words, handover.step + 1)
