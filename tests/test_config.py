"""ModelConfig: keys and shapes into a config or a clear refusal; its formulas against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from tiny_models import SPECS, llama3_divisors

from orcd_jax.config import ModelConfig, array_bytes
from orcd_jax.errors import GGUFError, RequestError
from orcd_jax.gguf_reader import GGUFFile, TensorInfo
from orcd_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def files(tiny) -> dict[str, GGUFFile]:
    return {name: GGUFFile.open(tiny(name)) for name in SPECS}


def with_keys(file: GGUFFile, **keys: Any) -> GGUFFile:
    """The file with other values of its architecture's keys, `__` for a dot; None leaves a key out."""
    prefix = file.metadata["general.architecture"]
    changes = {f"{prefix}.{name.replace('__', '.')}": value for name, value in keys.items()}
    return with_metadata(file, changes)


def with_metadata(file: GGUFFile, changes: dict[str, Any]) -> GGUFFile:
    metadata = {key: value for key, value in (file.metadata | changes).items() if value is not None}
    return GGUFFile(file.path, metadata, file.tensors)


def with_tensor(file: GGUFFile, name: str, values: Any, kind: str = "F32") -> GGUFFile:
    values = np.asarray(values, np.float16 if kind == "F16" else np.float32)
    data = values.view(np.uint8).reshape(math.prod(values.shape[:-1]), -1)
    info = TensorInfo(name, values.shape, GGMLQuantizationType[kind], data)
    return GGUFFile(file.path, file.metadata, {**file.tensors, name: info})


def refused(file: GGUFFile, *parts: str) -> None:
    """No config comes of the file, but one short line that names it and holds all `parts`."""
    with pytest.raises(GGUFError) as caught:
        ModelConfig.from_gguf(file)
    message = str(caught.value)
    assert message.startswith(f"{file.path}: ") and message.isprintable() and len(message) < len(str(file.path)) + 300
    assert all(part in message for part in parts), message


# From a file


@pytest.mark.parametrize("name", SPECS)
def test_a_config_has_the_shapes_of_its_file(files, name):
    spec, config = SPECS[name], ModelConfig.from_gguf(files[name])
    assert config.name == f"Tiny {spec.architecture}" and config.architecture == spec.architecture
    for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "context_length"):
        assert getattr(config, field) == getattr(spec, field), field
    assert config.rms_norm_eps == pytest.approx(spec.eps) and config.rope_theta == spec.rope_theta
    assert config.query_group == spec.n_heads // spec.n_kv_heads
    assert config.tied_head == spec.tied and config.qkv_bias == (spec.architecture == "qwen2")
    assert config.sliding_window == spec.sliding_window
    assert config.rotary_dim is None and config.known_tokens is None and config.stop_ids == ()
    assert config.dtype == "float32"
    assert hash(config) == hash(ModelConfig.from_gguf(files[name])), "a static argument"


@pytest.mark.parametrize("architecture", ["gemma", "", None, 7, ["llama"], np.array([1, 2]), "llama\n" * 1000])
def test_other_architectures_are_refused(files, architecture):
    file = with_metadata(files["llama"], {"general.architecture": architecture})
    refused(file, "general.architecture is", "supported are llama, phi3, qwen2")


def test_a_file_without_weights_is_refused(files):
    refused(replace(files["llama"], tensors={}), "only a vocabulary, no weights")
    others = {name: info for name, info in files["llama"].tensors.items() if name != "token_embd.weight"}
    refused(replace(files["llama"], tensors=others), "no tensor 'token_embd.weight'")


INTEGERS = (
    "embedding_length", "block_count", "feed_forward_length", "context_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "attention.sliding_window",
)  # fmt: skip
WRONG_INTEGERS: tuple[Any, ...] = (
    -1, 1 << 25, (1 << 64) - 1, 4.0, math.nan, True, "4", "", [], ["4"] * 10**6, np.array([4, 4]), np.zeros(0, int),
)  # fmt: skip


