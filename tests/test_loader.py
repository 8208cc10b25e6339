"""The loader: every type and layout of tensor, against the `gguf` package and the weights that files were made of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from gguf.quants import dequantize as dequantize_blocks
from tiny_models import SPECS, TensorType, TinySpec, gguf_name, random_weights, read_gguf, write_gguf

from orcd_jax.config import ModelConfig
from orcd_jax.errors import GGUFError
from orcd_jax.gguf_reader import GGUFFile, TensorInfo
from orcd_jax.loader import TENSOR_TYPES, Params, check_tensors, load_params, random_params
from orcd_jax.quantize import BLOCK, QuantizedArray, split_q8_0

CPU = jax.devices("cpu")[0]
FORMATS = ("int8", "bf16", "f32")
K_QUANTS = [t for t in TENSOR_TYPES if t.name.endswith("_K")]
OTHERS = [t for t in TENSOR_TYPES if t not in K_QUANTS]


def load(source: Path | GGUFFile, weights: Any = "f32") -> Params:
    file = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
    return load_params(file, ModelConfig.from_gguf(file), weights, CPU)


def leaves(params: Params) -> dict[str, Any]:
    """Parameters by path; a QuantizedArray is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama's order, where the two rows of a rotated pair are neighbours: first halves first."""
    width = len(rows) // heads
    source = []
    for head in range(heads):
        source += [head * width + 2 * i for i in range(width // 2)]
        source += [head * width + 2 * i + 1 for i in range(width // 2)]
    return rows[source]


def expected_leaves(spec: TinySpec, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `leaves` should give, from the tensors of a file under their GGUF names."""
    expected = {"embedding": tensors["token_embd.weight"], "norm": tensors["output_norm.weight"]}
    if not spec.tied:
        expected["head"] = tensors["output.weight"]
    for layer in range(spec.n_layers):
        attention, swiglu, block = f"layer_{layer}/attention", f"layer_{layer}/swiglu", f"blk.{layer}"
        for kind, target in (("weight", "qkv"), ("bias", "qkv_bias")):
            if f"{block}.attn_qkv.{kind}" in tensors:
                expected[f"{attention}/{target}"] = tensors[f"{block}.attn_qkv.{kind}"]
            elif f"{block}.attn_q.{kind}" in tensors:
                q, k, v = (tensors[f"{block}.attn_{x}.{kind}"] for x in "qkv")
                if spec.architecture == "llama":
                    q, k = halves(q, spec.n_heads), halves(k, spec.n_kv_heads)
                expected[f"{attention}/{target}"] = np.concatenate([q, k, v])
        gate = [] if spec.architecture == "phi3" else [tensors[f"{block}.ffn_gate.weight"]]
        expected[f"{swiglu}/gate_up"] = np.concatenate([*gate, tensors[f"{block}.ffn_up.weight"]])
        expected[f"{attention}/out"] = tensors[f"{block}.attn_output.weight"]
        expected[f"{attention}/norm"] = tensors[f"{block}.attn_norm.weight"]
        expected[f"{swiglu}/norm"] = tensors[f"{block}.ffn_norm.weight"]
        expected[f"{swiglu}/down"] = tensors[f"{block}.ffn_down.weight"]
    return expected


def check_blocks(found: QuantizedArray, expected: np.ndarray, name: str) -> None:
    """int8 is off by at most half a step, and the largest value of each block by less."""
    scales = np.repeat(np.asarray(found.scales, np.float64), BLOCK, axis=-1)
    error = np.abs(np.asarray(found.values) * scales - expected)
    assert (error <= scales * (0.5 + 2**-16)).all(), name
    largest = np.abs(expected.reshape(*found.scales.shape, BLOCK)).max(axis=-1)
    np.testing.assert_allclose(np.asarray(found.scales, np.float64), largest / 127, rtol=2**-11, atol=2**-24)


def check(path: Path, spec: TinySpec, tensors: dict[str, np.ndarray]) -> None:
    """All three formats of all parameters are what the tensors ask for."""
    expected = expected_leaves(spec, tensors)
    for weights in FORMATS:
        found = leaves(load(path, weights))
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            if isinstance(leaf, QuantizedArray):
                assert weights == "int8" and expected[name].ndim == 2 and expected[name].shape[1] % BLOCK == 0
                assert leaf.values.dtype == np.int8 and leaf.scales.dtype == np.float16
                check_blocks(leaf, expected[name], name)
                continue
            exact = expected[name].ndim == 1 or weights == "f32"
            dtype = np.dtype(np.float32 if exact else ml_dtypes.bfloat16)
            assert weights != "int8" or expected[name].ndim == 1 or expected[name].shape[1] % BLOCK, name
            assert leaf.dtype == dtype and leaf.devices() == {CPU}
            np.testing.assert_array_equal(np.asarray(leaf), expected[name].astype(dtype), err_msg=name)


# Types


@pytest.mark.parametrize("kind", TENSOR_TYPES, ids=lambda t: t.name)
def test_every_type_is_dequantised_exactly(tiny, kind):
    path = tiny("llama-wide", tensor_types={"*": kind})
    types = {info.type for info in GGUFFile.open(path).tensors.values() if len(info.shape) == 2}
    assert types == {kind}, "the file holds what it was asked for"
    check(path, SPECS["llama-wide"], read_gguf(path))


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_the_weights_the_file_was_made_of(tiny, name):
    """Nothing of the way to GGUF and back is left: names, joined matrices, permuted rows."""
    weights = random_weights(SPECS[name])
    # In the layout of HF, where no row is permuted, and so the architecture of the file does not matter.
    tensors = {gguf_name(hf_name): weight for hf_name, weight in weights.items()}
    expected = expected_leaves(
        replace(SPECS[name], architecture="phi3" if name.startswith("phi3") else "qwen2"), tensors
    )
    found = leaves(load(tiny(name)))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path], err_msg=path)


@pytest.mark.parametrize("name", SPECS)
def test_every_architecture_in_every_format(tiny, name):
    kind = TensorType.Q5_0 if SPECS[name].d_model % BLOCK == 0 else TensorType.F16
    path = tiny(name, tensor_types={"*": kind})
    check(path, SPECS[name], read_gguf(path))


def with_random_q8_0(file: GGUFFile) -> GGUFFile:
    """The file with matrices that no quantiser would make: other largest values than 127, -128, negative scales."""
    tensors = dict(file.tensors)
    for name, info in tensors.items():
        if len(info.shape) == 2:
            rows, blocks = info.shape[0], info.shape[1] // BLOCK
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            scales = rng.uniform(-0.01, 0.01, (rows, blocks, 1)).astype(np.float16)
            values = rng.integers(-128, 100, (rows, blocks, BLOCK), np.int8)
            data = np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=-1).reshape(rows, -1)
            tensors[name] = replace(info, type=TensorType.Q8_0, data=data)
    return replace(file, tensors=tensors)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
def test_q8_0_is_kept_bit_for_bit(tiny, name):
    file = with_random_q8_0(GGUFFile.open(tiny(name)))
    found = leaves(load(file, "int8"))
    raw = {name: info.data if len(info.shape) == 2 else info.data.ravel() for name, info in file.tensors.items()}
    expected = expected_leaves(SPECS[name], raw)
    for path, leaf in found.items():
        if not isinstance(leaf, QuantizedArray):
            continue
        rows = len(expected[path])
        scales = np.asarray(leaf.scales).view(np.uint8).reshape(rows, -1, 2)
        values = np.asarray(leaf.values).view(np.uint8).reshape(rows, -1, BLOCK)
        again = np.concatenate([scales, values], axis=-1).reshape(rows, -1)
        np.testing.assert_array_equal(again, expected[path], err_msg=path)
    kept = {path for path, leaf in found.items() if isinstance(leaf, QuantizedArray)}
    assert {path.rpartition("/")[2] for path in kept} - {"head"} == {"embedding", "qkv", "out", "gate_up", "down"}


def test_types_may_be_mixed_in_one_joined_matrix(tiny):
    """Q8_0 rows keep their bits beside rows of other types."""
    kinds = {"*attn_q.*": TensorType.Q8_0, "*attn_k.*": TensorType.F16, "*attn_v.*": TensorType.Q4_1}
    path, spec = tiny("llama", tensor_types=kinds), SPECS["llama"]
    check(path, spec, read_gguf(path))
    mixed = GGUFFile.open(path)
    name = "blk.1.attn_v.weight"
    raw = with_random_q8_0(mixed).tensors[name]
    v = load(with_tensor(mixed, raw), "int8")["layer_1"]["attention"]["qkv"]
    first = (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    np.testing.assert_array_equal(np.asarray(v.values)[first:], split_q8_0(raw.data).values)
    np.testing.assert_array_equal(np.asarray(v.scales)[first:], split_q8_0(raw.data).scales)


def test_a_mix_like_q4_k_m(tiny):
    kinds = {"*ffn_down*": TensorType.Q6_K, "*attn_v*": TensorType.Q6_K, "token_embd*": TensorType.Q8_0}
    path = tiny("llama-wide", tensor_types={**kinds, "*": TensorType.Q4_K})
    check(path, SPECS["llama-wide"], read_gguf(path))


@pytest.mark.parametrize("kind", [TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0])
def test_vectors_may_be_of_any_type(tiny, kind):
    file = GGUFFile.open(tiny("qwen2"))
    name = "blk.1.attn_norm.weight"
    values = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    raw = quants.quantize(values, kind)
    found = load(with_tensor(file, TensorInfo(name, (64,), kind, raw.view(np.uint8).reshape(1, -1))), "int8")
    norm = found["layer_1"]["attention"]["norm"]
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(norm), dequantize_blocks(raw, kind))


def test_large_tensors_are_read_in_chunks(tiny, monkeypatch):
    """Chunks much smaller than a tensor, which end anywhere in a head, change nothing."""
    path = tiny("llama", tensor_types={"*attn*": TensorType.Q5_1, "*": TensorType.Q8_0})
    whole = {weights: load(path, weights) for weights in FORMATS}
    monkeypatch.setattr("orcd_jax.loader._CHUNK_WEIGHTS", 7 * 64)
    for weights, expected in whole.items():
        jax.tree.map(np.testing.assert_array_equal, load(path, weights), expected)


# Layouts


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_split_file_loads_as_the_whole(tiny, parts):
    whole = load(tiny("llama", tensor_types={"*": TensorType.Q8_0}), "int8")
    first = tiny("llama", tensor_types={"*": TensorType.Q8_0}, parts=parts)
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == [f"llama-{n:05}-of-{parts:05}.gguf" for n in range(1, parts + 1)]
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, load(first.parent / name, "int8"), whole)


def test_a_tied_head_is_held_once_and_a_separate_one_beside(tiny):
    assert "head" not in load(tiny("qwen2"))
    untied = load(tiny("qwen2-untied"))
    assert untied["head"].shape == untied["embedding"].shape and not (untied["head"] == untied["embedding"]).all()


def test_a_head_left_out_means_a_tied_one(tiny):
    params = load(tiny("qwen2-untied", drop_tensors={"output.weight"}))
    assert "head" not in params


# Refusals


def with_tensor(file: GGUFFile, info: TensorInfo) -> GGUFFile:
    return replace(file, tensors={**file.tensors, info.name: info})


def refused(file: GGUFFile, weights: Any, *parts: str) -> None:
    with pytest.raises(GGUFError) as caught:
        load(file, weights)
    message = str(caught.value)
    assert message.startswith(f"{file.path}: ") and message.isprintable() and len(message) < len(str(file.path)) + 300
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["qwen2-untied", "phi3", "llama"])
def test_a_missing_tensor_is_named(tiny, name):
    file = GGUFFile.open(tiny(name))
    needed = file.tensors.keys() - {"output.weight", "token_embd.weight"}
    assert len(needed) > 10
    for missing in needed:
        rest = {tensor: info for tensor, info in file.tensors.items() if tensor != missing}
        shape = list(file.tensors[missing].shape)
        refused(replace(file, tensors=rest), "f32", f"tensor {missing!r} is missing; expected the shape {shape}")


def test_an_ill_shaped_tensor_is_named(tiny):
    file = GGUFFile.open(tiny("llama"))
    for info in file.tensors.values():
        if info.name == "token_embd.weight":
            continue
        for shape in ((*info.shape[:-1], info.shape[-1] + 32), info.shape[::-1], (1, *info.shape), (info.size,)):
            if shape == info.shape:
                continue
            data = np.zeros((math.prod(shape[:-1]), 4 * shape[-1]), np.uint8)
            refused(
                with_tensor(file, TensorInfo(info.name, shape, info.type, data)),
                "f32",
                f"tensor {info.name!r} has the shape {list(shape)}; expected {list(info.shape)}",
            )


def test_a_tensor_without_a_place_is_named(tiny):
    file = GGUFFile.open(tiny("llama"))
    for name in ("blk.3.attn_q.weight", "blk.0.attn_q.bias.2", "blk.00.attn_q.weight", "rope.weight", "x" * 100):
        extra = TensorInfo(name, (1,), TensorType.F32, np.zeros((1, 4), np.uint8))
        refused(with_tensor(file, extra), "f32", f"tensor {name!r} has no place in a llama model of 3 layers", "1 such")


def test_an_output_bias_is_not_ignored(tiny):
    """A file whose model has more than this project computes must not run as if it had not."""
    file = GGUFFile.open(tiny("qwen2"))
    for name in ("blk.0.attn_output.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_up.bias", "output.bias"):
        refused(with_tensor(file, TensorInfo(name, (64,), TensorType.F32, np.zeros((1, 256), np.uint8))), "f32", name)


def test_a_bias_of_only_some_is_refused(tiny):
    file = GGUFFile.open(tiny("qwen2", drop_tensors={"blk.0.attn_k.bias"}))
    refused(file, "f32", "tensor 'blk.0.attn_k.bias' is missing")


@pytest.mark.parametrize("kind", [TensorType.IQ4_NL, TensorType.TQ1_0, TensorType.Q8_K, TensorType.F64, TensorType.I8])
def test_a_type_that_is_not_supported_is_named(tiny, kind):
    file = GGUFFile.open(tiny("llama-wide"))
    data = np.zeros(quants.quant_shape_to_byte_shape((256, 256), kind), np.uint8)
    info = TensorInfo("blk.0.ffn_up.weight", (256, 256), kind, data)
    refused(
        with_tensor(file, info), "f32", "'blk.0.ffn_up.weight'", f"type {kind.name}", "supported are F32, F16, BF16"
    )


# Where the bytes of a scale lie in a block.
_SCALES = {
    TensorType.Q2_K: (80, 82), TensorType.Q3_K: (108,), TensorType.Q4_K: (0, 2), TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,), TensorType.Q4_0: (0,), TensorType.Q4_1: (0, 2), TensorType.Q5_0: (0,),
    TensorType.Q5_1: (0, 2), TensorType.Q8_0: (0,), TensorType.F16: (0,),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSOR_TYPES, ids=lambda t: t.name)
def test_scales_and_weights_that_are_not_finite_are_refused(tiny, kind):
    file = GGUFFile.open(tiny("llama-wide", tensor_types={"*": kind}))
    # A tensor whose rows are permuted, one whose are not, and the embedding; the last row of each.
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"):
        info = file.tensors[name]
        for value in (np.nan, np.inf, -np.inf):
            if kind in _SCALES:
                bits, places = np.float16(value), _SCALES[kind]
            else:
                bits, places = (np.float32(value) if kind == TensorType.F32 else ml_dtypes.bfloat16(value)), (0,)
            for place in places:
                data = info.data.copy()
                raw = np.frombuffer(np.asarray(bits).tobytes(), np.uint8)
                data[-1, place : place + len(raw)] = raw
                damaged = with_tensor(file, replace(info, data=data))
                for weights in FORMATS:
                    refused(damaged, weights, f"tensor {name!r}", "not finite")


@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.0.attn_q.bias", "output_norm.weight"])
def test_vectors_that_are_not_finite_are_refused(tiny, name):
    file = GGUFFile.open(tiny("qwen2"))
    info = file.tensors[name]
    data = info.data.copy()
    data.view(np.float32)[0, 3] = np.inf
    for weights in FORMATS:
        refused(with_tensor(file, replace(info, data=data)), weights, f"tensor {name!r} has values that are not finite")


def test_weights_too_large_for_int8_are_refused_as_int8_only(tiny):
    file = GGUFFile.open(tiny("llama"))
    info = file.tensors["blk.0.ffn_up.weight"]
    data = info.data.copy()
    data.view(np.float32)[5, 5] = 1e7
    damaged = with_tensor(file, replace(info, data=data))
    refused(damaged, "int8", "tensor 'blk.0.ffn_up.weight' cannot be made int8", "too large")
    assert load(damaged, "f32")["layer_0"]["swiglu"]["gate_up"].max() == np.float32(1e7)


def test_tensors_are_checked_before_any_is_read(tiny):
    """The first tensor's values are bad, the last tensor is missing: it is the missing one that is reported."""
    file = GGUFFile.open(tiny("llama", drop_tensors={"output_norm.weight"}))
    info = file.tensors["token_embd.weight"]
    file = with_tensor(file, replace(info, data=np.full_like(info.data, 255)))
    refused(file, "f32", "tensor 'output_norm.weight' is missing")
    with pytest.raises(GGUFError, match=r"'output_norm\.weight' is missing"):
        check_tensors(file, ModelConfig.from_gguf(file))


# Shapes and memory


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", SPECS)
def test_random_parameters_are_like_loaded_ones(tiny, name, weights):
    """The same tree, shapes and dtypes, and the bytes that the config foretells."""
    file = GGUFFile.open(tiny(name))
    config = ModelConfig.from_gguf(file)
    loaded = load_params(file, config, weights, CPU)
    random = jax.eval_shape(lambda: random_params(config, weights, CPU))
    assert jax.tree.structure(random) == jax.tree.structure(loaded)
    for a, b in zip(jax.tree.leaves(random), jax.tree.leaves(loaded), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert sum(x.nbytes for x in jax.tree.leaves(loaded)) == config.weight_bytes(weights)
    assert (
        sum(math.prod(p.shape) for p in leaves(load_params(file, config, "f32", CPU)).values()) == config.param_count()
    )


@pytest.mark.parametrize("weights", FORMATS)
def test_random_parameters_have_a_trained_models_scale(tiny, weights):
    config = ModelConfig.from_gguf(GGUFFile.open(tiny("qwen2-untied")))
    for name, leaf in leaves(random_params(config, weights, CPU)).items():
        if isinstance(leaf, QuantizedArray):
            values = np.asarray(leaf.values) * np.repeat(np.asarray(leaf.scales, np.float32), BLOCK, axis=-1)
        else:
            values = np.asarray(leaf, np.float32)
        if values.ndim == 1:
            assert (values == (0 if name.endswith("bias") else 1)).all()
            continue
        # The standard deviation of n uniform values is off by 0.45 / sqrt(n), one part in 200 here; five of those.
        assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=5 * 0.45 / math.sqrt(values.size) + 0.01)
        assert abs(values.mean()) < 5 * values.std() / math.sqrt(values.size)


def test_random_parameters_follow_from_the_seed(tiny):
    config = replace(ModelConfig.from_gguf(GGUFFile.open(tiny("qwen2"))), n_layers=1)
    first, again, other = (random_params(config, "f32", CPU, seed)["embedding"] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


_MEASURE = """
import json, sys
sys.path[:] = {path!r}
import jax
from orcd_jax.config import ModelConfig
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import load_params

def status(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

def load(name, weights):
    file = GGUFFile.open(name)
    config = ModelConfig.from_gguf(file)
    return config, load_params(file, config, weights, jax.devices("cpu")[0])

load({tiny!r}, {weights!r})
open("/proc/self/clear_refs", "w").write("5")  # the peak begins again
before = status("VmRSS")
config, params = load({big!r}, {weights!r})
print(json.dumps([status("VmHWM") - before, config.weight_bytes({weights!r})]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """26 million weights in Q4_0, 15 MB, of which the largest tensor has 2 million."""
    shapes = {"d_model": 512, "d_ff": 1536, "n_heads": 8, "head_dim": 64, "vocab_size": 4096, "n_layers": 8}
    spec = replace(SPECS["llama"], tied=True, **shapes)
    return write_gguf(tmp_path_factory.mktemp("large") / "large.gguf", spec, tensor_types={"*": TensorType.Q4_0})


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc as Linux has it")
@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_the_host_holds_little_more_than_one_tensor(tiny, large, weights, figure):
    """Peak memory: the parameters, the mapped file, and of what comes and goes about one tensor."""
    script = _MEASURE.format(path=sys.path, tiny=str(tiny("llama")), big=str(large), weights=weights)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, parameters = json.loads(run.stdout)
    extra = peak - parameters - large.stat().st_size
    largest = 4 * 4096 * 512  # the embedding in float32
    figure(f"loading {parameters / 2**20:.0f} MiB of {weights} parameters: {extra / 2**20:.1f} MiB beside them at most")
    # Twice: as it is made and as it goes to the device; and 8 MiB for threads' chunks and the allocator.
    assert extra < 2 * largest + (8 << 20)
    assert parameters > 3 * largest, "else one tensor would be no less than all"


def test_progress_is_shown_when_it_is_asked_for(tiny, capsys):
    file = GGUFFile.open(tiny("llama"))
    load_params(file, ModelConfig.from_gguf(file), "f32", CPU)
    assert capsys.readouterr().err == ""
    load_params(file, ModelConfig.from_gguf(file), "f32", CPU, progress=True)
    assert "loading" in capsys.readouterr().err
