"""GGUF -> canonical parameters on a device.

Canonical means that the model never sees an architecture: query, key and value matrices are joined, gate and up
likewise, Llama's permuted rows are put back, and every matrix is [out, in] in one of three formats:
int8 (blocks of 32 with a float16 scale; Q8_0 is kept bit for bit), bf16 or f32. Norms and biases are float32.
A matrix whose rows are no multiple of 32 cannot be in blocks and is kept in bf16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize as dequantize_blocks
from tqdm import tqdm

from orcd_jax.config import ModelConfig, WeightFormat
from orcd_jax.errors import GGUFError
from orcd_jax.gguf_reader import GGUFFile, TensorInfo
from orcd_jax.quantize import BLOCK, QuantizedArray, quantize, split_q8_0

Params = dict[str, Any]

TENSOR_TYPES = (
    Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
)  # fmt: skip

_CHUNK_WEIGHTS = 1 << 18  # dequantised at a time by each thread, at some 12 bytes each
_CHUNK_COPIED = 1 << 20  # of Q8_0, which are only copied, at one byte each
_IN_FLIGHT = 1 << 28  # bytes of the host's that may be on their way to the device
_MAX_THREADS = 16


@dataclass(frozen=True)
class _Architecture:
    """How an architecture's converter lays tensors out."""

    joined: bool = False  # one attn_qkv tensor, and ffn_up holds gate rows, then up rows
    interleaved: bool = False  # rows of q and k permuted for rotation of neighbouring pairs


_ARCHITECTURES = {
    "llama": _Architecture(interleaved=True),
    "phi3": _Architecture(joined=True),
    "qwen2": _Architecture(),
}

# Read into ModelConfig, not parameters.
_CONFIG_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


class _Part(NamedTuple):
    """One tensor of the file as rows of a parameter, in `order` where the file has them permuted."""

    info: TensorInfo
    order: np.ndarray | None


