"""Generation: against teacher-forced logits and itself, and what its compiled programs hold.

The model has no sliding window, so that its cache keeps every token, and a head of its own, so that one token's
embedding can be poisoned without poisoning a logit.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SPECS, known_tokens

import orcd_jax
import pallas_kernels
from orcd_jax import decoding
from orcd_jax.config import ModelConfig
from orcd_jax.decoding import NO_TOKEN, NOT_FINITE, Emitted
from orcd_jax.errors import RequestError
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params
from orcd_jax.sampling import Method, Sampling, row_keys
from pallas_kernels.quant_matmul_argmax import IMPLEMENTATIONS as ARGMAX

MODEL = "llama-odd"
KNOWN = known_tokens(SPECS[MODEL])
EVERYTHING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # truncates nothing
GREEDY = Sampling(temperature=0.0)
MIXED = Sampling(
    temperature=np.array([0.0, 1.0, 0.8, 3.0]),
    top_k=np.array([40, 0, 40, 5]),
    top_p=np.array([0.95, 0.9, 1.0, 1.0]),
    repeat_penalty=np.array([1.3, 1.0, 1.2, 0.9]),
)
ROWS, LENGTH, NEW = 4, 12, 16
LENGTHS = np.array([1, 12, 5, 9], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, KNOWN, (ROWS, LENGTH)).astype(np.int32)

forward = jax.jit(orcd_jax.forward, static_argnames="config")
init_state = jax.jit(decoding.init_state, static_argnames=("config", "length"))
prefill = jax.jit(decoding.prefill, static_argnames="config")
emit = jax.jit(decoding.emit, static_argnames=("config", "top_logprobs", "method"))
decode = jax.jit(decoding.decode, static_argnames=("config", "steps", "top_logprobs", "method"))


@pytest.fixture(scope="module")
def model(tiny):
    file = GGUFFile.open(tiny(MODEL))
    config = replace(ModelConfig.from_gguf(file), known_tokens=KNOWN)
    assert config.sliding_window is None and not config.tied_head and config.vocab_size > KNOWN
    return load_params(file, config, "f32", jax.devices("cpu")[0]), config


def generate(model, sampling, key=None, prompts=PROMPTS, lengths=LENGTHS, new=NEW):
    params, config = model
    key = jax.random.key(0) if key is None else key
    return np.asarray(
        orcd_jax.generate_tokens(params, config, prompts, lengths, key, max_new_tokens=new, sampling=sampling)
    )


def teacher_forced(model, prompts, lengths, completions):
    """Logits [B, N, V] from which each token of the completions [B, N] was chosen, padded ids at -inf."""
    params, config = model
    new = completions.shape[1]
    whole = np.concatenate([prompts, np.zeros_like(completions)], axis=1)
    for row, length in enumerate(lengths):
        whole[row, length : length + new] = completions[row]
    logits, _ = forward(params, config, whole, orcd_jax.init_cache(config, *whole.shape))
    logits = np.stack([np.asarray(logits)[row, length - 1 : length - 1 + new] for row, length in enumerate(lengths)])
    logits[:, :, KNOWN:] = -np.inf
    return logits


def cut(tokens, stop_ids):
    """Rows up to and including the first stop id, then NO_TOKEN."""
    tokens = tokens.copy()
    for row in tokens:
        stops = np.flatnonzero(np.isin(row, stop_ids))
        if len(stops):
            row[stops[0] + 1 :] = NO_TOKEN
    return tokens


@contextmanager
def compilations(caplog):
    """The names of the programs that are compiled inside the block."""
    names = []
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        caplog.clear()
        yield names
        names += re.findall(r"Finished XLA compilation of (\S+)", caplog.text)


# Tokens


def test_greedy_tokens_are_the_likeliest_after_penalty(model):
    """The repeat penalty counts the prompt, the completion, and no padding."""
    distinct = set()
    for factor in (1.0, 1.5, 0.5):
        completions = generate(model, replace(GREEDY, repeat_penalty=factor))
        distinct.add(completions.tobytes())
        logits = teacher_forced(model, PROMPTS, LENGTHS, completions)
        for row, step in np.ndindex(ROWS, NEW):
            scores = logits[row, step]
            for token in {*PROMPTS[row, : LENGTHS[row]].tolist(), *completions[row, :step].tolist()}:
                scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
            assert completions[row, step] == scores.argmax()
    assert len(distinct) == 3


def test_a_row_is_the_same_alone(model):
    """Whatever its neighbours, its place, and its padding; greedy and sampled, with values of its own."""
    together = generate(model, MIXED)
    for row in range(ROWS):
        own = Sampling(*(np.broadcast_to(value, ROWS)[row] for value in vars(MIXED).values()))
        prompt = np.where(np.arange(LENGTH) < LENGTHS[row], PROMPTS[row], 7)[None]
        alone = generate(model, own, prompts=prompt, lengths=LENGTHS[[row]])
        assert alone[0].tolist() == together[row].tolist()
    order = np.array([2, 0, 3, 1])
    shuffled = Sampling(*(np.broadcast_to(value, ROWS)[order] for value in vars(MIXED).values()))
    moved = generate(model, shuffled, prompts=PROMPTS[order], lengths=LENGTHS[order])
    np.testing.assert_array_equal(moved, together[order])


def test_a_prompt_longer_than_a_prefill_chunk(model):
    length = decoding._PREFILL_CHUNK + 8
    prompts = np.random.default_rng(1).integers(0, KNOWN, (2, length)).astype(np.int32)
    lengths = np.array([length, 7], np.int32)
    completions = generate(model, GREEDY, prompts=prompts, lengths=lengths, new=4)
    expected = teacher_forced(model, prompts, lengths, completions).argmax(axis=-1)
    assert completions.tolist() == expected.tolist()


def test_a_stop_id_ends_its_row(model):
    params, config = model
    plain = generate(model, GREEDY)
    stop_ids = (int(plain[1, 4]), int(plain[3, 0]))
    expected = cut(plain, stop_ids)
    assert expected[1, 5] == expected[3, 1] == NO_TOKEN and (expected[0] != NO_TOKEN).any()
    assert generate((params, replace(config, stop_ids=stop_ids)), GREEDY).tolist() == expected.tolist()


def test_one_token(model):
    np.testing.assert_array_equal(generate(model, MIXED, new=1), generate(model, MIXED)[:, :1])


def test_keys_of_the_rows(model):
    """One key serves every row; like rows differ by keys of their own alone."""
    like = {"prompts": np.tile(PROMPTS[1], (ROWS, 1)), "lengths": np.full(ROWS, LENGTH, np.int32)}
    sampling, key = Sampling(1.5, **EVERYTHING), jax.random.key(3)
    one = generate(model, sampling, key, **like)
    assert np.all(one == one[0])
    np.testing.assert_array_equal(generate(model, sampling, jnp.broadcast_to(key, (ROWS,)), **like), one)
    several = generate(model, sampling, jax.random.split(key, ROWS), **like)
    assert len({tuple(row) for row in several.tolist()}) == ROWS
    assert generate(model, sampling, jax.random.key(4), **like).tolist() != one.tolist()


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_any_generator_belong_to_their_rows(model, kind):
    """Under vmap these draw for a whole batch at once."""
    sampling, key = Sampling(1.5, **EVERYTHING), jax.random.key(3, impl=kind)
    keys = jax.random.split(key, ROWS)
    together = generate(model, sampling, keys)
    for row in range(ROWS):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(together[one], generate(model, sampling, keys[one], PROMPTS[one], LENGTHS[one]))
    like = {"prompts": np.tile(PROMPTS[1], (ROWS, 1)), "lengths": np.full(ROWS, LENGTH, np.int32)}
    assert len({tuple(row) for row in generate(model, sampling, keys, **like).tolist()}) == ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": 0}, "max_new_tokens is 0"),
        ({"new": 1.5}, "max_new_tokens is 1.5"),
        ({"sampling": Sampling(temperature=np.zeros(3))}, r"temperature has the shape \(3,\)"),
        ({"prompts": PROMPTS[0]}, r"tokens are int32 \(12,\)"),
        ({"prompts": PROMPTS[:, :0]}, "neither of them zero"),
        ({"prompts": PROMPTS[:0], "lengths": LENGTHS[:0]}, "neither of them zero"),
        ({"prompts": PROMPTS * 1.0}, "tokens are float"),
        ({"lengths": LENGTHS[:2]}, "expected one for each of 4 rows"),
        ({"key": np.zeros(2, np.uint32)}, "the key is uint32"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"the key is key<fry> \(3,\)"),
    ],
)
def test_shapes_that_mean_nothing_are_refused(model, change, message):
    with pytest.raises(RequestError, match=message):
        generate(model, **({"sampling": GREEDY} | change))


def test_any_number_of_stop_ids(model):
    params, config = model
    free = generate(model, GREEDY)
    config = replace(config, stop_ids=tuple(range(KNOWN)))  # the last of them too
    stopped = generate((params, config), GREEDY)
    assert (stopped[:, 0] == free[:, 0]).all() and (stopped[:, 1:] == NO_TOKEN).all()
    with_last = replace(config, stop_ids=(*[KNOWN - 1] * 20, int(free[0, 3])))
    np.testing.assert_array_equal(generate((params, with_last), GREEDY)[0], cut(free[:1], with_last.stop_ids)[0])


def test_padded_ids_are_never_sampled(model):
    """Not at a temperature that makes all ids alike, nor where a penalty below 1 favours those of the prompt."""
    prompts = PROMPTS.copy()
    prompts[:, 0] = KNOWN + 3
    sampling = Sampling(100.0, **EVERYTHING, repeat_penalty=0.5)
    drawn = np.concatenate([generate(model, sampling, jax.random.key(seed), prompts) for seed in range(8)])
    assert drawn.min() >= 0 and drawn.max() < KNOWN
    assert len(np.unique(drawn)) > KNOWN / 2  # of 512 draws: without the mask, 38 would be padding


# Steps


def start(model, sampling, remaining, stop_ids=(), length=LENGTH + NEW + 4):
    """A state after the prompts, and the hidden states from which the first tokens follow."""
    params, config = model
    stops = np.full((ROWS, decoding.MAX_STOP_IDS), NO_TOKEN, np.int32)
    stops[:, : len(stop_ids)] = stop_ids
    keys = row_keys([5, 6, 7, 8])
    state = init_state(config, np.array(remaining, np.int32), keys, stops, sampling.rows(ROWS), length=length)
    hidden = jnp.zeros((ROWS, config.d_model))
    return prefill(params, config, state, hidden, PROMPTS, LENGTHS)


def test_prefill_marks_the_real_tokens_as_seen(model):
    state, hidden = start(model, GREEDY, [1] * ROWS)
    for row in range(ROWS):
        assert set(np.flatnonzero(state.seen[row]).tolist()) == set(PROMPTS[row, : LENGTHS[row]].tolist())
    assert state.cache.lengths.tolist() == LENGTHS.tolist()
    # Rows without tokens in a chunk keep what they have.
    params, config = model
    counts = np.array([0, 3, 0, 1], np.int32)
    later, newest = prefill(params, config, state, hidden, PROMPTS, counts)
    changed = (np.asarray(hidden) != np.asarray(newest)).any(axis=1)
    assert changed.tolist() == [False, True, False, True]
    assert later.cache.lengths.tolist() == (LENGTHS + counts).tolist()
    np.testing.assert_array_equal(np.asarray(later.seen)[::2], np.asarray(state.seen)[::2])


@pytest.fixture(scope="module")
def decoded(model):
    """17 steps in one piece and in two: rows that end by count, by a stop id, before they begin, or not at all."""
    params, config = model
    state, hidden = start(model, MIXED, [3, 40, 40, 0])
    _, emitted = decode(params, config, emit(params, config, state, hidden, top_logprobs=3)[0], 16, 3)
    stop = int(emitted.tokens[6, 1])

    state, hidden = start(model, MIXED, [3, 40, 40, 0], (stop,))
    state, first = emit(params, config, state, hidden, top_logprobs=3)
    whole = decode(params, config, state, 16, 3)
    middle, one = decode(params, config, state, 8, 3)
    last, two = decode(params, config, middle, 8, 3)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two)
    return first, whole, (last, joined), stop


def assert_same(one, other):
    """Of states and what was emitted, bit for bit."""

    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), one, other)


def test_two_chunks_are_one(decoded):
    _, whole, chunks, _ = decoded
    assert_same(whole, chunks)


@pytest.mark.parametrize("top_logprobs", [None, 2])
def test_tokens_without_logits_are_the_same(model, top_logprobs):
    """Rows that end by count, by a stop id, by what is not finite, before they begin, or not at all."""
    params, config = model
    state, hidden = start(model, GREEDY, [40] * ROWS)
    state, _ = emit(params, config, state, hidden)
    free = np.asarray(decode(params, config, state, 16)[1].tokens)
    poisoned = next(t for t in free[3:, 3] if np.sum(free == t) == np.sum(free[:, 3] == t))
    params = poison(poison(params, "embedding", poisoned), "head", KNOWN)  # the latter is no known token

    def run(method):
        state, hidden = start((params, config), GREEDY, [3, 40, 0, 40], (int(free[5, 1]),))
        state, first = emit(params, config, state, hidden, top_logprobs, method)
        return first, *decode(params, config, state, 16, top_logprobs, method)

    expected = run("any")
    tokens = np.asarray(expected[2].tokens)
    assert NOT_FINITE in tokens[:, 3] and free[5, 1] in tokens[:, 1] and (tokens[:, 2] == NO_TOKEN).all()
    assert_same(run("argmax"), expected)


def test_the_method_argmax_takes_the_op_that_makes_no_logits(model, monkeypatch):
    params, config = model
    found = jnp.zeros(ROWS), jnp.full(ROWS, 7, jnp.int32)
    monkeypatch.setitem(ARGMAX, "fake", lambda x, weight, known: found if known == KNOWN else None)
    state, hidden = start(model, GREEDY, [40] * ROWS)
    with pallas_kernels.use("fake"):
        for method, top_logprobs in (("argmax", None), ("argmax", 0), ("greedy", None)):
            emitted = decoding.emit(params, config, state, hidden, top_logprobs, method)[1]
            assert (emitted.tokens.tolist() == [7] * ROWS) == (method == "argmax" and top_logprobs is None)


def test_ended_rows_emit_and_write_nothing(decoded):
    first, (state, emitted), _, stop = decoded
    tokens = np.concatenate([first.tokens[None], emitted.tokens]).T
    assert (tokens[0, :3] >= 0).all() and (tokens[0, 3:] == NO_TOKEN).all()
    ended = tokens[1].tolist().index(stop)
    assert 0 < ended < 16 and (tokens[1, ended + 1 :] == NO_TOKEN).all()
    assert (tokens[2] >= 0).all()
    assert (tokens[3] == NO_TOKEN).all()
    # Every token but a row's last one is in the cache.
    counts = np.array([2, ended, 16, 0])
    assert state.cache.lengths.tolist() == (LENGTHS + counts).tolist()
    for array in jax.tree.leaves(state.cache.layers):
        written = np.asarray(array != 0).any(axis=(1, 3))
        np.testing.assert_array_equal(written, np.arange(array.shape[2]) < np.asarray(state.cache.lengths)[:, None])


def test_logprobs_are_those_of_a_teacher_forced_pass(model, decoded):
    """Before penalty, truncation and temperature, over the known tokens."""
    first, (_, later), _, _ = decoded
    emitted = Emitted(*(np.concatenate([a[None], b]) for a, b in zip(first, later, strict=True)))
    row = 2  # the one that runs to the end
    tokens, chosen, top_ids, top = (np.asarray(x)[:NEW, row] for x in emitted)
    logits = teacher_forced(model, PROMPTS, LENGTHS, np.tile(tokens, (ROWS, 1)))[row].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(logits[:, :KNOWN]).max())
    close(chosen, np.take_along_axis(expected, tokens[:, None], axis=-1)[:, 0])
    assert np.any(chosen < top[:, 0])  # not all are the likeliest
    order = np.argsort(-logits, axis=-1)[:, :3]
    assert top_ids.tolist() == order.tolist()
    close(top, np.take_along_axis(expected, order, axis=-1))


# What is not finite


def poison(params, name, token):
    return {**params, name: params[name].at[token].set(np.nan)}


def test_a_row_that_is_not_finite_ends_alone(model):
    params, config = model
    plain = generate(model, GREEDY)
    in_prompt = next(t for t in PROMPTS[1] if t not in plain and t not in PROMPTS[[0, 2, 3]])
    expected = plain.copy()
    expected[1] = [NOT_FINITE] + [NO_TOKEN] * (NEW - 1)
    assert generate((poison(params, "embedding", in_prompt), config), GREEDY).tolist() == expected.tolist()

    step = next(s for s in range(2, NEW - 2) if np.sum(plain == plain[0, s]) == 1 and plain[0, s] not in PROMPTS)
    expected = plain.copy()
    expected[0, step + 1 :] = [NOT_FINITE] + [NO_TOKEN] * (NEW - step - 2)
    assert generate((poison(params, "embedding", plain[0, step]), config), GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_of_many_that_is_not_finite_ends_a_row(method, temperature):
    config = replace(ModelConfig.from_preset("qwen2.5-0.5b"), vocab_size=4001, known_tokens=4001)
    sampling = Sampling(temperature).rows(2)
    state = init_state(config, jnp.full(2, 9), row_keys([0, 0]), jnp.full((2, 1), NO_TOKEN), sampling, 8)
    logits = jax.random.normal(jax.random.key(0), (2, 4001))
    advance = jax.jit(decoding._emit, static_argnums=(0, 3, 4))
    _, emitted = advance(config, state, logits.at[1, 1333].set(jnp.nan), None, method)
    assert emitted.tokens[0] >= 0 and emitted.tokens[1] == NOT_FINITE


def test_a_padded_id_may_hold_anything(model):
    params, config = model
    assert generate((poison(params, "head", KNOWN), config), MIXED).tolist() == generate(model, MIXED).tolist()
    poisoned = generate((poison(params, "head", KNOWN - 1), config), MIXED)
    assert np.all(poisoned[:, 0] == NOT_FINITE)


# Programs


def test_other_requests_compile_nothing(model, caplog):
    with compilations(caplog) as names:
        generate(model, GREEDY, new=2)
    assert "jit(_generate_tokens)" in names
    rng = np.random.default_rng(2)
    requests = []
    for seed, sampling in enumerate([Sampling(0), Sampling(1.0, **EVERYTHING), Sampling(repeat_penalty=1.1)]):
        prompts = rng.integers(0, KNOWN, PROMPTS.shape).astype(np.int32)
        lengths = rng.integers(1, LENGTH + 1, ROWS).astype(np.int32)
        requests.append((sampling, jax.random.key(seed), prompts, lengths))
    with compilations(caplog) as names:
        for request in requests:
            generate(model, *request, new=2)
    assert names == []
    with compilations(caplog) as names:
        generate(model, MIXED.rows(ROWS), new=2)
        generate(model, GREEDY.rows(ROWS), new=2)
    assert names.count("jit(_generate_tokens)") == 1  # arrays are another program than numbers, and one for all


def equations(jaxpr, name):
    """The equations of a primitive at a jaxpr's top, calls opened."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        elif "jaxpr" in equation.params and equation.primitive.name in ("jit", "pjit"):
            yield from equations(equation.params["jaxpr"].jaxpr, name)


