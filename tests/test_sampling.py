"""Sampling: what truncation keeps and how often each token is drawn, against NumPy in float64 written here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orcd_jax.errors import RequestError
from orcd_jax.sampling import Sampling, method_of, penalize, row_keys, sample, value_dtype

compiled_sample = jax.jit(sample)
EVERYTHING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # truncates nothing


def draw(logits, sampling, seeds, steps):
    """One token for each row of logits [B, V]."""
    logits = jnp.asarray(logits, jnp.float32)
    return np.asarray(compiled_sample(logits, sampling.rows(len(logits)), row_keys(seeds), jnp.asarray(steps))[0])


def draw_often(logits, sampling, times, seed=0):
    """Many draws from one row's logits [V], each of a step of its own."""
    return draw(np.tile(logits, (times, 1)), sampling, [seed] * times, np.arange(times, dtype=np.int32))


def kept_tokens(logits, sampling):
    """Ids that top-k, top-p and min-p, in this order, leave; and how near the nearest decision was."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k or None]
    p = np.exp(np.array([logits[i] for i in order], np.float64) - logits[order[0]])
    p /= p.sum()
    margins, kept, before = [1.0], [], 0.0
    for rank, token in enumerate(order):
        ratio = p[rank] / p[0]
        if rank and sampling.top_p < 1:
            margins.append(abs(before - sampling.top_p))
        if logits[token] < logits[order[0]] and sampling.min_p > 0:
            margins.append(abs(ratio - sampling.min_p))
        reached = before >= sampling.top_p and sampling.top_p < 1
        if rank == 0 or (not reached and ratio >= sampling.min_p and p[rank] > 0):
            kept.append(token)
        before += p[rank]
    return kept, min(margins)


def random_logits(seed, *shape, std=3.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# Truncation

eighths = st.one_of(st.integers(-80, 80).map(lambda n: n / 8), st.just(-math.inf))  # ties and forbidden tokens


@st.composite
def truncations(draw, vocab):
    logits = draw(st.lists(eighths, min_size=vocab, max_size=vocab))
    assume(max(logits) > -math.inf)
    sampling = Sampling(
        temperature=1e30,  # makes every kept token as likely as the others
        top_k=draw(st.one_of(st.sampled_from([0, 1, vocab - 1, vocab, vocab + 1]), st.integers(0, vocab))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0.001, 0.999))),
        min_p=draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0001, 0.9))),
    )
    return logits, sampling


def assert_keeps(logits, sampling, times):
    expected, margin = kept_tokens(logits, sampling)
    assume(margin > 1e-5)  # float32 may decide otherwise
    assert sorted(set(draw_often(logits, sampling, times).tolist())) == sorted(expected)


@settings(deadline=None, max_examples=150)
@given(truncations(24))
@example(([0.0] * 24, Sampling(1e30, 7, 1.0, 1.0)))
@example(([-math.inf] * 23 + [0.0], Sampling(1e30, **EVERYTHING)))
def test_truncation_keeps_the_documented_set(case):
    assert_keeps(*case, times=1024)  # misses one of 24 equally likely tokens with a probability below 1e-17


@settings(deadline=None, max_examples=25)
@given(truncations(160))
def test_truncation_keeps_the_documented_set_of_many(case):
    assert_keeps(*case, times=8192)


# Draws

DISTRIBUTIONS = {
    "plain": Sampling(1.0, **EVERYTHING),
    "default": Sampling(),
    "cold, top-k": Sampling(0.5, top_k=8, top_p=1.0, min_p=0.0),
    "hot, top-p": Sampling(2.0, top_k=0, top_p=0.9, min_p=0.0),
    "min-p": Sampling(0.8, top_k=0, top_p=1.0, min_p=0.1),
    "all of them": Sampling(1.5, top_k=50, top_p=0.95, min_p=0.02),
}


@pytest.mark.parametrize("vary", ["step", "seed"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_documented_distribution(name, vary):
    times, sampling, logits = 20_000, DISTRIBUTIONS[name], random_logits(7, 300)
    numbers = np.arange(times, dtype=np.int32)
    seeds, steps = (numbers, np.full_like(numbers, 3)) if vary == "seed" else (np.full_like(numbers, 3), numbers)
    tokens = draw(np.tile(logits, (times, 1)), sampling, seeds, steps)

    kept, margin = kept_tokens(logits, sampling)
    assert margin > 1e-5 and len(kept) > 5
    p = np.exp((logits[kept].astype(np.float64) - logits[kept[0]]) / sampling.temperature)
    expected = times * p / p.sum()
    counts = np.bincount(tokens, minlength=len(logits))
    assert counts.sum() == counts[kept].sum()
    # Pearson's test, with the rare tokens, for which it does not hold, as one bin.
    rare = expected < 5
    bins = [*zip(counts[kept][~rare], expected[~rare], strict=True)]
    if expected[rare].sum() >= 5:
        bins.append((counts[kept][rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    freedom = len(bins) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)  # five standard deviations, both ways


def test_successive_steps_are_independent():
    times = 8192
    tokens = draw_often(np.zeros(160), Sampling(1.0, top_k=2), times)
    pairs = np.bincount(2 * tokens[:-1] + tokens[1:], minlength=4)
    np.testing.assert_allclose(pairs, times / 4, atol=5 * math.sqrt(times * 3 / 16))


def test_greedy_ties_go_to_the_lower_id():
    logits = np.full((3, 200), -1.0, np.float32)
    logits[0, [7, 9]] = logits[1, [0, 199]] = 3.0
    logits[2, [130, 131]] = [-0.0, 0.0]
    for sampling in (Sampling(0.0), Sampling(0.0, **EVERYTHING), Sampling(0.0, top_k=1, top_p=0.1)):
        assert draw(logits, sampling, [1, 2, 3], np.array([4, 5, 6])).tolist() == [7, 0, 130]
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_k=0, top_p=1e-6), Sampling(1e-9, top_k=1)):
        assert draw(logits, sampling, [1, 2, 3], np.array([4, 5, 6]))[:2].tolist() == [7, 0]


@pytest.mark.parametrize("vocab", [24, 128, 129, 500])
def test_sorting_few_or_all_draws_the_same(vocab):
    """A neighbour that keeps the whole vocabulary makes the program sort it, and changes no draw."""
    rows = 65
    logits, seeds, steps = random_logits(vocab, rows, vocab), range(rows), np.arange(rows, dtype=np.int32)
    logits[::3] = np.round(logits[::3])  # ties

    def tokens(top_k, neighbour, **values):
        top_ks = np.array([top_k] * (rows - 1) + [neighbour])
        return draw(logits, Sampling(1.5, top_ks, **values), seeds, steps)[:-1].tolist()

    for top_k in (1, 2, 40, 127, 128):
        assert tokens(top_k, 1) == tokens(top_k, 0)
    everything = tokens(0, 0)
    assert everything != tokens(2, 0)
    for top_k in (vocab, vocab + 1, 2**31 - 1):
        assert tokens(top_k, top_k) == tokens(top_k, 0) == everything
    # Where min-p leaves few enough, top-k leaves out nothing more.
    assert all(len(kept_tokens(row, Sampling(1.5, 0, 1.0, 0.05))[0]) < 128 for row in logits)
    assert tokens(128, 1, top_p=1.0, min_p=0.05) == tokens(0, 0, top_p=1.0, min_p=0.05)


def test_a_draw_belongs_to_its_row_alone():
    """Not to its place, nor to its neighbours' logits and parameters."""
    rows, vocab = 16, 200
    logits, seeds, steps = random_logits(1, rows, vocab), np.arange(rows), np.arange(rows, dtype=np.int32) * 3
    rng = np.random.default_rng(2)
    columns = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 3.0], rows),
        "top_k": rng.choice([0, 1, 40, 128, 150], rows),
        "top_p": rng.choice([0.5, 0.9, 1.0], rows),
        "min_p": rng.choice([0.0, 0.05], rows),
    }
    together = draw(logits, Sampling(**columns), seeds, steps)
    for row in range(rows):
        own = Sampling(**{name: column[row] for name, column in columns.items()})
        assert draw(logits[[row]], own, [row], steps[[row]]) == together[row]
    order = rng.permutation(rows)
    shuffled = Sampling(**{name: column[order] for name, column in columns.items()})
    np.testing.assert_array_equal(draw(logits[order], shuffled, seeds[order], steps[order]), together[order])
    poisoned = logits.copy()
    poisoned[::2] = np.nan
    np.testing.assert_array_equal(draw(poisoned, Sampling(**columns), seeds, steps)[1::2], together[1::2])


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1.0, 1e30, 1e38, 3.4e38])
@pytest.mark.parametrize("truncation", [EVERYTHING, {"top_k": 128, "top_p": 1.0, "min_p": 0.0}], ids=["all", "top-k"])
def test_a_forbidden_token_is_never_drawn(temperature, truncation):
    logits = random_logits(3, 160)
    logits[20:] = -np.inf
    tokens = draw_often(logits, Sampling(temperature, **truncation), 8192)
    assert tokens.max() < 20
    if temperature < 1e-3:
        assert set(tokens) == {logits.argmax()}
    elif temperature > 1e3:
        assert set(tokens) == set(range(20))