def load_params(
    file: GGUFFile, config: ModelConfig, weights: WeightFormat, device: jax.Device, progress: bool = False
) -> Params:
    """Read all parameters, one after another, onto a device.

    Args:
      file: the opened file.
      config: made from the same file.
      weights: the format of matrices.
      device: where the parameters go.
      progress: show a progress bar on stderr.

    Returns:
      {"embedding": [V, D], "norm": [D], "head": [V, D] unless tied, "layer_0": {"attention": {"norm", "qkv",
      "qkv_bias", "out"}, "swiglu": {"norm", "gate_up", "down"}}, ...}; int8 matrices are `QuantizedArray`s.

    Raises:
      GGUFError: for a tensor that is missing, unknown, of the wrong shape or an unsupported type, or not finite.
    """
    plan = _checked_plan(file, config)
    params: Params = {}
    total = sum(part.info.data.nbytes for parts in plan.values() for part in parts)
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress, leave=False) as bar,
    ):
        in_flight: list[tuple[Any, int]] = []
        for path, parts in plan.items():
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = jax.device_put(_assemble(file, parts, weights, pool), device)
            # Transfers overlap with the next tensors' assembly, but the host must not hold the whole model.
            in_flight.append((node[path[-1]], sum(x.nbytes for x in jax.tree.leaves(node[path[-1]]))))
            while len(in_flight) > 1 and sum(size for _, size in in_flight) > _IN_FLIGHT:
                jax.block_until_ready(in_flight.pop(0)[0])
            bar.update(sum(part.info.data.nbytes for part in parts))
        jax.block_until_ready(params)
    return params


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Check that a file has exactly the tensors that its config asks for; their values are not read.

    Raises:
      GGUFError: for a tensor that is missing, unknown, of the wrong shape or an unsupported type.
    """
    _checked_plan(file, config)


def random_params(config: ModelConfig, weights: WeightFormat, device: jax.Device, seed: int = 0) -> Params:
    """Parameters of a config's shapes with random values of a trained model's scale, made on the device.

    Norms are ones, biases zeros, matrices uniform with a standard deviation of 1 / sqrt(in).
    """
    makers = {}

    def make(shape: tuple[int, ...], key: jax.Array) -> Any:
        kind = (shape, weights)
        if kind not in makers:
            makers[kind] = jax.jit(lambda key: _random_matrix(key, shape, weights))
        return makers[kind](key)

    def vector(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape) if name.endswith("bias") else jnp.ones(shape)

    with jax.default_device(device):
        keys = iter(jax.random.split(jax.random.key(seed), 8 * (config.n_layers + 1)))

        def fill(shapes: dict[str, tuple[int, ...]]) -> Params:
            return {k: vector(k, s) if len(s) == 1 else make(s, next(keys)) for k, s in shapes.items()}

        params: Params = fill(config.outer_shapes())
        for layer in range(config.n_layers):
            params[f"layer_{layer}"] = {module: fill(s) for module, s in config.layer_shapes().items()}
    return params


def _random_matrix(key: jax.Array, shape: tuple[int, ...], weights: WeightFormat) -> jax.Array | QuantizedArray:
    limit = (3 / shape[-1]) ** 0.5  # a uniform distribution's standard deviation is its limit over sqrt(3)
    if weights == "int8" and shape[-1] % BLOCK == 0:
        values = jax.random.randint(key, shape, -127, 128, jnp.int8)
        return QuantizedArray(values, jnp.full((shape[0], shape[1] // BLOCK), limit / 127, jnp.float16))
    return jax.random.uniform(key, shape, _matrix_dtype(weights), -limit, limit)


def _matrix_dtype(weights: WeightFormat) -> Any:
    return np.float32 if weights == "f32" else ml_dtypes.bfloat16


def _checked_plan(file: GGUFFile, config: ModelConfig) -> dict[tuple[str, ...], list[_Part]]:
    plan = dict(_plan(file, config))
    used = {part.info.name for parts in plan.values() for part in parts}
    unknown = sorted(file.tensors.keys() - used - _CONFIG_TENSORS)
    if unknown:
        raise GGUFError(
            f"{file.path}: tensor {unknown[0]!r} has no place in a {config.architecture} model of {config.n_layers} "
            f"layers, {len(unknown)} such in all; expected only what such a model uses"
        )
    return plan


def _plan(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[tuple[str, ...], list[_Part]]]:
    """Each parameter's path and the tensors that make it up, with shapes and types checked."""
    architecture = _ARCHITECTURES[config.architecture]
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def part(name: str, shape: tuple[int, ...], order: np.ndarray | None = None) -> _Part:
        info = file.tensors.get(name)
        if info is None:
            raise GGUFError(f"{file.path}: tensor {name!r} is missing; expected the shape {list(shape)}")
        if info.shape != shape:
            raise GGUFError(f"{file.path}: tensor {name!r} has the shape {list(info.shape)}; expected {list(shape)}")
        if info.type not in TENSOR_TYPES:
            names = ", ".join(t.name for t in TENSOR_TYPES)
            raise GGUFError(f"{file.path}: tensor {name!r} is of type {info.type.name}; supported are {names}")
        return _Part(info, order)

    def unpermuted(heads: int) -> np.ndarray | None:
        if not architecture.interleaved:
            return None
        rows = np.arange(heads * config.head_dim)
        return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).ravel()

    yield ("embedding",), [part("token_embd.weight", (config.vocab_size, config.d_model))]
    for layer in range(config.n_layers):
        name = f"layer_{layer}"
        block = f"blk.{layer}"
        d, f = config.d_model, config.d_ff
        yield (name, "attention", "norm"), [part(f"{block}.attn_norm.weight", (d,))]
        for target, kind, tail in (("qkv", "weight", (d,)), ("qkv_bias", "bias", ())):
            if kind == "bias" and not config.qkv_bias:
                continue
            if architecture.joined:
                yield (name, "attention", target), [part(f"{block}.attn_qkv.{kind}", (q_rows + 2 * kv_rows, *tail))]
            else:
                yield (
                    (name, "attention", target),
                    [
                        part(f"{block}.attn_q.{kind}", (q_rows, *tail), unpermuted(config.n_heads)),
                        part(f"{block}.attn_k.{kind}", (kv_rows, *tail), unpermuted(config.n_kv_heads)),
                        part(f"{block}.attn_v.{kind}", (kv_rows, *tail)),
                    ],
                )
        yield (name, "attention", "out"), [part(f"{block}.attn_output.weight", (d, q_rows))]
        yield (name, "swiglu", "norm"), [part(f"{block}.ffn_norm.weight", (d,))]
        if architecture.joined:
            yield (name, "swiglu", "gate_up"), [part(f"{block}.ffn_up.weight", (2 * f, d))]
        else:
            gate_up = [part(f"{block}.ffn_gate.weight", (f, d)), part(f"{block}.ffn_up.weight", (f, d))]
            yield (name, "swiglu", "gate_up"), gate_up
        yield (name, "swiglu", "down"), [part(f"{block}.ffn_down.weight", (d, f))]
    yield ("norm",), [part("output_norm.weight", (config.d_model,))]
    if not config.tied_head:
        yield ("head",), [part("output.weight", (config.vocab_size, config.d_model))]