@pytest.mark.parametrize("key", INTEGERS)
def test_a_key_that_is_no_sensible_integer_is_refused(files, key):
    for value in (0, *WRONG_INTEGERS):
        refused(with_keys(files["llama"], **{key.replace(".", "__"): value}), f"llama.{key} is", "expected")


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("embedding_length", 1 << 18), ("feed_forward_length", 1 << 18), ("block_count", 256),
        ("attention.head_count", 1024), ("attention.head_count_kv", 1024), ("attention.key_length", 1024),
        ("context_length", 1 << 24), ("attention.sliding_window", 1 << 24),
    ],
)  # fmt: skip
def test_no_model_is_that_large(files, key, most):
    refused(with_keys(files["llama"], **{key.replace(".", "__"): most + 1}), f"llama.{key} is", f"from 1 to {most}")


@pytest.mark.parametrize("key", INTEGERS[:5])
def test_a_key_that_is_needed_is_missed(files, key):
    refused(with_keys(files["llama"], **{key.replace(".", "__"): None}), f"the key llama.{key} is missing")


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear"])
def test_a_key_that_is_no_sensible_number_is_refused(files, key):
    for value in (0.0, -1e-5, 1e13, 1e-13, math.nan, math.inf, 1 << 63, True, "1e-5", [], np.array([1e-5, 1e-5])):
        refused(with_keys(files["llama"], **{key.replace(".", "__"): value}), f"llama.{key} is", "from 1e-12 to 1e12")


def test_the_epsilon_has_no_default(files):
    refused(
        with_keys(files["llama"], attention__layer_norm_rms_epsilon=None), "attention.layer_norm_rms_epsilon is miss"
    )


def test_what_may_be_left_out(files):
    """Key/value heads: as many as heads; base: 10000; head width: model width over heads."""
    file = with_keys(files["llama"], attention__head_count_kv=None, rope__freq_base=None, rope__dimension_count=None)
    config = ModelConfig.from_gguf(file)
    assert (config.n_kv_heads, config.rope_theta, config.head_dim, config.rotary_dim) == (4, 10000.0, 16, None)


def test_contradictions_are_refused(files):
    llama = files["llama"]
    refused(with_keys(llama, attention__head_count_kv=3), "attention.head_count_kv is 3", "a divisor of the 4 heads")
    refused(with_keys(llama, attention__head_count_kv=8), "attention.head_count_kv is 8", "a divisor of the 4 heads")
    refused(with_keys(llama, attention__value_length=32), "attention.value_length is 32", "the key length 16")
    wider = with_keys(llama, embedding_length=128, rope__dimension_count=None)
    refused(wider, "'token_embd.weight' has the shape [384, 64]", "[vocabulary, 128]")
    refused(with_tensor(llama, "token_embd.weight", np.ones(64)), "'token_embd.weight' has the shape [64]")
    tokens = ["x"] * 385
    refused(with_metadata(llama, {"tokenizer.ggml.tokens": tokens}), "tokens has 385 entries", "at most the 384 rows")


def test_mixtures_of_experts_are_refused(files):
    refused(with_keys(files["llama"], expert_count=8), "mixture of experts")
    refused(with_keys(files["llama"], expert_count=np.array([8, 8])), "llama.expert_count is an array of 2")
    assert ModelConfig.from_gguf(with_keys(files["llama"], expert_count=0)) == ModelConfig.from_gguf(files["llama"])


@pytest.mark.parametrize("name", ["a\x1b[1mb", "two\nlines", 7, ["x"] * 10, None])
def test_a_name_that_would_spoil_a_terminal_gives_way_to_the_files(files, name):
    config = ModelConfig.from_gguf(with_metadata(files["llama"], {"general.name": name}))
    assert config.name == files["llama"].path.stem


def test_a_long_name_is_cut(files):
    assert len(ModelConfig.from_gguf(with_metadata(files["llama"], {"general.name": "é" * 10**6})).name) == 80


# Rotation


def test_llama_rotates_whole_heads(files):
    for width in (8, 14, 18, 15):
        refused(with_keys(files["llama"], rope__dimension_count=width), "rope.dimension_count", "the head width 16")


def test_others_may_rotate_a_part_of_each_head(files):
    assert ModelConfig.from_gguf(with_keys(files["phi3"], rope__dimension_count=12)).rotary_dim == 12
    assert ModelConfig.from_gguf(with_keys(files["phi3"], rope__dimension_count=24)).rotary_dim is None
    for width in (13, 26):
        refused(with_keys(files["phi3"], rope__dimension_count=width), "an even number, at most the head width 24")


