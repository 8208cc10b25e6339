"""The Hopper kernels that take tokens as rows: their plans, and their threads' code run on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import simt
from test_quant_matmul_mosaic import agree, normal, random_weight

from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu import finishing, products
from pallas_kernels.mosaic_gpu import quant_matmul_skinny as skinny
from pallas_kernels.mosaic_gpu import quant_matmul_small as small
from pallas_kernels.mosaic_gpu.quant_matmul import kernel_for
from pallas_kernels.mosaic_gpu.quant_matmul_small import Config
from pallas_kernels.qkv_rope import split_heads, store
from pallas_kernels.quant_matmul import reference
from pallas_kernels.rms_norm import rms_norm

if not hasattr(jax.experimental.mosaic.gpu.utils, "inline_ptx"):
    pytest.skip("needs jax 0.11.2 or newer, whose Mosaic GPU can inline PTX", allow_module_level=True)


LAUNCH = products.launch


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    if not on_hopper():
        monkeypatch.setattr(products, "launch", simt.launch)


def runner(config):
    """The kernel whose configuration it is, with it."""
    return partial((small if isinstance(config, Config) else skinny).run, config=config)


# m, out, width, configuration
CASES = {
    "a row": (1, 48, 128, Config(8, 4, 4, 1, 2)),
    "eight rows, odd sizes": (8, 80, 160, Config(8, 4, 4, 2, 2)),
    "a group a warp": (5, 112, 96, Config(8, 4, 1, 2, 1)),
    "two groups": (7, 176, 192, Config(8, 8, 4, 1, 3)),
    "two row groups": (30, 48, 128, Config(16, 4, 4, 1, 1)),
    "many rows": (64, 80, 256, Config(64, 8, 8, 1, 2)),
    "more items than warps": (64, 96, 256, Config(64, 4, 4, 2, 2)),
    "groups with more items than warps": (64, 144, 256, Config(64, 8, 2, 2, 1)),
    "part of the rows": (41, 32, 256, Config(48, 8, 8, 1, 1)),
    "a cluster": (16, 48, 768, Config(16, 4, 4, 1, 2, 4)),
    "a cluster of three, shares of two sizes": (9, 80, 960, Config(16, 4, 4, 1, 2, 3)),
    "a cluster of groups": (64, 144, 512, Config(64, 8, 4, 1, 2, 2)),
    # warps, split, tiles, chunk, depth, resident
    "skinny, a row": (1, 48, 256, skinny.Config(4, 4, 1, 2, 1)),
    "skinny, eight rows, a share left over": (8, 40, 320, skinny.Config(4, 4, 1, 2, 2)),
    "skinny, steps": (3, 24, 1024, skinny.Config(4, 2, 2, 4, 2)),
    "skinny, a group a warp": (5, 72, 96, skinny.Config(4, 1, 1, 1, 2)),
    "skinny, in turn": (7, 1100 * 8, 64, skinny.Config(4, 2, 2, 1, 1, 1)),
    "skinny, in turn with steps": (2, 600 * 8, 256, skinny.Config(4, 1, 1, 4, 1, 1)),
    "skinny, scales one by one": (4, 32, 160, skinny.Config(4, 4, 1, 1, 1)),
}


@pytest.mark.parametrize("m", [9, 16, 40, 64, 128])
@pytest.mark.parametrize(
    ("out", "width", "normed"),
    [(1152, 896, True), (896, 896, False), (9728, 896, True), (896, 4864, False), (3072, 3072, False)],
)
def test_heuristic_is_valid(m, out, width, normed):
    space = list(small.search_space(m, out, width, normed))
    assert small.heuristic(m, out, width, normed) in space
    for config in space:
        plan = small.Plan(m, width, out // 16, config)
        assert plan.row_groups * config.rows >= m
        assert plan.ctas * config.units * plan.groups * config.tiles * 16 >= out
        assert plan.shared_bytes <= small.SHARED_BYTES


def test_the_kernel_follows_from_the_size():
    def kernel(m, out, width):
        return kernel_for(jnp.zeros((m, 1, width), jnp.bfloat16), jnp.zeros((out, width), jnp.int8), out > width)

    assert [kernel(m, 1152, 896) for m in (1, 8, 9, 64, 2048)] == ["skinny", "skinny", "small", "small", "large"]
    assert [kernel(m, 9728, 896) for m in (16, 64)] == ["small", "large"]
    assert kernel(8, 16384, 3072) == "skinny"
    assert kernel(16, 16384, 3072) == "large"  # more than the shared memory of all multiprocessors


def test_what_does_not_fit_is_refused():
    x, weight = jnp.zeros((16, 16384), jnp.bfloat16), random_weight(2, 48, 16384)
    with pytest.raises(NotImplementedError, match="more than shared memory holds"):
        products.gate_up(small.run, x, jnp.ones(16384), *weight, 1e-6)
    with pytest.raises(NotImplementedError, match="Config"):
        run = runner(Config(16, 4, 4, 1, 1, 4))
        products.matmul(run, x[:, :64], *random_weight(2, 48, 64), None, None, x.dtype)
    with pytest.raises(NotImplementedError, match="float32"):
        products.matmul(small.run, x.astype(jnp.float32), *weight, None, None, x.dtype)
    with pytest.raises(NotImplementedError, match=r"weights \(40, 64\)"):
        products.matmul(small.run, x[:, :64], *random_weight(2, 40, 64), None, None, x.dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extras", [True, False])
def test_matmul(case, extras):
    m, out, width, config = CASES[case]
    x, weight = normal(1, m, width, dtype=jnp.bfloat16), random_weight(2, out, width)
    bias, residual = (normal(3, out), normal(4, m, out, dtype=jnp.bfloat16)) if extras else (None, None)
    dtype = jnp.bfloat16 if extras else jnp.float32
    y = products.matmul(runner(config), x, *weight, bias, residual, jnp.dtype(dtype))
    assert y.dtype == dtype
    agree(y, reference(x.astype(jnp.float32), weight, bias, residual), 4e-3 if extras else 1e-5)


@pytest.mark.parametrize("config", [
    Config(8, 4, 4, 1, 1), Config(8, 4, 1, 1, 2), Config(16, 8, 4, 2, 1), Config(16, 4, 4, 1, 3),
    Config(16, 4, 4, 2, 2), skinny.Config(4, 4, 2, 3, 1), skinny.Config(16, 4, 2, 1, 2), skinny.Config(8, 2, 4, 3, 1),
])  # fmt: skip
def test_gate_up(config):
    m, width, units = 13 if getattr(config, "rows", 8) > 8 else 6, 288, 40
    x, norm = normal(1, m, width, dtype=jnp.bfloat16), 1 + normal(2, width, std=0.1)
    x = x.at[0].multiply(jnp.bfloat16(1e4)).at[1].multiply(jnp.bfloat16(1e-3))
    weight = random_weight(3, 2 * units, width)
    y = products.gate_up(runner(config), x, norm, *weight, 1e-6)
    h = rms_norm(x, norm, 1e-6).astype(jnp.float32)
    gate, linear = jnp.split(reference(h, weight, out_dtype=jnp.float32), 2, axis=-1)
    for row, expected in zip(y, jax.nn.silu(gate) * linear, strict=True):
        agree(row, expected)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("config", [
    Config(8, 4, 2, 1, 2), Config(16, 4, 4, 1, 1), Config(16, 4, 2, 2, 2), Config(32, 4, 4, 1, 3),
    skinny.Config(4, 2, 2, 1, 2), skinny.Config(8, 4, 4, 1, 1, 1),
])  # fmt: skip
def test_qkv_rope(config, stored):
    batch, length, n, k, head_dim, width = (
        (2, 3, 3, 1, 32, 96) if getattr(config, "rows", 8) == 8 else (2, 13, 3, 2, 16, 128)
    )
    m = batch * length
    x, norm = normal(1, batch, length, width, dtype=jnp.bfloat16), 1 + normal(2, width, std=0.1)
    weight, bias = random_weight(3, (n + 2 * k) * head_dim, width), normal(6, (n + 2 * k) * head_dim)
    cos, sin = normal(4, batch, length, head_dim // 2), normal(5, batch, length, head_dim // 2)
    keys, values = (normal(seed, batch, k, 15, head_dim, dtype=jnp.bfloat16) for seed in (7, 8))
    slots = jnp.stack([jnp.roll(jnp.arange(15, dtype=jnp.int32), row)[:length] for row in range(batch)])
    slots = slots.at[0, 0].set(15).at[1, 1].set(-1)  # nowhere
    cache = (keys, values, slots) if stored else None
    flat = x.reshape(m, width)
    q, *rest = products.qkv_rope(
        runner(config), flat, norm, *weight, bias, cos.reshape(m, -1), sin.reshape(m, -1), n, k, 1e-6, cache
    )
    h = rms_norm(x, norm, 1e-6).astype(jnp.float32)
    expected_q, *expected = split_heads(reference(h, weight, bias), cos, sin, n, k)
    if stored:
        expected = store(*expected, *(c.astype(jnp.float32) for c in (keys, values)), slots)
    else:
        rest = [y.reshape(batch, length, k, head_dim) for y in rest]
    agree((q.reshape(expected_q.shape), *rest), (expected_q, *expected))


@pytest.mark.parametrize("stored", [False, True])
def test_sums_that_exist_are_finished(stored):
    batch, length, n, k, head_dim = 2, 5, 3, 2, 48
    m, heads = batch * length, n + 2 * k
    sums = normal(1, batch, length, heads * head_dim, dtype=jnp.bfloat16)
    cos, sin = normal(4, batch, length, head_dim // 2), normal(5, batch, length, head_dim // 2)
    keys, values = (normal(seed, batch, k, 9, head_dim, dtype=jnp.bfloat16) for seed in (7, 8))
    slots = jnp.arange(m, dtype=jnp.int32).reshape(batch, length) - 1  # -1 and 9 or more: nowhere
    weight = random_weight(3, heads * head_dim, 64)  # has been multiplied by
    q, *rest = products.qkv_rope(
        finishing.run, sums.reshape(m, -1), jnp.ones(64), *weight, None, cos.reshape(m, -1), sin.reshape(m, -1), n, k,
        1e-6, (keys, values, slots) if stored else None,
    )  # fmt: skip
    expected_q, *expected = split_heads(sums.astype(jnp.float32), cos, sin, n, k)
    if stored:
        expected = store(*expected, *(c.astype(jnp.float32) for c in (keys, values)), slots)
    else:
        rest = [y.reshape(batch, length, k, head_dim) for y in rest]
    agree((q.reshape(expected_q.shape), *rest), (expected_q, *expected))


def test_what_works_in_place_reads_no_slices():
    """XLA would fuse a slice into the kernel, and forget that the kernel's results are its operands, changed."""
    x, weight = normal(1, 16, 128, dtype=jnp.bfloat16), random_weight(3, 3 * 32, 128)
    angles, cache = jnp.zeros((3, 16)), jnp.zeros((3, 1, 8, 32), jnp.bfloat16)

    def run(x, norm, weight, angles, cache, slots):
        return products.qkv_rope(
            runner(Config(8, 4, 2, 1, 2)), x[:3], norm, *weight, None, angles, angles, 1, 1, 1e-6,
            (cache, cache + 1, slots),
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "launch", LAUNCH)
        jaxpr = jax.make_jaxpr(run)(x, jnp.ones(128), weight, angles, cache, jnp.zeros((3, 1), jnp.int32)).jaxpr
    made_by = {id(var): eqn.primitive.name for eqn in jaxpr.eqns for var in eqn.outvars}
    kernel = max(jaxpr.eqns, key=lambda eqn: sum(made_by.get(id(var)) == "new_ref" for var in eqn.invars))
    assert sorted(made_by[id(var)] for var in kernel.invars) == ["new_ref"] * 2 + ["optimization_barrier"] * 7