def test_decoding_is_one_scan(model):
    params, config = model
    texts = []
    for new in (NEW, 3 * NEW):
        function = partial(decoding.generate_tokens, max_new_tokens=new, sampling=GREEDY)
        jaxpr = jax.make_jaxpr(function, static_argnums=1)(params, config, PROMPTS, LENGTHS, jax.random.key(0))
        assert [scan.params["length"] for scan in equations(jaxpr.jaxpr, "scan")] == [1, new - 1]
        texts.append(str(jaxpr))
    assert texts[0].count("\n") == texts[1].count("\n")


def compiled_decode(model, batch, length, donate):
    """The decode program for a long cache, its biggest copies by computation, and the bytes of a layer's keys."""
    params, config = model
    state = jax.eval_shape(
        lambda: decoding.init_state(
            config, jnp.zeros(batch, jnp.int32), row_keys([0] * batch),
            jnp.zeros((batch, decoding.MAX_STOP_IDS), jnp.int32), GREEDY.rows(batch), length,
        )
    )  # fmt: skip
    function = jax.jit(lambda params, state: decoding.decode(params, config, state, 8), donate_argnums=donate)
    program = function.lower(params, state).compile()
    layer = math.prod(state.cache.layers[0].keys.shape)
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    return program.memory_analysis(), sum(math.prod(map(int, shape.split(","))) == layer for shape in shapes), 4 * layer


