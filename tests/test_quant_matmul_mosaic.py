"""The Hopper kernels for up to 8 rows: their plans and code on any device, their results on a Hopper GPU.

A result is compared with float32 arithmetic on the exact weights: what differs is the rounding to bfloat16 of the
result, of the normalised rows and of the active units, each at most 2^-9 of a number and 2^-9 / sqrt(3) on average.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import pallas_kernels
from pallas_kernels import qkv_rope, qkv_rope_store, quant_matmul, rms_norm, swiglu
from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu import products
from pallas_kernels.mosaic_gpu import quant_matmul_skinny as skinny
from pallas_kernels.qkv_rope import rotate
from pallas_kernels.quant_matmul import reference

needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs an NVIDIA Hopper GPU")
lowers = pytest.mark.skipif(
    not hasattr(jax.experimental.mosaic.gpu.utils, "inline_ptx"), reason="needs jax 0.11.2 or newer"
)

# out, in, tiles joined: query/key/value, output, gate and up, down, head of Qwen2.5-0.5B, Phi-3-mini and SmolLM2-135M
SHAPES = [
    (1152, 896, 2), (896, 896, 1), (9728, 896, 2), (896, 4864, 1), (151936, 896, 1),
    (9216, 3072, 2), (3072, 3072, 1), (16384, 3072, 2), (3072, 8192, 1), (32064, 3072, 1),
    (960, 576, 2), (576, 576, 1), (3072, 576, 2), (576, 1536, 1), (49152, 576, 1), (16384, 3072, 1),
]  # fmt: skip
ODD = [(8, 32, 1), (16, 96, 2), (40, 160, 1), (88, 288, 1), (2000, 2080, 2), (24, 1088, 1)]
# Heads, key/value heads, head width and model width.
HEADS = [(14, 2, 64, 896), (32, 32, 96, 3072), (9, 3, 64, 576), (3, 1, 16, 96)]


def normal(seed, *shape, dtype=jnp.float32, std=1.0):
    return jnp.asarray(std * np.random.default_rng(seed).standard_normal(shape), dtype)


def random_weight(seed, out, width):
    rng = np.random.default_rng(seed)
    scales = (rng.uniform(-1.5, 1.5, (out, width // 32)) / (73 * width**0.5)).astype(np.float16)
    return jnp.asarray(rng.integers(-128, 128, (out, width), np.int8)), jnp.asarray(scales)


def qkv_arguments(rows, n, k, h, width):
    cos, sin = normal(4, *rows, h // 2), normal(5, *rows, h // 2)
    weight = random_weight(3, (n + 2 * k) * h, width)
    x, norm = normal(1, *rows, width, dtype=jnp.bfloat16), 1 + normal(2, width, std=0.1)
    return x, norm, weight, normal(6, (n + 2 * k) * h), cos, sin


def wide(x):
    return x.astype(jnp.float32)


def agree(actual, expected, limit=4e-3):
    """Each result's error relative to its 2-norm is below `limit`."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.linalg.norm(a - e) <= limit * np.linalg.norm(e)


def same_twice(f, *args):
    first, second = f(*args), f(*args)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(wide(a)), np.asarray(wide(b)))
    return first


# Plans


@pytest.mark.parametrize(("out", "width", "joined"), SHAPES + ODD)
def test_heuristic_fits(out, width, joined):
    config = skinny.heuristic(out, width, joined)
    assert config.warps % 4 == 0 and config.warps % config.split == 0
    assert config.tiles % joined == 0
    assert width // 32 % config.chunk == 0
    # Three registers a block and tile, of what a thread has left beside some 60 for everything else.
    assert 3 * config.chunk * config.depth * config.tiles <= 65536 // (32 * config.warps) - 60


@pytest.mark.parametrize(("out", "width", "joined"), SHAPES)
def test_search_space_is_valid(out, width, joined):
    space = list(skinny.search_space(out, width, joined))
    assert len(set(space)) > 20
    for config in space:
        assert config.warps % config.split == 0 and config.tiles % joined == 0 and width // 32 % config.chunk == 0


# What is refused