def test_the_only_allowed_token_is_chosen():
    logits = np.full((3, 200), -np.inf, np.float32)
    logits[:, 117] = [-3e38, 0.0, 3e38]
    for sampling in (Sampling(0.0), Sampling(), Sampling(1.0, **EVERYTHING)):
        assert draw(logits, sampling, range(3), np.arange(3)).tolist() == [117] * 3


# Penalty


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits = random_logits(4, 3, 50)
    logits[:, 0], logits[:, 1] = 0.0, -np.inf
    seen = np.random.default_rng(5).random((3, 50)) < 0.5
    penalties = np.array([1.3, 0.5, 1.0], np.float32)
    expected = logits.copy()
    for row, token in np.argwhere(seen):
        score = expected[row, token]
        expected[row, token] = score / penalties[row] if score > 0 else score * penalties[row]
    np.testing.assert_allclose(penalize(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(penalties)), expected, 2e-7)
    np.testing.assert_array_equal(expected[2], logits[2])


# Values


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0, 0, 1, 0, 1),
        Sampling(0.0, 2**31 - 1, 1.0, 1.0, 0.1),
        Sampling(np.float32(0.5), np.int64(7), 0.5, 0.1, 2),
        Sampling(np.array([0.0, 2.0]), [1, 2], jnp.array([0.1, 1.0]), (0.0, 1.0), 1.1),
    ],
)
def test_good_values_pass(sampling):
    sampling.check()