def test_frequencies_are_those_of_the_paper(files):
    config = ModelConfig.from_gguf(files["qwen2"])
    expected = [1e6 ** (-2 * i / 16) for i in range(8)]
    frequencies = config.rope_frequencies()
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2**-24)
    part = replace(config, rotary_dim=4, rope_divisors=(2.0, 8.0)).rope_frequencies()
    np.testing.assert_allclose(part, [1 / 2, 1e6**-0.5 / 8], rtol=2**-24)


def test_linear_scaling(files):
    config = ModelConfig.from_gguf(files["llama-linear"])
    assert config.rope_divisors == (2.0,) * 8 and config.rope_magnitude == 1.0
    plain = files["llama"]
    older = ModelConfig.from_gguf(with_keys(plain, rope__scale_linear=4.0))
    silent = ModelConfig.from_gguf(with_keys(plain, rope__scaling__factor=4.0))
    assert older.rope_divisors == silent.rope_divisors == (4.0,) * 8
    one = with_keys(plain, rope__scaling__type="linear", rope__scaling__factor=1.0)
    none = with_keys(plain, rope__scaling__type="none", rope__scaling__factor=4.0)
    assert ModelConfig.from_gguf(one).rope_divisors is None and ModelConfig.from_gguf(none).rope_divisors is None


def test_llama3_scaling(files):
    config = ModelConfig.from_gguf(files["llama-tied-rope3"])
    assert config.rope_divisors == tuple(llama3_divisors(SPECS["llama-tied-rope3"]).tolist())


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "su", "", "linear\n", 3, ["linear"], np.array([1, 2])])
def test_other_scalings_are_refused(files, kind):
    refused(with_keys(files["llama"], rope__scaling__type=kind), "llama.rope.scaling.type is", "expected")


def test_longrope_goes_by_the_context(files):
    file, scaling = files["phi3-longrope"], SPECS["phi3-longrope"].rope_scaling
    assert scaling is not None
    short, long = (tuple(np.float32(scaling[f"{kind}_factor"]).tolist()) for kind in ("short", "long"))
    assert ModelConfig.from_gguf(file).rope_divisors == long, "the whole context of 256"
    for context, expected in ((1, short), (64, short), (65, long), (256, long)):
        assert ModelConfig.from_gguf(file, context).rope_divisors == expected
    # The magnitude is the model's, whatever is used of its context: sqrt(1 + ln(256 / 64) / ln(64)).
    for context in (64, 256):
        assert ModelConfig.from_gguf(file, context).rope_magnitude == pytest.approx(math.sqrt(4 / 3))
    assert ModelConfig.from_gguf(with_keys(file, rope__scaling__attn_factor=None)).rope_magnitude == pytest.approx(
        math.sqrt(4 / 3)
    )
    assert ModelConfig.from_gguf(with_keys(file, rope__scaling__attn_factor=1.5)).rope_magnitude == 1.5
    whole = with_keys(file, rope__scaling__attn_factor=None, rope__scaling__original_context_length=256)
    assert ModelConfig.from_gguf(whole).rope_magnitude == 1.0


def test_longrope_that_is_not_whole_is_refused(files):
    file = files["phi3-longrope"]
    refused(with_keys(file, rope__scaling__original_context_length=None), "original_context_length is missing")
    for kind, context in (("long", 256), ("short", 64)):
        rest = {name: info for name, info in file.tensors.items() if kind not in name}
        with pytest.raises(GGUFError, match=f"'rope_factors_{kind}.weight' is missing"):
            ModelConfig.from_gguf(replace(file, tensors=rest), context)
    refused(with_keys(files["phi3"], rope__scaling__type="longrope"), "'rope_factors_short.weight' is missing")


def test_two_scalings_at_once_are_refused(files):
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
    for name in ("llama-tied-rope3", "phi3-longrope"):
        refused(with_keys(files[name], **linear), "more than one kind of RoPE scaling")
    refused(with_tensor(files["phi3-longrope"], "rope_freqs.weight", np.ones(8)), "more than one kind of RoPE scaling")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 1e-7, 1e7])
def test_divisors_are_checked(files, bad):
    name = "rope_freqs.weight"
    refused(with_tensor(files["llama"], name, [1.0] * 7 + [bad]), f"tensor {name!r} has values outside", "1e-6 to 1e6")


