"""A decode step as one op: how weights are packed, the reference, decoding by it, and on a GPU the kernel."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simt
from jax.experimental.mosaic import gpu as mosaic

from orcd_jax import decoding, packed_decoding
from orcd_jax.config import ModelConfig
from orcd_jax.loader import random_params
from orcd_jax.sampling import Sampling, row_keys
from pallas_kernels import decode_step
from pallas_kernels.decode_step import (
    GROUP_INPUTS,
    GROUP_ROWS,
    DecoderSizes,
    LayerWeights,
    check,
    init_handover,
    pack,
    pack_matrix,
    pack_parts,
    unpack_matrix,
    unpack_parts,
)  # fmt: skip
from pallas_kernels.implementation import on_hopper
from pallas_kernels.mosaic_gpu import threads as t

SIZES = DecoderSizes(
    n_layers=2, d_model=256, d_ff=256, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=160, eps=1e-6, window=None
)
CONFIG = ModelConfig(
    name="packable", architecture="qwen2", vocab_size=160, known_tokens=160, d_model=128, n_layers=2, n_heads=2,
    n_kv_heads=1, head_dim=64, d_ff=1280, context_length=64, rope_theta=10000.0, rms_norm_eps=1e-6, qkv_bias=True,
    tied_head=True, dtype="bfloat16",
)  # fmt: skip


def random_matrix(rng, rows, width):
    values = rng.integers(-128, 128, (rows, width), np.int8)
    return values, (rng.uniform(0.5, 1.5, (rows, width // 32)) * (3 / width) ** 0.5 / 127).astype(np.float16)


def exact(matrix):
    values, scales = (np.asarray(part).astype(np.float64) for part in matrix)
    return values * np.repeat(scales, 32, axis=1)


def random_decoder(sizes, seed=0):
    """Layers, the final norm and a head, NumPy arrays."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(sizes.n_layers):
        qkv, out, gate_up, down = (random_matrix(rng, *shape) for shape in sizes.matrices())
        norms = 1 + 0.1 * rng.standard_normal((2, sizes.d_model)).astype(np.float32)
        bias = rng.standard_normal(sizes.qkv_rows).astype(np.float32)
        layers.append(LayerWeights(norms[0], qkv, bias, out, norms[1], gate_up, down))
    norm = 1 + 0.1 * rng.standard_normal(sizes.d_model).astype(np.float32)
    return layers, norm, random_matrix(rng, sizes.vocab_size, sizes.d_model)


def step_in_float64(sizes, x, position, angles, layers, norm, head, caches):
    """The op by itself: logits, and the new token's keys and values of each layer."""

    def normal(x, scale):
        return x / np.sqrt(np.mean(x * x) + sizes.eps) * scale

    cos, sin = np.cos(angles), np.sin(angles)
    groups, new = sizes.n_heads // sizes.n_kv_heads, []
    for layer, (keys, values) in zip(layers, caches, strict=True):
        qkv = exact(layer.qkv) @ normal(x, layer.attention_norm) + layer.qkv_bias
        heads = qkv.reshape(-1, sizes.head_dim)
        rotated = heads[: sizes.n_heads + sizes.n_kv_heads]
        first, second = np.split(rotated, 2, axis=1)
        rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
        q, k, v = rotated[: sizes.n_heads], rotated[sizes.n_heads :], heads[len(rotated) :]
        new.append((k, v))
        first_seen = 0 if sizes.window is None else max(0, position - sizes.window + 1)
        outputs = []
        for n in range(sizes.n_heads):
            own = n // groups
            seen_k = np.concatenate([keys[own, first_seen:position], k[own][None]])
            seen_v = np.concatenate([values[own, first_seen:position], v[own][None]])
            scores = seen_k @ q[n] / np.sqrt(sizes.head_dim)
            weights = np.exp(scores - scores.max())
            outputs.append(weights @ seen_v / weights.sum())
        x = x + exact(layer.out) @ np.concatenate(outputs)
        gate, up = np.split(exact(layer.gate_up) @ normal(x, layer.swiglu_norm), 2)
        x = x + exact(layer.down) @ (gate / (1 + np.exp(-gate)) * up)
    return exact(head) @ normal(x, norm), new


