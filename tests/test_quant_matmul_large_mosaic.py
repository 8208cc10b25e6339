"""The Hopper kernel for many rows: its arithmetic and plans on any device, its results on a Hopper GPU.

JAX's interpreter has no wgmma with an operand in registers, so that elsewhere the kernel is only lowered. What the
greatest form does with its products is run by `simt`.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simt
from jax.experimental.mosaic.gpu import utils as mgpu_utils

from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu import threads
from pallas_kernels.quant_matmul_argmax import agree

kernel = pytest.importorskip("pallas_kernels.mosaic_gpu.quant_matmul_large")
greatest = pytest.importorskip("pallas_kernels.mosaic_gpu.greatest")
needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs an NVIDIA Hopper GPU")
needs_lowering = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="needs Mosaic GPU as of jax 0.11"
)

# (out, in) of Qwen2.5-0.5B and Phi-3-mini: queries, keys and values; attention's output; down.
QWEN, PHI = [(1152, 896), (896, 896), (896, 4864)], [(9216, 3072), (3072, 3072), (3072, 8192)]
GATE_UP = [(4864, 896), (8192, 3072)]
HEADS = [(151936, 896), (32064, 3072)]
ROWS = [65, 128, 256, 512, 2048, 8192]


def arguments(m, out, width, dtype=jnp.bfloat16, seed=0):
    """x, values, scales, bias and residual: scales of both signs, and none for one block of each row."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(-1.5, 1.5, (out, width // 32)) / (73 * width**0.5)
    scales[:, 0] = 0
    return (
        jnp.asarray(rng.standard_normal((m, width)), jnp.bfloat16),
        jnp.asarray(rng.integers(-128, 128, (out, width), np.int8)),
        jnp.asarray(scales, jnp.float16),
        jnp.asarray(rng.standard_normal(out), jnp.bfloat16),
        jnp.asarray(rng.standard_normal((m, out)), dtype),
    )


def product(x, values, scales):
    """x times the weights, which are rounded to bfloat16, in float64."""
    exact = np.asarray(values, np.float32) * np.repeat(np.asarray(scales, np.float32), 32, axis=1)
    return np.asarray(x, np.float64) @ np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float64).T


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def test_conversion_is_exact():
    """Every int8 times any scale: BIAS + 128 + v by its bits, and one fused multiply-add without rounding."""
    v = np.arange(-128, 128)
    bits = np.float32(kernel.BIAS).view(np.int32) | (v.astype(np.uint8) ^ 0x80).astype(np.int32) << 8
    biased = bits.view(np.float32)[:, None]
    assert np.array_equal(biased[:, 0], kernel.BIAS + 128 + v)
    scales = np.arange(0, 1 << 16, 7, dtype=np.uint16).view(np.float16)
    scales = np.concatenate([scales[np.isfinite(scales)], np.float16([6.1e-5, 6e-8, 65504])]).astype(np.float32)
    shift = scales * np.float32(-(kernel.BIAS + 128))
    assert np.array_equal(shift.astype(np.float64), scales.astype(np.float64) * -(kernel.BIAS + 128))
    fused = biased.astype(np.float64) * scales + shift  # both exact: 35 bits, and then fewer
    assert np.array_equal(fused, v[:, None] * scales.astype(np.float64))
    assert np.array_equal(fused.astype(np.float32), fused)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("out, width", QWEN + PHI)
@pytest.mark.parametrize("residual, out_bytes", [(False, 2), (True, 2), (True, 4)])
def test_heuristic_is_in_the_search_space(m, out, width, residual, out_bytes):
    settings = m, out, width, out_bytes, False, residual
    space = list(kernel.search_space(*settings))
    chosen = kernel.heuristic(*settings)
    assert chosen in space and len(set(space)) == len(space)
    assert all(c.shared_memory(out_bytes, False, residual) <= kernel.SHARED_MEMORY and c.stages > 2 for c in space)
    assert all(c.chunks(False) * c.rows_at_once(False) * c.split == c.tile_m for c in space)
    assert chosen.tile_m < 2 * m


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("out, width", GATE_UP)
def test_heuristic_of_swiglu_is_in_the_search_space(m, out, width):
    space = list(kernel.search_space(m, out, width, 2, True))
    assert kernel.heuristic(m, out, width, 2, True) in space
    for config in space:
        assert config.shared_memory(2, True) <= kernel.SHARED_MEMORY
        assert config.split == 1 and config.chunks(True) % 2 == 0
        assert 2 * config.chunks(True) * config.rows_at_once(True) == config.tile_m


