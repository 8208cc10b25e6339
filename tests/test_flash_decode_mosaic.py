"""The flash_decode kernel: on a Hopper GPU as it is, elsewhere its code for each thread run by `simt`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_kernels import assert_attends, attend, exact, normal, random_rows, random_slots

from pallas_kernels import flash_decode
from pallas_kernels.flash_attention import Visibility
from pallas_kernels.implementation import on_hopper

pytest.importorskip("jax.experimental.mosaic.gpu.utils")
if not hasattr(jax.experimental.mosaic.gpu.utils, "inline_ptx"):
    pytest.skip("needs jax 0.11.2 or newer, whose Mosaic GPU can inline PTX", allow_module_level=True)

import simt

from pallas_kernels.mosaic_gpu import flash_decode as kernel
from pallas_kernels.mosaic_gpu.flash_decode import Config

decode = partial(flash_decode, implementation="mosaic_gpu")
decode_ordered = partial(flash_decode, implementation="mosaic_gpu", ordered=True)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    if on_hopper():
        return

    def launch(shape, config, operands):
        results, shared = kernel._buffers(shape, config)

        def run(*arrays):
            arrays = [np.asarray(x) for x in arrays]
            poisoned = [np.full(x.shape, np.nan, x.dtype) for x in results]
            emit = partial(kernel._emit, shape, config, len(arrays))
            blocks = shape.pairs * config.splits * config.cluster
            memory = simt.run(emit, [*arrays, *poisoned], shared, blocks, 128 * config.warpgroups, config.cluster)
            return memory[len(arrays) :]

        return jax.pure_callback(run, results, *operands)

    monkeypatch.setattr(kernel, "_launch", launch)


@pytest.fixture
def configured(monkeypatch):
    """A function that fixes the kernel's configuration."""
    return lambda *config: monkeypatch.setattr(kernel, "heuristic", lambda shape: Config(*config))


def tensors(batch, length, n, k, width, slots, int8=False):
    q = normal(1, batch, length, n, width, dtype=jnp.bfloat16, std=2)
    return q, *(random_rows(seed, batch, k, slots, width, dtype=jnp.bfloat16, int8=int8) for seed in (2, 3))


def in_order(lengths, length, slots):
    """Positions [B, T] of the last queries of rows with these many tokens, and of all slots [B, S]."""
    positions = np.asarray(lengths)[:, None] - length + np.arange(length)
    return positions.astype(np.int32), np.tile(np.arange(slots, dtype=np.int32), (len(lengths), 1))


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("n", "k", "width", "slots", "config"),
    [
        (7, 1, 64, 300, (1, 2, 1, 32)),
        (14, 2, 64, 64, (1, 1, 1, 16)),
        (2, 2, 96, 75, (1, 1, 1, 16)),
        (4, 2, 32, 33, (1, 1, 2, 16)),
        (9, 1, 128, 130, (2, 1, 1, 16)),
    ],
)
def test_rows_of_all_lengths(configured, n, k, width, slots, config, int8):
    """From a row of nothing to one that fills the cache."""
    configured(*config)
    slots_ = in_order([0, 1, slots // 3, slots], 1, slots)
    assert_attends(decode_ordered, *tensors(4, 1, n, k, width, slots, int8), *slots_)


@pytest.mark.parametrize(
    ("batch", "length", "n", "k", "visibility", "int8"),
    [
        (2, 8, 7, 1, Visibility(), False),
        (2, 2, 8, 2, Visibility(window=9), False),
        (2, 3, 4, 2, Visibility(nearest=5), True),
        (1, 5, 6, 3, Visibility(window=40, nearest=3, sinks=2), True),
    ],
)
def test_several_queries_and_what_they_see(configured, batch, length, n, k, visibility, int8):
    configured(1, 1, 1, 16)
    slots = in_order([length, 61][-batch:], length, 61)
    assert_attends(decode_ordered, *tensors(batch, length, n, k, 64, 61, int8), *slots, visibility)


@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=20, sinks=3)])
@pytest.mark.parametrize("slots", [50, 53])
def test_slots_in_any_order(configured, slots, visibility):
    configured(1, 2, 1, 16)
    assert_attends(decode, *tensors(3, 2, 4, 2, 64, slots), *random_slots(4, 3, 2, slots), visibility)


def test_one_row_of_positions_serves_all(configured):
    configured(1, 1, 1, 16)
    q, (k, _), (v, _) = tensors(2, 1, 4, 2, 32, 40)
    positions, key_positions = in_order([11, 40], 1, 40)
    np.testing.assert_array_equal(
        attend(decode, q, k, v, positions, key_positions[:1]), attend(decode, q, k, v, positions, key_positions)
    )