def test_divisors_have_the_right_shape_and_type(files):
    name = "rope_freqs.weight"
    for values in (np.ones(16), np.ones(7), np.ones((1, 8))):
        refused(with_tensor(files["llama"], name, values), f"tensor {name!r} is F32 {list(values.shape)}", "F32 [8]")
    refused(with_tensor(files["llama"], name, np.ones(8), kind="F16"), f"tensor {name!r} is F16 [8]", "F32 [8]")


# The window


def test_a_silent_phi3_of_4096_tokens_has_its_window(files):
    """Microsoft's file lacks the key; the model was trained with 2047."""

    def window(**keys):
        return ModelConfig.from_gguf(with_keys(files["phi3"], **keys)).sliding_window

    assert window(context_length=4096, attention__sliding_window=None) == 2047
    assert window(context_length=8192, attention__sliding_window=None) is None
    assert window(context_length=4096, attention__sliding_window=1000) == 1000
    assert window(context_length=4096, attention__sliding_window=0) is None, "Phi-4's converter writes 0 for none"


def test_others_have_the_window_they_name(files):
    for name in ("llama", "qwen2"):
        silent = with_keys(files[name], context_length=4096)
        assert ModelConfig.from_gguf(silent).sliding_window is None
        assert ModelConfig.from_gguf(with_keys(silent, attention__sliding_window=1024)).sliding_window == 1024
        refused(with_keys(silent, attention__sliding_window=0), "attention.sliding_window is 0", "from 1")


# Presets

QWEN, PHI3, SMOLLM = (ModelConfig.from_preset(name) for name in ("qwen2.5-0.5b", "phi-3-mini-4k", "smollm2-135m"))


def shapes_only(config: ModelConfig) -> ModelConfig:
    """Without what the name and the tokeniser add, and with float32 keys rounded as a file has them."""
    eps = float(np.float32(config.rms_norm_eps))
    return replace(config, name="", known_tokens=None, stop_ids=(), rms_norm_eps=eps)


def test_presets_are_the_models(default_model, model_file):
    assert shapes_only(SMOLLM) == shapes_only(ModelConfig.from_gguf(GGUFFile.open(default_model)))
    # The coder has the shapes of its general sibling; its file repeats the tied head.
    coder = GGUFFile.open(model_file("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"))
    assert shapes_only(QWEN) == replace(shapes_only(ModelConfig.from_gguf(coder)), tied_head=True)