@lowers
def test_other_arguments_are_refused_by_name():
    x, (values, scales) = normal(1, 2, 64, dtype=jnp.bfloat16), random_weight(2, 24, 64)

    def multiply(x, weight):
        return quant_matmul(x, weight, implementation="mosaic_gpu")

    def few_rows(x, values, scales):
        return products.matmul(skinny.run, x, values, scales, None, None, x.dtype)

    with pytest.raises(NotImplementedError, match="not int8 blocks"):
        multiply(x, values.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="float32"):
        multiply(wide(x), (values, scales))
    with pytest.raises(NotImplementedError, match="9 rows"):
        few_rows(jnp.zeros((9, 64), jnp.bfloat16), values, scales)
    with pytest.raises(NotImplementedError, match=r"weights \(20, 64\)"):
        multiply(x, (values[:20], scales[:20]))
    with pytest.raises(NotImplementedError, match="shared memory"):
        few_rows(jnp.zeros((8, 16384), jnp.bfloat16), *random_weight(2, 8, 16384))
    arguments = qkv_arguments((1, 1), 3, 1, 32, 64)
    with pytest.raises(NotImplementedError, match="rotated"):
        partly = (*arguments[:4], arguments[4][..., :8], arguments[5][..., :8])
        qkv_rope(*partly, n_heads=3, n_kv_heads=1, eps=1e-6, implementation="mosaic_gpu")
    cache = jnp.zeros((1, 1, 4, 32))
    with pytest.raises(NotImplementedError, match="cache"):
        slots = jnp.zeros((1, 1), jnp.int32)
        qkv_rope_store(*arguments, cache, cache, slots, n_heads=3, eps=1e-6, implementation="mosaic_gpu")


# Code: made for a Hopper GPU on any machine


@lowers
@pytest.mark.parametrize("rows", [1, 8, 24])
def test_lowers(rows):
    x, norm = normal(1, rows, 896, dtype=jnp.bfloat16), normal(2, 896)
    up, down = random_weight(3, 2 * 176, 896), random_weight(4, 896, 176 // 32 * 32)
    arguments = qkv_arguments((rows, 1), 3, 1, 32, 96)
    cache = jnp.zeros((rows, 1, 8, 32), jnp.bfloat16)
    slots = jnp.zeros((rows, 1), jnp.int32)

    def everything(x, norm, up, down, arguments, cache, slots):
        return (
            quant_matmul(x, up, normal(5, 352), normal(6, rows, 352, dtype=jnp.bfloat16), out_dtype=jnp.float32),
            swiglu(x, norm, (up[0][:320], up[1][:320]), down, eps=1e-6),
            qkv_rope(*arguments, n_heads=3, n_kv_heads=1, eps=1e-6),
            qkv_rope_store(*arguments, cache, cache, slots, n_heads=3, eps=1e-6),
        )

    with pallas_kernels.use("mosaic_gpu"):
        traced = jax.jit(everything).trace(x, norm, up, down, arguments, cache, slots)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("quant_matmul", "gate_up", "qkv_rope", "qkv_rope_store"):
        assert f"{name}_mosaic_gpu" in text


@lowers
@pytest.mark.parametrize("rows", [1, 24])
def test_lowers_under_vmap(rows):
    x, norm, weight, bias, cos, sin = qkv_arguments((rows, 1), 3, 1, 32, 96)
    keys, slots = jnp.zeros((2, rows, 1, 8, 32), jnp.bfloat16), jnp.zeros((2, rows, 1), jnp.int32)

    def store(x, keys, values, slots):
        return qkv_rope_store(x, norm, weight, bias, cos, sin, keys, values, slots, n_heads=3, eps=1e-6)

    with pallas_kernels.use("mosaic_gpu"):
        traced = jax.jit(jax.vmap(store)).trace(jnp.stack([x, x]), keys, keys, slots)
    assert "qkv_rope_store_mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@lowers
def test_many_rows_are_rotated_and_stored_by_one_kernel():
    def shapes(*args):
        x, norm, weight, bias, cos, sin = args
        cache = jnp.zeros((64, 8, 16, 96), jnp.bfloat16)
        return x, norm, weight, bias, cos, sin, cache, cache, jnp.zeros((64, 1), jnp.int32)

    arguments = jax.eval_shape(lambda: shapes(*qkv_arguments((64, 1), 32, 8, 96, 3072)))
    f = jax.jit(partial(qkv_rope_store, n_heads=32, eps=1e-6, implementation="mosaic_gpu"))
    text = f.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "qkv_rope_store_mosaic_gpu" in text and "scatter" not in text


@lowers
@pytest.mark.parametrize("rows", [8, 64])
def test_a_cache_that_varies_over_a_checked_mesh_is_written_by_xla(rows):
    arguments = jax.eval_shape(lambda: qkv_arguments((rows, 1), 32, 8, 96, 3072))
    cache = jax.ShapeDtypeStruct((rows, 8, 16, 96), jnp.bfloat16)
    x, varying, fixed = arguments[0], PartitionSpec("x"), PartitionSpec()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        partial(qkv_rope_store, n_heads=32, eps=1e-6), mesh=mesh, out_specs=varying,
        in_specs=(varying, fixed, fixed, fixed, varying, varying, varying, varying, varying),
    )  # fmt: skip
    with pallas_kernels.use("mosaic_gpu"):
        traced = jax.jit(run).trace(x, *arguments[1:], cache, cache, jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    assert "scatter" in traced.lower(lowering_platforms=("cuda",)).as_text()


# The op with the cache, in plain JAX


def test_qkv_rope_store_writes_where_it_is_told_to():
    arguments = qkv_arguments((2, 3), 3, 1, 16, 64)
    keys, values = normal(7, 2, 1, 5, 16, dtype=jnp.bfloat16), normal(8, 2, 1, 5, 16, dtype=jnp.bfloat16)
    slots = jnp.array([[4, 0, 5], [-1, 2**31 - 1, 3]], jnp.int32)
    q, stored_keys, stored_values = qkv_rope_store(*arguments, keys, values, slots, n_heads=3, eps=1e-6)
    expected_q, k, v = qkv_rope(*arguments, n_heads=3, n_kv_heads=1, eps=1e-6)
    np.testing.assert_array_equal(np.asarray(wide(q)), np.asarray(wide(expected_q)))
    for old, new, stored in ((keys, k, stored_keys), (values, v, stored_values)):
        expected = np.array(wide(old))
        for row, token, slot in ((0, 0, 4), (0, 1, 0), (1, 2, 3)):
            expected[row, :, slot] = np.asarray(wide(new))[row, token]
        np.testing.assert_array_equal(np.asarray(wide(stored)), expected)


# Results


@needs_hopper
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("out", "width"), [(out, width) for out, width, joined in SHAPES + ODD if joined == 1])
def test_quant_matmul(rows, out, width):
    x, weight = normal(1, rows, width, dtype=jnp.bfloat16), random_weight(2, out, width)
    bias, residual = normal(3, out), normal(4, rows, out, dtype=jnp.bfloat16)
    x = x.at[0].multiply(jnp.bfloat16(1e4))  # one hot row
    for extra, dtype, limit in (((None, None), jnp.float32, 1e-5), ((bias, residual), jnp.bfloat16, 4e-3)):
        f = jax.jit(lambda *args, dtype=dtype: quant_matmul(*args, out_dtype=dtype, implementation="mosaic_gpu"))
        y = same_twice(f, x, weight, *extra)
        added = [None if e is None else wide(e) for e in extra]
        expected = reference(wide(x), weight, *added, jnp.float32)
        for actual_row, expected_row in zip(y, expected, strict=True):
            agree(actual_row, expected_row, limit)