@pytest.mark.parametrize("lengths", [[1, 256], [257, 900], [1024, 600]])
def test_long_rows_are_split_and_put_together(configured, lengths):
    """Clusters leave their sums in memory; which of them are needed, and whether any, follows from the length."""
    configured(4, 2, 1, 16)
    assert_attends(decode_ordered, *tensors(2, 1, 7, 1, 64, 1024), *in_order(lengths, 1, 1024))


def test_slots_that_no_query_sees_are_not_read(configured):
    """Ordered, in blocks of keys: what lies beyond may be anything."""
    configured(1, 1, 1, 16)
    q, (k, _), (v, _) = tensors(1, 1, 7, 1, 64, 96)
    slots, visibility = in_order([70], 1, 96), Visibility(window=30)
    clean = attend(decode_ordered, q, k, v, *slots, visibility)
    k, v = (x.at[:, :, :32].set(jnp.nan).at[:, :, 80:].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(attend(decode_ordered, q, k, v, *slots, visibility), clean)


def test_large_scores(configured):
    configured(1, 2, 1, 16)
    q, (k, exact_k), v = tensors(2, 1, 7, 1, 64, 70)
    q = q * jnp.bfloat16(500)
    assert_attends(decode_ordered, q, (k, exact_k), v, *in_order([70, 33], 1, 70))


def test_a_hot_row_leaves_the_others_alone(configured):
    configured(2, 1, 1, 16)
    q, (k, _), (v, _) = tensors(3, 1, 4, 2, 64, 140)
    slots = in_order([140, 120, 60], 1, 140)
    calm = attend(decode_ordered, q, k, v, *slots)
    hot = attend(decode_ordered, q.at[1].multiply(1e30), k.at[1].multiply(1e30), v, *slots)
    np.testing.assert_array_equal(hot[::2], calm[::2])


@pytest.mark.parametrize("shared_positions", [False, True])
def test_vmap(configured, shared_positions):
    configured(1, 1, 1, 16)
    q, (k, _), (v, _) = tensors(4, 1, 4, 2, 32, 40)
    positions, key_positions = in_order([3, 11, 29, 40], 1, 40)
    expected = attend(decode, q, k, v, positions, key_positions, lse=True)
    fold = lambda x: x.reshape(2, 2, *x.shape[1:])  # noqa: E731
    keys = key_positions[:1] if shared_positions else fold(key_positions)
    actual = jax.vmap(partial(decode, lse=True), in_axes=(0, 0, 0, 0, None if shared_positions else 0))(
        *map(fold, (q, k, v, positions)), keys
    )
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a.reshape(e.shape), e), actual, expected)


def test_heuristic_and_search_space_fit_the_card():
    for batch, heads, kv_heads, slots, width in [(1, 14, 2, 32768, 64), (64, 32, 32, 4096, 96), (1, 9, 3, 64, 128)]:
        shape = kernel._Shape(batch, 1, heads, kv_heads, slots, width, False, True, True, Visibility())
        for config in (kernel.heuristic(shape), *kernel.search_space(shape)):
            _, shared = kernel._buffers(shape, config)
            assert sum(shared) < 220_000 and config.cluster <= 8 and config.unit % 16 == 0


@pytest.mark.parametrize(
    ("dtype", "rows", "width", "visibility", "message"),
    [
        (jnp.float32, jnp.float32, 64, Visibility(), "float32"),
        (jnp.bfloat16, jnp.float32, 64, Visibility(), "neither bfloat16 nor int8"),
        (jnp.bfloat16, jnp.bfloat16, 80, Visibility(), "width of 80"),
        (jnp.bfloat16, jnp.bfloat16, 64, Visibility(nearest=-1), "later positions"),
    ],
)
def test_refuses_what_it_cannot_do(dtype, rows, width, visibility, message):
    kv = jnp.ones((1, 1, 8, width), rows)
    positions = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        decode(jnp.ones((1, 1, 2, width), dtype), kv, kv, positions, positions, visibility=visibility)


def test_same_bits_twice(configured):
    configured(4, 2, 1, 16)
    q, (k, _), (v, _) = tensors(2, 1, 7, 1, 64, 1024)
    first, second = (attend(decode_ordered, q, k, v, *in_order([1024, 600], 1, 1024), lse=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert np.isfinite(exact(first[0])).all()