@pytest.mark.parametrize("batch", [1, ROWS])
def test_the_donated_cache_is_updated_in_place(model, batch):
    """No program's temporaries hold a layer's keys or values, and no step copies them."""
    _, config = model
    memory, copies, layer_bytes = compiled_decode(model, batch, 4096, donate=1)
    assert memory.alias_size_in_bytes >= config.cache_bytes(batch, 4096)
    assert copies == 0
    assert memory.temp_size_in_bytes < layer_bytes  # scores [B, N, S] and their like


def test_a_cache_that_is_not_donated_is_copied(model):
    """The test above can fail."""
    memory, copies, _ = compiled_decode(model, ROWS, 4096, donate=())
    assert memory.alias_size_in_bytes == 0
    assert copies == 2 * model[1].n_layers


def test_generation_is_exported_and_comes_back(model):
    pytest.importorskip("flatbuffers", reason="needs the package flatbuffers, with which jax.export writes")
    params, config = model

    @jax.jit
    def function(params, tokens, lengths, key):
        return orcd_jax.generate_tokens(params, config, tokens, lengths, key, max_new_tokens=4, sampling=GREEDY)

    arguments = params, PROMPTS, LENGTHS, jax.random.key(0)
    exported = jax.export.export(function)(*arguments)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(jax.jit(restored.call)(*arguments), generate(model, GREEDY)[:, :4])