@needs_hopper
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("width", "units"), [(896, 4864), (3072, 8192), (576, 1536), (96, 32)])
def test_swiglu(rows, width, units):
    x, norm = normal(1, rows, width, dtype=jnp.bfloat16), 1 + normal(2, width, std=0.1)
    up, down = random_weight(3, 2 * units, width), random_weight(4, width, units)
    y = same_twice(jax.jit(lambda *args: swiglu(*args, eps=1e-6, implementation="mosaic_gpu")), x, norm, up, down)
    gate, linear = jnp.split(reference(wide(rms_norm(x, norm, 1e-6)), up, out_dtype=jnp.float32), 2, axis=-1)
    agree(y, reference(jax.nn.silu(gate) * linear, down, None, wide(x), jnp.float32))


@needs_hopper
@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (2, 4), (300, 1), (200, 5)])
@pytest.mark.parametrize(("n", "k", "h", "width"), HEADS)
def test_qkv_rope(rows, n, k, h, width):
    arguments = qkv_arguments(rows, n, k, h, width)
    x, norm, weight, bias, cos, sin = arguments
    projected = reference(wide(rms_norm(x, norm, 1e-6)), weight, bias, None, jnp.float32)
    q, key, value = jnp.split(projected.reshape(*rows, -1, h), [n, n + k], axis=2)
    expected = rotate(q, cos, sin), rotate(key, cos, sin), value
    f = jax.jit(lambda *args: qkv_rope(*args, n_heads=n, n_kv_heads=k, eps=1e-6, implementation="mosaic_gpu"))
    agree(same_twice(f, *arguments), expected)

    keys, values = (normal(seed, rows[0], k, 6, h, dtype=jnp.bfloat16) for seed in (7, 8))
    slots = jnp.stack([jnp.roll(jnp.arange(6, dtype=jnp.int32), row)[: rows[1]] for row in range(rows[0])])
    slots = slots.at[0, 0].set(6)  # beyond the end
    store = jax.jit(lambda *args: qkv_rope_store(*args, n_heads=n, eps=1e-6, implementation="mosaic_gpu"))
    plain = jax.jit(lambda *args: qkv_rope_store(*args, n_heads=n, eps=1e-6, implementation="xla"))
    agree(same_twice(store, *arguments, keys, values, slots), plain(*arguments, keys, values, slots))
