"""A prefix prefilled once is the same as prefilling it every time, in memory and from a file."""

import numpy as np
import pytest

import orcd_jax
from orcd_jax import Sampling
from orcd_jax.errors import RequestError

BEFORE = np.random.default_rng(0).integers(0, 300, 37).tolist()
AFTER = [[5], [6, 7, 8, 9], list(range(30))]


@pytest.mark.parametrize(
    ("name", "policy"), [("qwen2", "full"), ("phi3", "full"), ("qwen2", "sliding:16+int8"), ("qwen2", "compress:16")]
)
def test_continuing_a_prefix_is_the_whole(tiny, tmp_path, name, policy):
    model = orcd_jax.load(tiny(name), kv_cache=policy)
    sampling = Sampling(temperature=0.0, repeat_penalty=1.3)
    whole = model.generate([BEFORE + ids for ids in AFTER], 20, sampling, ignore_eos=True)
    prefix = model.prefill(BEFORE)
    prefix.save(tmp_path / "prefix.npz")
    for source in (prefix, prefix, model.load_prefix(tmp_path / "prefix.npz")):  # it is not used up
        continued = model.generate(AFTER, 20, sampling, ignore_eos=True, prefix=source)
        assert [c.token_ids for c in continued] == [c.token_ids for c in whole]
        assert [c.prompt_tokens for c in continued] == [c.prompt_tokens for c in whole]
    stream = model.stream(AFTER[1], 20, sampling, ignore_eos=True, prefix=prefix)
    assert "".join(stream) == whole[1].text


def test_a_text_that_continues_gets_no_second_bos(tiny):
    model = orcd_jax.load(tiny("phi3"))
    prefix = model.prefill("hello world")
    assert prefix.ids[0] == model.tokenizer.bos_id
    (c,) = model.generate("and you", 4, prefix=prefix)
    assert c.prompt_tokens == len(prefix.ids) + len(model.tokenizer.encode("and you"))


def test_a_prefix_of_another_model_is_refused(tiny, tmp_path):
    model = orcd_jax.load(tiny("qwen2"))
    prefix = model.prefill([1, 2, 3])
    prefix.save(tmp_path / "prefix.npz")
    for other in (
        orcd_jax.load(tiny("qwen2"), kv_cache="int8"),
        orcd_jax.load(tiny("qwen2"), weights="int8"),
        orcd_jax.load(tiny("llama")),
    ):
        with pytest.raises(RequestError, match="another model"):
            other.generate([[1]], 2, prefix=prefix)
        with pytest.raises(RequestError, match="another model"):
            other.load_prefix(tmp_path / "prefix.npz")


def test_a_damaged_file_is_refused(tiny, tmp_path):
    model = orcd_jax.load(tiny("qwen2"))
    path = tmp_path / "prefix.npz"
    with pytest.raises(RequestError, match="no such file"):
        model.load_prefix(path)
    model.prefill([1, 2, 3]).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["prefix.npz"]
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"", b"text", content[:middle], content[:-4], flipped):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match=r"damaged|another model"):
            model.load_prefix(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("length", -1, "damaged"),
        ("length", [1, 2], "damaged"),
        ("ids", [], "belong together"),
        ("ids", [1, 2], "belong together"),
        ("ids", 3, "belong together"),
        ("ids", [[1, 2, 3]], "belong together"),
        ("ids", [1.0, 2.0, 3.0], "belong together"),
        ("ids", [1, 2, 384], "outside 0 to 383"),
        ("ids", [1, -2, 3], "outside 0 to 383"),
        ("cache_4", np.array([4], np.int32).view(np.uint8), "belong together"),
        ("cache_1", np.full(1 << 14, 255, np.uint8), "not finite"),
    ],
)
def test_a_crafted_file_is_refused(tiny, tmp_path, name, value, message):
    model = orcd_jax.load(tiny("qwen2"))
    path = tmp_path / "prefix.npz"
    model.prefill([1, 2, 3]).save(path)
    arrays = dict(np.load(path))
    assert arrays["cache_4"].size == 4 and arrays["cache_1"].size == 1 << 14  # lengths, and a layer's values
    np.savez(path, **arrays | {name: np.asarray(value)})
    with pytest.raises(RequestError, match=message):
        model.load_prefix(path)


def test_prefix_and_prompt_must_fit_the_context(tiny):
    model = orcd_jax.load(tiny("qwen2"), context=64)
    prefix = model.prefill([1] * 50)
    assert model.generate([[2] * 13], 9, prefix=prefix, ignore_eos=True)[0].finish_reason == "context"
    with pytest.raises(RequestError, match="64 tokens"):
        model.generate([[2] * 14], 9, prefix=prefix)
    longer = orcd_jax.load(tiny("qwen2")).prefill([1, 2])
    with pytest.raises(RequestError, match="made for 256 tokens, above the context of 64"):
        model.generate([[2]], 9, prefix=longer)