def test_presets_know_the_tokens_of_the_vocabularies(default_model, model_file):
    assert Tokenizer.from_gguf(default_model).known_tokens == SMOLLM.known_tokens
    for name, preset in (("vocab-phi-3.gguf", PHI3), ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", QWEN)):
        assert Tokenizer.from_gguf(model_file(name)).known_tokens == preset.known_tokens


def test_a_vocabulary_is_no_model(model_file):
    refused(GGUFFile.open(model_file("vocab-phi-3.gguf")), "only a vocabulary, no weights")


def test_an_unknown_preset_names_the_known_ones():
    for name in ("gpt-5", "", "../pyproject", "__init__", "qwen2.5-0.5b.toml"):
        with pytest.raises(RequestError, match=r"phi-3-mini-4k, qwen2\.5-0\.5b, smollm2-135m"):
            ModelConfig.from_preset(name)


def test_the_beginning_of_a_presets_name_will_do():
    assert ModelConfig.from_preset("phi-3-mini") == PHI3


def test_every_preset_file_is_a_config():
    for path in (Path(__file__).parents[1] / "configs").glob("*.toml"):
        config = ModelConfig.from_preset(path.stem)
        assert config.n_heads % config.n_kv_heads == 0 and hash(config)


# Formulas, against the models' published shapes worked out by hand


def test_parameters_of_qwen():
    """24 x (896 x (14 + 2 + 2) x 64 + 1152 + 896^2 + 3 x 896 x 4864 + 2 x 896) + 151936 x 896 + 896."""
    layer = 896 * 1152 + 1152 + 896 * 896 + 3 * 896 * 4864 + 2 * 896
    assert layer == 14_912_384
    assert QWEN.param_count() == 24 * layer + 151_936 * 896 + 896 == 494_032_768  # the model card says 0.49 B


def test_parameters_of_phi3():
    layer = 9216 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192 + 2 * 3072
    assert PHI3.param_count() == 32 * layer + 2 * 32064 * 3072 + 3072 == 3_821_079_552  # the model card says 3.8 B


def test_parameters_of_smollm():
    layer = (576 + 2 * 192) * 576 + 576 * 576 + 3 * 576 * 1536 + 2 * 576
    assert SMOLLM.param_count() == 30 * layer + 49152 * 576 + 576 == 134_515_008  # the model card says 135 M


def test_cache_bytes_a_token():
    """2 (keys and values) x layers x key/value heads x head width x 2 bytes."""
    assert replace(QWEN, dtype="bfloat16").cache_bytes(1, 1) == 2 * 24 * 2 * 64 * 2 == 12_288
    assert replace(PHI3, dtype="bfloat16").cache_bytes(1, 1) == 2 * 32 * 32 * 96 * 2 == 393_216
    assert replace(SMOLLM, dtype="bfloat16").cache_bytes(1, 1) == 2 * 30 * 3 * 64 * 2 == 23_040
    assert QWEN.cache_bytes(1, 1) == 2 * 12_288, "float32"
    assert QWEN.cache_bytes(3, 100) == 300 * QWEN.cache_bytes(1, 1)


def test_bytes_of_an_array():
    assert array_bytes((100,), "int8") == array_bytes((100,), "bf16") == array_bytes((100,), "f32") == 400
    assert array_bytes((3, 64), "f32") == 768 and array_bytes((3, 64), "bf16") == 384
    assert array_bytes((3, 64), "int8") == 3 * 64 + 3 * 2 * 2, "a scale of two bytes for each 32"
    assert array_bytes((3, 48), "int8") == 288, "no multiple of 32: kept in bf16"


def test_weight_bytes():
    vectors = 24 * (1152 + 2 * 896) + 896
    matrices = QWEN.param_count() - vectors
    assert QWEN.weight_bytes("f32") == 4 * 494_032_768
    assert QWEN.weight_bytes("bf16") == 2 * matrices + 4 * vectors
    assert QWEN.weight_bytes("int8") == matrices * 34 // 32 + 4 * vectors


def test_bytes_that_a_decode_step_reads():
    """17/16 bytes a weight: 0.525 GB for Qwen's 0.494 B weights, of which the tied head reads every row."""
    assert QWEN.step_bytes("int8") == QWEN.weight_bytes("int8")
    assert QWEN.step_bytes("int8") / 1e9 == pytest.approx(0.525, abs=5e-4)
    assert PHI3.step_bytes("int8") / 1e9 == pytest.approx(3.956, abs=5e-4)
    assert PHI3.weight_bytes("int8") - PHI3.step_bytes("int8") == 32064 * 3072 * 17 // 16, "the embedding's rows"
    assert QWEN.step_bytes("bf16", 4, 100) - QWEN.step_bytes("bf16") == QWEN.cache_bytes(4, 100)


def test_operations_of_a_token():
    """Two for each weight of a matrix, the head among them, and for each cached position and query head 4 H."""
    matrices = 24 * (1152 * 896 + 896 * 896 + 3 * 896 * 4864) + 151_936 * 896
    assert QWEN.token_flops() == 2 * matrices
    assert QWEN.token_flops() / 1e9 == pytest.approx(0.988, abs=5e-4)
    assert QWEN.token_flops(1000) - QWEN.token_flops() == 24 * 1000 * 14 * 64 * 4
    head = 2 * 32064 * 3072
    assert PHI3.token_flops() == 2 * 32 * (9216 + 3072 + 16384 + 8192) * 3072 + head


def test_workspace_grows_with_what_it_holds():
    small = QWEN.workspace_bytes(1, 8, 1024)
    assert small == 4 * 4 * 151_936 + 8 * 896 * 4, "the head's logits and the residual stream"
    # Scores in float32, twice: 2 x 4 x 512 x 14 x 32768 bytes and 512 rows of three times F and twice D.
    block = 2 * 4 * 512 * 14 * 32768 + 512 * (3 * 4 * 4864 + 2 * 4 * 896)
    assert QWEN.workspace_bytes(1, 512, 32768) == block + 512 * 896 * 4
    assert QWEN.workspace_bytes(2, 512, 32768) == 2 * QWEN.workspace_bytes(1, 512, 32768)
    # A kernel's scores stay inside; keys and values of a layer, if they must be put together.
    held = 2 * 2 * 64 * 32768 * 4
    assert QWEN.workspace_bytes(1, 512, 32768, fused=True) == held + 512 * (3 * 4 * 4864 + 3 * 4 * 896)