@pytest.mark.parametrize("m", [9, 64, 128, 1000])
@pytest.mark.parametrize("out, width", HEADS)
def test_heuristic_of_the_greatest_form_is_in_the_search_space(m, out, width):
    space = list(kernel.search_space(m, out, width, out_bytes=0))
    assert kernel.heuristic(m, out, width, out_bytes=0) in space
    assert {c.cluster for c in space} == {1, 2}
    for config in space:
        assert config.shared_memory(0) <= kernel.SHARED_MEMORY
        assert config.split == 1 and config.tile_m <= kernel.GREATEST_TILE


def test_it_refuses_what_it_cannot_do():
    x, values, scales, _, residual = arguments(8, 128, 64)
    for changed in (
        dict(x=x.astype(jnp.float32)),
        dict(values=values.astype(jnp.int16)),
        dict(scales=scales.astype(jnp.float32)),
        dict(out_dtype=jnp.float16),
        dict(residual=residual, out_dtype=jnp.float32),
        dict(x=x[:, :32], values=values[:, :32], scales=scales[:, :1]),
        dict(values=values[:32], scales=scales[:32]),
        dict(values=values[:64], scales=scales[:64]),
        dict(x=x[:0]),
    ):
        with pytest.raises(NotImplementedError):
            kernel.matmul(**(dict(x=x, values=values, scales=scales) | changed))
    with pytest.raises(NotImplementedError):
        kernel.gate_up(x, values[:64], scales[:64])  # 32 rows of each
        with pytest.raises(NotImplementedError):
            kernel.argmax(**(dict(x=x, values=values, scales=scales, known=7) | changed))
    with pytest.raises(NotImplementedError, match="more than fit"):
        kernel.argmax(jnp.zeros((20_000, 64), jnp.bfloat16), values, scales, 7)
    with pytest.raises(ValueError, match="even"):
        kernel.gate_up(x, *arguments(8, 128, 64)[1:3], config=kernel.Config(192, 4, chunk=32))


@needs_lowering
@pytest.mark.parametrize("m", [5, 96])
@pytest.mark.parametrize("form", ["plain", "all", "gate_up", "split", "greatest"])
def test_it_lowers_for_a_gpu(m, form):
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(m, 128, 448)]

    def run(x, values, scales, bias, residual):
        if form == "gate_up":
            return kernel.gate_up(x, values, scales)
        if form == "greatest":
            return kernel.argmax(x, values, scales, 100)
        config = kernel.Config(64, 4, split=4) if form == "split" else None
        bias, residual = (bias, residual) if form == "all" else (None, None)
        return kernel.matmul(x, values, scales, bias, residual, config=config)

    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    if form == "greatest":
        assert [x.shape for x in lowered.out_info] == [(m,), (m,)]
    else:
        assert lowered.out_info.shape == (m, 64 if form == "gate_up" else 128)
    assert "mosaic_gpu" in lowered.as_text()


def greatest_of(y):
    """The greatest of each row of y and its first place; a NaN is the greatest."""
    return y.max(axis=1), y.argmax(axis=1)


