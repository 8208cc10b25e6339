"""The top_k kernel: on a Hopper GPU as it is, elsewhere its code for each thread run by `simt`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.mosaic.gpu.utils")
if not hasattr(jax.experimental.mosaic.gpu.utils, "inline_ptx"):
    pytest.skip("needs jax 0.11.2 or newer, whose Mosaic GPU can inline PTX", allow_module_level=True)

import simt

import pallas_kernels
from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu import products
from pallas_kernels.mosaic_gpu import top_k as kernel


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    if not on_hopper():
        monkeypatch.setattr(products, "launch", simt.launch)


def check(x, k, known=None):
    """The kernel's result is NumPy's stable sort."""
    order = np.argsort(-x[:, :known], axis=-1, kind="stable")[:, :k]
    values, ids = pallas_kernels.top_k(jnp.asarray(x), k, known=known, implementation="mosaic_gpu")
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))


def random(rows, width, ties=False):
    x = np.random.default_rng(width).standard_normal((rows, width)).astype(np.float32)
    return np.round(x * 8) / 8 if ties else x


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize(
    ("rows", "width", "k", "known"),
    [(1, 5000, 64, 5000), (2, 4097, 1, 4000), (2, 256, 64, 256), (3, 3000, 40, 2998), (1, 20000, 64, 19999)],
)
def test_it_is_the_order_of_a_stable_sort(monkeypatch, rows, width, k, known, cluster, ties):
    monkeypatch.setattr(kernel, "plan_for", lambda *sizes: kernel.Plan(*sizes, cluster))
    x = random(rows, width, ties)
    x[:, known:] = np.inf  # does not count
    x[:, width // 3 : width // 2] = -np.inf
    check(x, k, known)


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(6000), np.full(6000, -np.inf), np.arange(6000.0), -np.arange(6000.0), np.tile([-0.0, 0.0], 3000),
        np.r_[np.full(64, np.inf), np.zeros(5936)], np.r_[np.zeros(5990), np.full(10, np.finfo(np.float32).max)],
        # All that is large is in 64 groups, whose second look fills the list but for 7 places.
        (np.arange(6000) // 8 % 256 < 64) * 1.0, np.float32(1e-45) * (np.arange(6000) % 7),
    ],
    ids=["zeros", "nothing", "ascending", "descending", "both zeros", "infinite", "great", "few groups", "subnormal"],
)  # fmt: skip
def test_odd_rows(row):
    check(np.stack([row, row[::-1]]).astype(np.float32), 64)


def test_a_nan_is_the_largest():
    x = random(3, 5000)
    x[1, 4321], x[2, 17] = np.nan, np.inf
    values, ids = pallas_kernels.top_k(jnp.asarray(x), 3, implementation="mosaic_gpu")
    assert np.isnan(values[1, 0]) and ids[1, 0] == 4321 and ids[2, 0] == 17
    assert np.isfinite(values[0]).all()


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 128, 2000])
@pytest.mark.parametrize("width", [256, 32064, 49152, 151936, 300000])
def test_plans_fit(rows, width):
    plan = kernel.plan_for(rows, width, width, 64)
    assert plan.part * plan.cluster >= width and plan.shared_bytes <= kernel.SHARED_BYTES
    assert rows > 16 or plan.cluster == 8


def test_what_it_refuses():
    x = jnp.zeros((1, 4096))
    for wrong in (dict(x=x, k=65), dict(x=x, k=64, known=100), dict(x=jnp.zeros((1, 1 << 20)), k=1)):
        with pytest.raises(NotImplementedError, match="numbers"):
            pallas_kernels.top_k(**wrong, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="bfloat16"):
        pallas_kernels.top_k(x.astype(jnp.bfloat16), 1, implementation="mosaic_gpu")