def _assemble(
    file: GGUFFile, parts: list[_Part], weights: WeightFormat, pool: ThreadPoolExecutor
) -> np.ndarray | QuantizedArray:
    """Dequantise, and requantise where int8 is asked for, the rows of `parts` into one host array."""
    if len(parts[0].info.shape) == 1:
        vectors = [_floats(file, part, slice(None)).ravel() for part in parts]
        ordered = [v if part.order is None else v[part.order] for v, part in zip(vectors, parts, strict=True)]
        return np.concatenate(ordered)

    width = parts[0].info.shape[1]
    rows = sum(part.info.shape[0] for part in parts)
    spans = []
    first = 0
    for part in parts:
        count = part.info.shape[0]
        copied = weights == "int8" and part.info.type == Type.Q8_0
        step = max(1, (_CHUNK_COPIED if copied else _CHUNK_WEIGHTS) // width)
        spans += [(part, slice(a, min(a + step, count)), first) for a in range(0, count, step)]
        first += count

    if weights == "int8" and width % BLOCK == 0:
        blocks = QuantizedArray(np.empty((rows, width), np.int8), np.empty((rows, width // BLOCK), np.float16))

        def fill_blocks(span: tuple[_Part, slice, int]) -> None:
            part, source, first = span
            target = slice(first + source.start, first + source.stop)
            _fill_blocks(file, part, source, QuantizedArray(blocks.values[target], blocks.scales[target]))

        list(pool.map(fill_blocks, spans))
        return blocks

    matrix = np.empty((rows, width), _matrix_dtype(weights))

    def fill_matrix(span: tuple[_Part, slice, int]) -> None:
        part, source, first = span
        matrix[first + source.start : first + source.stop] = _floats(file, part, _rows(part, source))

    list(pool.map(fill_matrix, spans))
    return matrix


def _rows(part: _Part, source: slice) -> slice | np.ndarray:
    return source if part.order is None else part.order[source]


def _floats(file: GGUFFile, part: _Part, rows: slice | np.ndarray) -> np.ndarray:
    """Exactly dequantised rows, float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = dequantize_blocks(part.info.data[rows], part.info.type)
    if not np.isfinite(values).all():
        raise GGUFError(f"{file.path}: tensor {part.info.name!r} has values that are not finite")
    return values


def _fill_blocks(file: GGUFFile, part: _Part, source: slice, out: QuantizedArray) -> None:
    """Write rows as int8 blocks to `out`: as they are in the file for Q8_0, requantised otherwise."""
    rows = _rows(part, source)
    if part.info.type != Type.Q8_0:
        try:
            out.values[...], out.scales[...] = quantize(_floats(file, part, rows))
        except ValueError as reason:
            raise GGUFError(f"{file.path}: tensor {part.info.name!r} cannot be made int8: {reason}") from None
        return
    split_q8_0(part.info.data[rows], out)
    if not np.isfinite(out.scales).all():
        raise GGUFError(f"{file.path}: tensor {part.info.name!r} has scales that are not finite")
