"""The ops of a decoder block, each with a pure-JAX reference and room for hand-written kernels.

This package knows arrays only. Dimensions: B batch, T queries a row, S cache length, D model width, F feed-forward
width, N query heads, K key/value heads, G = N / K, H head width, V vocabulary.

On Hopper the ops run on their kernels where those take the arguments, and elsewhere, or inside `with use("xla"):`, as
XLA compiles the references. Programs that use kernels are to be lowered by one thread at a time, see
`implementation.compiled`.
"""

from pallas_kernels.decode_step import decode_step
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_decode import flash_decode
from pallas_kernels.implementation import preferred, use
from pallas_kernels.qkv_rope import qkv_rope, qkv_rope_store
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul_argmax import quant_matmul_argmax
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.swiglu import swiglu
from pallas_kernels.top_k import top_k

__all__ = [
    "decode_step",
    "flash_attention",
    "flash_decode",
    "preferred",
    "qkv_rope",
    "qkv_rope_store",
    "quant_matmul",
    "quant_matmul_argmax",
    "rms_norm",
    "swiglu",
    "top_k",
    "use",
]
