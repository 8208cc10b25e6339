"""The Hopper kernel for prefill attention: its plan on any device, its results on a Hopper GPU.

The kernel itself cannot be interpreted: it rescales a wgmma's accumulator in place and takes weights from registers,
neither of which JAX's interpreter knows (0.11.2).
A tolerance of 1e-2 in norm is what bfloat16 weights and results allow; the log of a sum is float32 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import Visibility, reference
from pallas_kernels.implementation import on_hopper

kernel = pytest.importorskip("pallas_kernels.mosaic_gpu.flash_attention")
needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs an NVIDIA Hopper GPU")

CAUSAL = Visibility()
VISIBILITIES = [CAUSAL, Visibility(window=20), Visibility(window=9, sinks=3), Visibility(nearest=5)]


def chunk(tokens, slots):
    """The last `tokens` positions of a cache filled to the end."""
    return np.arange(tokens)[None] + slots - tokens, np.arange(slots)[None]


def lengths(tokens, slots, filled):
    """Rows with so many filled slots each, the last `tokens` of them the queries'."""
    slot = np.arange(slots)
    keys = np.stack([np.where(slot < n, slot, -1) for n in filled])
    return np.stack([np.arange(tokens) + max(n - tokens, 0) for n in filled]), keys


def ring(tokens, slots, end):
    """A ring of `slots` slots that has been written up to the position `end`."""
    slot = np.arange(slots)
    return np.arange(tokens)[None] + end - tokens, (slot + (end - 1 - slot) // slots * slots)[None]


def shuffled(tokens, slots):
    """Positions in no order, a fifth of the slots empty."""
    rng = np.random.default_rng(0)
    keys = np.where(rng.random((2, slots)) < 0.2, -1, np.stack([rng.permutation(slots) for _ in range(2)]))
    return rng.integers(-1, slots, (2, tokens)), keys


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize(
    "positions", [chunk(32, 32), chunk(16, 64), lengths(16, 48, (48, 20, 7, 0)), ring(16, 32, 75), shuffled(32, 48)]
)
def test_plan(visibility, positions):
    """Each tile's list holds every block that some query sees, and only blocks seen whole go unmasked."""
    tile, block = 8, 8
    queries, keys = (jnp.asarray(x, jnp.int32) for x in positions)
    plan, counts = (np.asarray(x) for x in kernel._plan(queries, keys, visibility, tile, block))
    mask = np.asarray(visibility.mask(queries, keys))
    blocks = mask.reshape(len(mask), -1, tile, mask.shape[-1] // block, block)
    some, whole = blocks.any((2, 4)), blocks.all((2, 4))
    assert plan.shape == some.shape and np.array_equal(
        np.sort(plan), np.broadcast_to(np.arange(plan.shape[-1]), plan.shape)
    )
    for row, at in np.ndindex(counts.shape[:2]):
        masked, seen = counts[row, at]
        assert 1 <= seen <= plan.shape[-1] and masked <= seen
        assert not some[row, at, plan[row, at, seen:]].any()
        assert whole[row, at, plan[row, at, max(masked, 1) : seen]].all()


def test_plan_of_a_causal_square_is_exact():
    positions = jnp.arange(64)[None]
    plan, counts = kernel._plan(positions, positions, Visibility(), 16, 8)
    assert counts.tolist() == [[[2, 2], [2, 4], [2, 6], [2, 8]]]
    assert plan[0, 1].tolist() == [2, 3, 0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_heuristic_is_in_the_search_space(width, int8):
    assert kernel.heuristic(width, int8) in set(kernel.search_space(width, int8))


def arguments(seed, positions, heads, kv_heads, width, int8=False, std=1.0):
    rng = np.random.default_rng(seed)
    queries, keys = (np.asarray(x, np.int32) for x in positions)
    batch = max(len(queries), len(keys))
    queries = np.broadcast_to(queries, (batch, queries.shape[1]))
    shape = batch, kv_heads, keys.shape[1], width

    def rows():
        if not int8:
            return jnp.asarray(std * rng.standard_normal(shape), jnp.bfloat16)
        scales = rng.uniform(0.2, 1.5, shape[:3]) * std / 73
        return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8), jnp.asarray(scales, jnp.float16)

    q = jnp.asarray(std * rng.standard_normal((batch, queries.shape[1], heads, width)), jnp.bfloat16)
    return q, rows(), rows(), jnp.asarray(queries), jnp.asarray(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.astype(jnp.float32), k, v), "float32"),
        (lambda q, k, v: (q, k.astype(jnp.float32), v), "not both"),
        (lambda q, k, v: (q, (k, k[..., 0]), v), "not both"),
        (lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]), "width of 32"),
    ],
)
def test_what_the_kernel_cannot_do(change, message):
    q, k, v, *positions = arguments(0, chunk(8, 8), 2, 1, 64)
    with pytest.raises(NotImplementedError, match=message):
        kernel.flash_attention(*change(q, k, v), *positions, CAUSAL, False)


def check(args, visibility=CAUSAL, config=None):
    q, k, v, *positions = args
    run = jax.jit(lambda *args: kernel.flash_attention(*args, visibility, True, config=config))
    out, sums = run(*args)
    again = run(*args)
    assert np.array_equal(out, again[0]) and np.array_equal(sums, again[1])
    k, v = (x if isinstance(x, tuple) else x.astype(jnp.float32) for x in (k, v))
    expected, expected_sums = (
        np.asarray(x) for x in reference(q.astype(jnp.float32), k, v, *positions, visibility, True)
    )
    out, sums, blind = np.asarray(out, np.float32), np.asarray(sums), np.isneginf(expected_sums)
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert np.array_equal(np.isneginf(sums), blind) and not out[blind].any()
    np.testing.assert_allclose(sums[~blind], expected_sums[~blind], rtol=1e-5, atol=1e-4)


@needs_hopper
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(14, 2, 64), (4, 4, 96), (8, 2, 128)])
@pytest.mark.parametrize("positions", [chunk(517, 517), chunk(200, 1001), lengths(333, 600, (600, 401, 0))])
def test_kernel(positions, heads, kv_heads, width, int8):
    check(arguments(1, positions, heads, kv_heads, width, int8))


@needs_hopper
@pytest.mark.parametrize("visibility", [Visibility(window=100), Visibility(window=100, sinks=4), Visibility(nearest=7)])
@pytest.mark.parametrize("positions", [chunk(700, 700), ring(256, 512, 1300), shuffled(300, 1000)])
def test_kernel_sees_what_it_should(positions, visibility):
    check(arguments(2, positions, 4, 2, 96), visibility)


@needs_hopper
@pytest.mark.parametrize("positions", [chunk(1, 1), chunk(5, 9), chunk(64, 64), chunk(1, 777)])
@pytest.mark.parametrize("width", [64, 96])
def test_kernel_on_short_rows(positions, width):
    check(arguments(3, positions, 2, 1, width))


@needs_hopper
def test_kernel_with_large_scores():
    check(arguments(4, chunk(256, 256), 4, 2, 64, std=20.0))


@needs_hopper
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_other_configurations(width, int8):
    args = arguments(5, chunk(450, 700), 4, 2, width, int8)
    for config in list(kernel.search_space(width, int8))[::5]:  # each takes seconds to compile
        check(args, config=config)


@needs_hopper
def test_kernel_under_vmap():
    args = arguments(6, lengths(100, 200, (200, 150)), 4, 2, 64)

    def one(*args):
        return kernel.flash_attention(*(x[None] for x in args), CAUSAL, False)[0]

    assert np.array_equal(jax.vmap(one)(*args), kernel.flash_attention(*args, CAUSAL, False))