def run_both(sizes, position, length, implementation, dtype, seed=0, jit=True):
    """The op's logits, caches and handover, twice, and what is right in float64."""
    rng = np.random.default_rng(seed)
    layers, norm, head = random_decoder(sizes, seed)
    x = jnp.asarray(rng.standard_normal((1, sizes.d_model)), dtype)
    shape = 1, sizes.n_kv_heads, length, sizes.head_dim
    slots = np.arange(length)
    held = position - 1 - (position - 1 - slots) % length if sizes.ring else slots  # each slot's position
    seen = ((held >= 0) & (held < position))[:, None]
    filled = [[jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)] for _ in layers]
    # What has not been stored is not to be looked at; the reference multiplies it by zero.
    unknown = np.nan if implementation == "mosaic_gpu" else 100.0
    caches = [tuple(jnp.where(seen, part, jnp.asarray(unknown, dtype)) for part in pair) for pair in filled]
    angles = rng.uniform(0, 6, sizes.head_dim // 2).astype(np.float32)
    packed = pack(sizes, jax.tree.map(jnp.asarray, layers), jnp.asarray(norm), jax.tree.map(jnp.asarray, head))

    def run(packed, handover):  # weights as arguments: XLA would fold constants for minutes
        return decode_step(
            x, jnp.full(1, position, jnp.int32), jnp.cos(angles)[None], jnp.sin(angles)[None], packed, caches, handover,
            sizes=sizes, implementation=implementation,
        )  # fmt: skip

    if jit:
        run = jax.jit(run)
    logits, new, handover = run(packed, init_handover(sizes))
    again, _, _ = run(packed, handover)
    by_position = np.arange(position) % length  # the slot of each position, where it still is
    old = [tuple(np.asarray(part[0, :, by_position], np.float64).swapaxes(0, 1) for part in pair) for pair in filled]
    expected = step_in_float64(sizes, np.asarray(x[0], np.float64), position, angles, layers, norm, head, old)
    return logits, again, new, expected


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("packing", [(pack_matrix, unpack_matrix), (pack_parts, unpack_parts)])
@pytest.mark.parametrize("matrix", range(4))
def test_unpacking_undoes_packing(matrix, packing):
    pack_it, unpack_it = packing
    rows, width = SIZES.matrices()[matrix]
    original = random_matrix(np.random.default_rng(matrix), rows, width)
    order = SIZES.row_orders()[matrix]
    assert sorted(order) == list(range(rows))
    values, scales = unpack_it(pack_it(*map(jnp.asarray, original), order), order)
    assert np.array_equal(values, original[0])
    assert np.array_equal(scales, original[1])


def test_a_warp_finds_its_operands_in_a_group():
    """The product as the kernel's lanes form it from a group's bytes."""
    rng = np.random.default_rng(1)
    matrix, x = random_matrix(rng, GROUP_ROWS, GROUP_INPUTS), rng.standard_normal(GROUP_INPUTS)
    (group,) = np.asarray(pack_matrix(*map(jnp.asarray, matrix), np.arange(GROUP_ROWS)))
    result = np.zeros(GROUP_ROWS)
    for block in range(4):
        for lane in range(32):
            row, quad = divmod(lane, 4)
            start = 512 * block + 16 * lane
            weights = group[start : start + 16].astype(np.float64)
            place = GROUP_ROWS * GROUP_INPUTS + 16 * row + 4 * block
            scales = group[place : place + 4].view(np.float16).astype(np.float64)
            inputs = x[32 * block + 8 * quad :][:8]
            upper, lower = weights.reshape(2, 2, 4).swapaxes(0, 1).reshape(2, 8)
            result[row] += scales[0] * (upper @ inputs)
            result[row + 8] += scales[1] * (lower @ inputs)
    np.testing.assert_allclose(result, exact(matrix) @ x, rtol=1e-12, atol=1e-12)


def test_what_belongs_together_is_8_rows_apart_in_a_tile():
    qkv, _, gate_up, _ = (order.reshape(-1, 2, 8) for order in SIZES.row_orders())
    rotated = (SIZES.n_heads + SIZES.n_kv_heads) * SIZES.head_dim // GROUP_ROWS
    assert np.all(qkv[:rotated, 1] - qkv[:rotated, 0] == SIZES.head_dim // 2)
    assert np.all(gate_up[:, 1] - gate_up[:, 0] == SIZES.d_ff)


@pytest.mark.parametrize("position", [0, 5, 20])
@pytest.mark.parametrize("window, ring", [(None, False), (7, False), (7, True)])
def test_the_reference_is_right(position, window, ring):
    sizes = replace(SIZES, window=window, ring=ring)
    length = window if ring else 24
    logits, again, new, (expected, expected_new) = run_both(sizes, position, length, "xla", jnp.float32)
    assert np.array_equal(logits, again)
    # Some 20 roundings in a row, each of float32, at sums of 256 terms.
    assert relative_error(logits[0], expected) < 20 * 16 * np.finfo(np.float32).eps
    for pair, right in zip(new, expected_new, strict=True):
        for cache, row in zip(pair, right, strict=True):
            assert relative_error(cache[0, :, position % length], row) < 20 * 16 * np.finfo(np.float32).eps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 192}, "d_model must be a multiple of 128, not 192"),
        ({"d_ff": 384}, "d_ff must be a multiple of 256, not 384"),
        ({"head_dim": 48, "n_heads": 8}, "head_dim must be a multiple of 32, not 48"),
        ({"vocab_size": 100}, "vocab_size must be a multiple of 16, not 100"),
    ],
)
def test_sizes_that_cannot_be_packed(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        check(replace(SIZES, **changes))


@partial(jax.jit, static_argnums=(1, 2))
def start(params, config, rows):
    """Rows in the middle of generation, after prompts of five tokens or less and one more."""
    state = decoding.init_state(
        config, 12 - jnp.arange(rows, dtype=jnp.int32), row_keys([3] * rows), jnp.full((rows, 16), -1, jnp.int32),
        Sampling(temperature=0.0).rows(rows), 32,
    )  # fmt: skip
    hidden = jnp.zeros((rows, config.d_model), config.activation_dtype)
    prompt = jnp.asarray([[5, 17, 100, 3, 9]] * rows, jnp.int32)
    state, hidden = decoding.prefill(params, config, state, hidden, prompt, 5 - jnp.arange(rows, dtype=jnp.int32))
    return decoding.emit(params, config, state, hidden)[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_by_the_op_gives_the_same_tokens(monkeypatch, rows):
    params = random_params(CONFIG, "int8", jax.devices()[0])
    monkeypatch.setattr(packed_decoding, "on_hopper", lambda: True)
    monkeypatch.setattr(packed_decoding, "step", partial(packed_decoding.step, implementation="xla"))
    packed = packed_decoding.pack(params, CONFIG)
    assert packed_decoding.PACKED in packed
    decode = jax.jit(decoding.decode, static_argnums=(1, 3))
    plain_state, plain = decode(params, CONFIG, start(params, CONFIG, rows), 12)
    state, emitted = decode(packed, CONFIG, start(params, CONFIG, rows), 12)
    assert np.array_equal(emitted.tokens, plain.tokens)
    assert np.array_equal(emitted.tokens[-1], [decoding.NO_TOKEN] * rows)  # a row that ends goes on without effect
    assert np.array_equal(state.cache.lengths, plain_state.cache.lengths)
    for ours, theirs in zip(
        jax.tree.leaves(state.cache.layers), jax.tree.leaves(plain_state.cache.layers), strict=True
    ):
        for row, length in enumerate(state.cache.lengths):
            a, b = (np.asarray(cache, np.float64)[row, :, :length] for cache in (ours, theirs))
            assert relative_error(a, b) < float(jnp.finfo(jnp.bfloat16).eps)


def test_where_the_op_is_not_used(monkeypatch):
    params = random_params(CONFIG, "int8", jax.devices()[0])
    if not on_hopper():
        assert packed_decoding.pack(params, CONFIG) is params
    monkeypatch.setattr(packed_decoding, "on_hopper", lambda: True)
    bf16 = random_params(CONFIG, "bf16", jax.devices()[0])
    assert packed_decoding.pack(bf16, CONFIG) is bf16
    packed = packed_decoding.pack(params, CONFIG)
    cache = decoding.init_cache(CONFIG, 1, 16)
    assert packed_decoding.begin(params, CONFIG, cache) is None
    assert packed_decoding.begin(packed, CONFIG, cache) is not None
    for rows, served in ((2, True), (8, True), (9, False), (40, False)):
        several = decoding.init_cache(CONFIG, rows, 16)
        assert (packed_decoding.begin(packed, CONFIG, several) is not None) == served
    assert packed_decoding.begin(packed, replace(CONFIG, dtype="float32"), cache) is None


@pytest.fixture
def simulated(monkeypatch):
    """Lets the kernel's code for each thread be run by `simt` in place of a GPU, on a few blocks.

    Threads there wait for nothing, so the ring must hold all that a block streams.
    """
    kernels = pytest.importorskip("pallas_kernels.mosaic_gpu.decode_step", reason="needs Pallas for Mosaic GPU")
    if not hasattr(mosaic.utils, "inline_ptx"):
        pytest.skip("needs jax 0.11.2 or newer, whose Mosaic GPU can inline PTX")
    from pallas_kernels.mosaic_gpu import decode_step_frame

    def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
        (shared,) = scratch_types

        def run(*operands):
            refs = [o if isinstance(o, jax.Ref) else None for o in operands]
            arrays = [np.asarray(o if r is None else r[...]) for o, r in zip(operands, refs, strict=True)]
            result = np.full(out_type.shape, np.nan, out_type.dtype)
            *memory, result = simt.run(
                lambda _, *at: body(*at), [*arrays, result], shared.shape, *grid, 128 * num_threads, cluster=1
            )
            for ref, changed in zip(refs, memory, strict=True):
                if ref is not None:
                    ref[...] = jnp.asarray(changed)
            return jnp.asarray(result)

        return run

    monkeypatch.setattr(kernels.plgpu, "kernel", kernel)
    monkeypatch.setattr(kernels.plgpu, "inline_mgpu", lambda arg_types: lambda f: lambda *refs: f(None, *refs))
    monkeypatch.setattr(jax.custom_batching, "sequential_vmap", lambda f: f)  # it traces, and simt wants numbers
    monkeypatch.setattr(kernels, "processors", lambda: 8)
    monkeypatch.setattr(decode_step_frame, "SHARED_BYTES", 1 << 19)


SIMULATED = {
    "grouped queries": (replace(SIZES, d_ff=512), 24, (0, 5, 20)),
    "a window": (replace(SIZES, d_ff=512, d_model=384, n_heads=3, n_kv_heads=1, head_dim=128, window=7), 24, (3, 20)),
    "many chunks": (replace(SIZES, d_ff=512, n_layers=1, d_model=384, n_kv_heads=4, head_dim=96), 1152, (700, 1151)),
    "very many chunks": (replace(SIZES, d_ff=512, n_layers=1, n_kv_heads=1), 2304, (1500, 2303)),
    "a ring": (replace(SIZES, d_ff=512, window=24, ring=True), 24, (5, 23, 24, 77)),
    "a full cache": (replace(SIZES, d_ff=512, n_layers=1), 24, (24,)),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_the_kernel_s_threads_compute_the_step(simulated, case):
    sizes, length, positions = SIMULATED[case]
    for position in positions:
        check_kernel(*run_both(sizes, position, length, "mosaic_gpu", jnp.bfloat16, jit=False), position, length, sizes)


def check_kernel(logits, again, new, expected, position, length, sizes):
    """bfloat16's rounding of queries, keys, values and softmax weights, and float16's of the rest, in each layer."""
    expected_logits, expected_new = expected
    assert np.array_equal(logits, again)
    assert relative_error(logits[0], expected_logits) < 1e-2
    for pair, right in zip(new, expected_new, strict=True):
        for cache, row in zip(pair, right, strict=True):
            written = ~np.isnan(np.asarray(cache[0], np.float32)).any(axis=(0, 2))
            assert np.array_equal(written, np.arange(length) <= position)
            if position < length or sizes.ring:
                assert relative_error(cache[0, :, position % length], row) < 1e-2


SIMULATED_ROWS = {
    "two rows": (replace(SIZES, d_ff=512), 24, (0, 5)),
    "eight rows": (replace(SIZES, d_ff=512), 24, (0, 1, 5, 20, 22, 3, 7, 3)),
    "a window": (
        replace(SIZES, d_ff=512, d_model=384, n_heads=3, n_kv_heads=1, head_dim=128, window=7),
        24,
        (3, 20, 9),
    ),
    "groups for each warp": (replace(SIZES, d_ff=2048, d_model=1024, n_layers=1), 24, (3, 20, 9, 0)),
    "chunks": (replace(SIZES, d_ff=512, n_layers=3, n_kv_heads=1), 2304, (1500, 3, 2303, 700)),
    "two units at a time": (
        replace(SIZES, d_ff=512, n_layers=1, d_model=384, n_kv_heads=4, head_dim=96, window=400),
        600,
        (599, 300, 0, 128, 511, 127, 450, 31),
    ),
    "a ring": (replace(SIZES, d_ff=512, window=24, ring=True), 24, (5, 23, 24, 77)),
}


@pytest.mark.parametrize("case", SIMULATED_ROWS)
def test_the_kernel_s_threads_compute_a_step_of_rows(simulated, monkeypatch, case):
    sizes, length, positions = SIMULATED_ROWS[case]
    if sizes.d_model == 1024 or length > 24:  # more blocks, so that the ring holds what each one streams
        kernels = pytest.importorskip("pallas_kernels.mosaic_gpu.decode_step")
        monkeypatch.setattr(kernels, "processors", lambda: 64)
    check_rows(sizes, length, positions, jit=False)


def check_rows(sizes, length, positions, jit):
    """Two steps of several rows against the reference in float32; what has not been stored is not to be looked at."""
    rng, rows = np.random.default_rng(1), len(positions)
    layers, norm, head = random_decoder(sizes)
    packed = pack(sizes, jax.tree.map(jnp.asarray, layers), jnp.asarray(norm), jax.tree.map(jnp.asarray, head))
    xs = jnp.asarray(rng.standard_normal((2, rows, sizes.d_model)), jnp.bfloat16)
    angles = rng.uniform(0, 6, (2, rows, sizes.head_dim // 2)).astype(np.float32)
    shape = rows, sizes.n_kv_heads, length, sizes.head_dim
    filled = [[rng.standard_normal(shape) for _ in range(2)] for _ in layers]
    held = np.minimum(positions, length)[:, None] > np.arange(length)
    caches = {}
    for name, dtype, unknown in (("mosaic_gpu", jnp.bfloat16, np.nan), ("xla", jnp.float32, 100.0)):
        seen = held[:, None, :, None]
        caches[name] = [tuple(jnp.asarray(np.where(seen, a, unknown), dtype) for a in pair) for pair in filled]

    def steps(name, dtype):
        def step(packed, x, positions, angles, caches, handover):
            return decode_step(
                x, positions, jnp.cos(angles), jnp.sin(angles), packed, caches, handover, sizes=sizes,
                implementation=name,
            )  # fmt: skip

        run, logits = jax.jit(step) if jit else step, []
        now, handover = caches[name], init_handover(sizes, rows)
        for i in range(2):
            x = xs[i].astype(dtype)
            found, now, handover = run(packed, x, jnp.asarray(positions) + i, angles[i], now, handover)
            logits.append(found)
        return np.stack(logits), now

    expected, right = steps("xla", jnp.float32)
    found, new = steps("mosaic_gpu", jnp.bfloat16)
    again, _ = steps("mosaic_gpu", jnp.bfloat16)
    assert np.array_equal(found, again)
    for step in range(2):
        for row in range(rows):
            assert relative_error(found[step, row], expected[step, row]) < 2e-2, (step, row)
    for pair, right_pair in zip(new, right, strict=True):
        for cache, right_cache in zip(pair, right_pair, strict=True):
            cache, right_cache = np.asarray(cache, np.float64), np.asarray(right_cache, np.float64)
            for row, position in enumerate(positions):
                slots = [(position + i) % length if sizes.ring else position + i for i in range(2)]
                for slot in (slot for slot in slots if slot < length):
                    assert relative_error(cache[row, :, slot], right_cache[row, :, slot]) < 2e-2


def test_what_rows_are_handed_is_rounded_not_cut_off(simulated):
    """A mark takes a float16's lowest bit: ten significant bits are left."""
    from pallas_kernels.mosaic_gpu import decode_step_rows as rows

    given = np.random.default_rng(0).uniform(-2, 2, (32, 4)).astype(np.float32)
    given[0] = 1 + 2.0**-10 + 2.0**-20, -4095.5, 60000, np.nan

    def emit(_, source, space, _shared):
        kernel = rows.RowsKernel(SIZES, 8, 24, 2)
        source, kernel.here, place = t.global_address(source), t.global_address(space), t.thread_index()
        kernel.mark = rows.marks(place)
        kernel._hand_on(place * 8, [word.float() for word in t.load_global(source + (place * 16).wide(), 4)])

    _, words = simt.run(emit, [given, np.zeros((32, 2), np.int32)], [0], 1, 32, 1)
    found = (words & ~rows.MARKS).view(np.float16).astype(np.float32)
    significand, exponent = np.frexp(given)
    np.testing.assert_array_equal(found, np.ldexp(np.round(significand * 2**10), exponent - 10))


# Both models' shapes, with fewer layers and tokens.
KERNEL_SIZES = {
    "qwen2.5-0.5b": DecoderSizes(2, 896, 4864, 14, 2, 64, 4096, 1e-6, None),
    "phi-3-mini": DecoderSizes(2, 3072, 8192, 32, 32, 96, 4096, 1e-5, 500),
}


@pytest.mark.parametrize("position", [0, 1, 255, 256, 1100])
@pytest.mark.parametrize("name", KERNEL_SIZES)
def test_the_kernel_is_right(name, position):
    if not on_hopper():
        pytest.skip("needs an NVIDIA Hopper GPU")
    sizes = KERNEL_SIZES[name]
    check_kernel(*run_both(sizes, position, 1152, "mosaic_gpu", jnp.bfloat16), position, 1152, sizes)


@pytest.mark.parametrize("positions", [
    (0, 300), (7, 40, 260), (1100, 3, 255, 256, 511, 0, 700, 129),
])  # fmt: skip
@pytest.mark.parametrize("name", KERNEL_SIZES)
def test_the_kernel_of_rows_is_right(name, positions):
    if not on_hopper():
        pytest.skip("needs an NVIDIA Hopper GPU")
    check_rows(KERNEL_SIZES[name], 1152, positions, jit=True)


def test_the_kernel_under_vmap():
    if not on_hopper():
        pytest.skip("needs an NVIDIA Hopper GPU")
    params = packed_decoding.pack(random_params(CONFIG, "int8", jax.devices()[0]), CONFIG)
    tokens = jnp.asarray([[[5, 17, 100]], [[3, 9, 2]]], jnp.int32)

    def generate(tokens):
        lengths = jnp.full(1, 3, jnp.int32)
        return decoding.generate_tokens(params, CONFIG, tokens, lengths, jax.random.key(0), max_new_tokens=4)

    assert np.array_equal(jax.vmap(generate)(tokens), jnp.stack([generate(row) for row in tokens]))


def test_a_decoder_too_small_for_the_kernel_is_not_packed(monkeypatch):
    monkeypatch.setattr(packed_decoding, "on_hopper", lambda: True)
    config = replace(CONFIG, d_ff=256)
    params = random_params(config, "int8", jax.devices()[0])
    assert packed_decoding.pack(params, config) is params
