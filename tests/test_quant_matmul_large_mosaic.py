"""The Hopper kernel for many rows: its arithmetic and plans on any device, its results on a Hopper GPU.

JAX's interpreter has no wgmma with an operand in registers, so that elsewhere the kernel is only lowered.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.implementation import on_hopper

kernel = pytest.importorskip("pallas_kernels.mosaic_gpu.quant_matmul_large")
needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs an NVIDIA Hopper GPU")
needs_lowering = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11), reason="needs Mosaic GPU as of jax 0.11"
)

# (out, in) of Qwen2.5-0.5B and Phi-3-mini: queries, keys and values; attention's output; down.
QWEN, PHI = [(1152, 896), (896, 896), (896, 4864)], [(9216, 3072), (3072, 3072), (3072, 8192)]
GATE_UP = [(4864, 896), (8192, 3072)]
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
    with pytest.raises(ValueError, match="even"):
        kernel.gate_up(x, *arguments(8, 128, 64)[1:3], config=kernel.Config(192, 4, chunk=32))


@needs_lowering
@pytest.mark.parametrize("m", [5, 96])
@pytest.mark.parametrize("form", ["plain", "all", "gate_up", "split"])
def test_it_lowers_for_a_gpu(m, form):
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(m, 128, 448)]

    def run(x, values, scales, bias, residual):
        if form == "gate_up":
            return kernel.gate_up(x, values, scales)
        config = kernel.Config(64, 4, split=4) if form == "split" else None
        bias, residual = (bias, residual) if form == "all" else (None, None)
        return kernel.matmul(x, values, scales, bias, residual, config=config)

    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.out_info.shape == (m, 64 if form == "gate_up" else 128)
    assert "mosaic_gpu" in lowered.as_text()


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
def test_one_hot_rows_pick_columns():
    """Large magnitudes beside zeros: a wrong place in any layout would show."""
    m, out, width = 128, 256, 128
    _, values, scales, *_ = arguments(m, out, width)
    x = jnp.eye(m, width, dtype=jnp.bfloat16) * 2**12
    assert np.array_equal(np.asarray(kernel.matmul(x, values, scales), np.float64), product(x, values, scales))