BAD = {
    "temperature": [-0.1, -1, [0.5, -1.0]],
    "top_k": [-1, 1.5, 2**31, np.array([40, -1]), [1, 2.5]],
    "top_p": [0, 0.0, -0.5, 1.0001, np.array([0.9, 1.5])],
    "min_p": [-0.01, 1.01, jnp.array([0.05, -1.0])],
    "repeat_penalty": [0.0, -1.0, (1.0, 0.0)],
}
NEVER = [math.nan, math.inf, -math.inf, np.array([0.5, np.nan]), True, np.array([True]), "0.5", None]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name] + NEVER])
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} is \S+; expected [^\n]+$"):
        Sampling(**{name: value}).check()


def test_rows_spread_numbers_and_keep_arrays():
    rows = Sampling(temperature=1, top_k=np.array([1, 2, 3]), top_p=np.array([0.5, 0.6, 0.7])).rows(3)
    assert rows.top_k.dtype == jnp.int32 and rows.top_k.tolist() == [1, 2, 3]
    for value, expected in ((rows.temperature, [1, 1, 1]), (rows.top_p, [0.5, 0.6, 0.7]), (rows.min_p, [0.05] * 3)):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, 1e-7)
    with pytest.raises(ValueError, match="broadcast"):
        Sampling(top_k=np.array([1, 2])).rows(3)


def test_split_gives_each_row_its_numbers():
    one, two = Sampling(np.array([0.5, 0.0]), top_k=7, top_p=[0.9, 1.0]).split(2)
    assert (one, two) == (Sampling(0.5, 7, 0.9), Sampling(0.0, 7, 1.0))
    with pytest.raises(RequestError, match=r"top_k has 3 values for 2 prompts"):
        Sampling(top_k=np.array([1, 2, 3])).split(2)


def test_other_values_compile_nothing():
    program = jax.jit(lambda logits, sampling, keys, steps: sample(logits, sampling.rows(2), keys, steps))
    for n, values in enumerate([{}, {"temperature": 0.0}, {"top_k": 0, "top_p": 1.0}, {"repeat_penalty": 2.0}]):
        program(jnp.asarray(random_logits(n, 2, 200)), Sampling(**values), row_keys([n, 5]), jnp.array([n, 9]))
    assert program._cache_size() == 1


def test_row_keys_are_of_one_generator():
    seeds = [0, 1, 2**32 - 1]
    keys = row_keys(seeds)
    assert keys.shape == (3,)
    assert jax.random.key_data(keys).tolist() == [[0, seed] for seed in seeds]
    with jax.default_prng_impl("rbg"):
        assert jnp.array_equal(jax.random.key_data(row_keys(seeds)), jax.random.key_data(keys))
        assert row_keys(seeds).dtype == keys.dtype


@pytest.mark.parametrize(
    "rows, method",
    [
        ([Sampling(temperature=0)], "argmax"),
        ([Sampling(temperature=0), Sampling(temperature=0, repeat_penalty=1.1)], "greedy"),
        ([Sampling(temperature=0, top_k=0), Sampling()], "largest"),
        ([Sampling(temperature=0, top_k=0, repeat_penalty=1.1), Sampling()], "candidates"),
        ([Sampling(top_k=0)], "any"),
        ([Sampling(top_k=65), Sampling(temperature=0)], "any"),
    ],
)
def test_every_method_that_serves_the_rows_chooses_the_same(rows, method):
    assert method_of(rows) == method
    logits = jax.random.normal(jax.random.key(0), (len(rows), 300)) * 3
    names = vars(rows[0])
    values = Sampling(**{n: jnp.asarray([getattr(row, n) for row in rows], value_dtype(n)) for n in names})
    keys, steps = row_keys(list(range(len(rows)))), jnp.arange(len(rows), dtype=jnp.int32)
    expected = sample(logits, values, keys, steps)
    order = ("argmax", "greedy", "largest", "candidates", "any")  # of logits that are penalised already
    for able in order[order.index(method) :]:
        found = sample(logits, values, keys, steps, able)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.array_equal(expected[1], logits.max(axis=-1))