@pytest.mark.skipif(not hasattr(mgpu_utils, "inline_ptx"), reason="needs Mosaic GPU that can inline PTX")
@pytest.mark.parametrize("columns, known", [(32, 256), (64, 200), (16, 70), (16, 1)])
def test_threads_agree_on_the_greatest(columns, known):
    """Two warpgroups take two tiles [64, columns] of y^T each."""
    rng = np.random.default_rng(columns)
    y = rng.integers(-40, 20, (256, columns)).astype(np.float32)  # with ties
    y[known:] += 100
    y[:, 3] = -np.inf
    y[rng.integers(0, known, 4), [5, 5, 6, 7]] = np.nan
    y[:, 8], y[-1:, 8] = -0.0, 0.0
    y[known // 2, 9] = np.inf

    def emit(_, y, values, places, _shared):
        y, *to = (threads.global_address(ref) for ref in (y, values, places))
        index = threads.thread_index()
        group, lane = index // 128, index % 32
        row = index % 128 // 32 * 16 + lane // 4
        best = [threads.constant(-np.inf, threads.f32())] * (columns // 4), [threads.constant(0)] * (columns // 4)
        for tile in range(2):
            for half in range(2):
                place = (group + 2 * tile) * 64 + row + 8 * half
                at = [(place * columns + lane % 4 * 2 + (8 * j + i)) * 4 for j in range(columns // 8) for i in range(2)]
                new = [threads.load_global(y + offset.wide())[0].float() for offset in at]
                best = greatest.keep_greater(*best, new, place, known)
        greatest.store_greatest(*best, [address + (group * 16).wide() for address in to], 8)

    parts = np.full((columns, 8), np.nan, np.float32), np.full((columns, 8), -1, np.int32)
    _, *found = simt.run(emit, [y, *parts], [0], 1, 256, 1)
    value, place = agree(*map(jnp.asarray, found))
    expected = greatest_of(y[:known].T)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(place, expected[1])


@needs_lowering
@pytest.mark.parametrize("m", [111, 700])
def test_every_configuration_can_be_traced(m):
    x, values, scales, *_ = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(m, 128, 512))
    space = list(kernel.search_space(m, 128, 512))
    assert {c.split for c in space} == {1, 2, 4, 8}
    for config in space:
        assert jax.eval_shape(partial(kernel.matmul, config=config), x, values, scales).shape == (m, 128)


@needs_hopper
@pytest.mark.parametrize("m", [65, 128, 520, 1001])
@pytest.mark.parametrize("out, width", [*QWEN, (3072, 3072), (576, 64), (128, 192), (192, 128), (320, 1088)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_matmul(m, out, width, dtype):
    x, values, scales, bias, residual = arguments(m, out, width, dtype)
    run = jax.jit(lambda *args: kernel.matmul(*args, out_dtype=dtype))
    actual = run(x, values, scales, bias, residual)
    expected = product(x, values, scales) + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (1e-2 if dtype == jnp.bfloat16 else 2e-3)
    assert np.array_equal(actual, run(x, values, scales, bias, residual))


@needs_hopper
@pytest.mark.parametrize("m", [65, 520])
@pytest.mark.parametrize("out, width", [(896, 4864), (320, 1088)])
def test_every_configuration(m, out, width):
    x, values, scales, *_ = arguments(m, out, width)
    expected = product(x, values, scales)
    for config in kernel.search_space(m, out, width):
        for stages in {config.stages, 3}:
            actual = jax.jit(kernel.matmul, static_argnames="config")(
                x, values, scales, config=replace(config, stages=stages)
            )
            assert relative_error(actual, expected) < 1e-2, config


@needs_hopper
@pytest.mark.parametrize("m", [65, 520, 1001])
@pytest.mark.parametrize("out, width", [*GATE_UP, (64, 64), (320, 448)])
def test_gate_up(m, out, width):
    x, values, scales, *_ = arguments(m, 2 * out, width)
    run = jax.jit(kernel.gate_up)
    actual = run(x, values, scales)
    gate, up = np.split(product(x, values, scales), 2, axis=1)
    assert relative_error(actual, gate / (1 + np.exp(-gate)) * up) < 1e-2
    assert np.array_equal(actual, run(x, values, scales))


@needs_hopper
@pytest.mark.parametrize("m", [9, 64, 100, 128, 300])
@pytest.mark.parametrize("out, width, known", [(4096, 896, 4000), (4096 + 64, 192, 4160), (32064, 3072, 32011)])
def test_argmax_is_that_of_the_products(m, out, width, known):
    x, values, scales, *_ = arguments(m, out, width)
    values = values.at[known // 2 : known // 2 + 8].set(values[:8])  # ties, if one of them is the greatest
    scales = scales.at[known // 2 : known // 2 + 8].set(4 * scales[:8]).at[:8].multiply(4).at[known:].set(100)
    x = x.at[1].set(jnp.nan).at[2, 0].set(jnp.inf).at[3].set(0)
    product = jax.jit(partial(kernel.matmul, out_dtype=jnp.float32, config=kernel.Config(32, 4)))  # not split
    y = np.asarray(product(x, values, scales))[:, :known]
    run = jax.jit(kernel.argmax, static_argnames=("known", "config"))
    for config in (None, *kernel.search_space(m, out, width, out_bytes=0)):
        for found in (run(x, values, scales, known=known, config=config) for _ in range(2)):
            np.testing.assert_array_equal(found[0], greatest_of(y)[0])
            np.testing.assert_array_equal(found[1], greatest_of(y)[1])


@needs_hopper
def test_one_hot_rows_pick_columns():
    """Large magnitudes beside zeros: a wrong place in any layout would show."""
    m, out, width = 128, 256, 128
    _, values, scales, *_ = arguments(m, out, width)
    x = jnp.eye(m, width, dtype=jnp.bfloat16) * 2**12
    assert np.array_equal(np.asarray(kernel.matmul(x, values, scales), np.float64), product(x, values, scales))
