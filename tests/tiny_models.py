"""Tiny GGUF files with random weights, laid out as llama.cpp's converter lays out real ones.

Weights are made in the naming and layout of Hugging Face (HF) transformers, which computed the goldens
(`make_goldens.py`), and carried over to GGUF: other names, and for `llama` the rows of q and k permuted.
Layout and keys: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, TokenType, quants

TensorType = GGMLQuantizationType
TensorTypes = Mapping[str, TensorType] | Callable[[str, tuple[int, ...]], TensorType]


@dataclass(frozen=True)
class TinySpec:
    """The shapes and switches of a tiny model. `rope_scaling` is the dictionary of an HF config."""

    architecture: str
    seed: int
    vocab_size: int = 384
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    d_ff: int = 96
    context_length: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    sliding_window: int | None = None
    rope_scaling: Mapping[str, Any] | None = None
    tokenizer: str = "gpt2"
    pre: str = "default"

    @property
    def rope_type(self) -> str:
        return "default" if self.rope_scaling is None else self.rope_scaling["rope_type"]


# Of the 128k Phi-3 kind: one divisor for each pair of a head 16 wide.
_LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.05, 1.1, 1.15, 1.25, 1.4, 1.6, 2.0],
    "long_factor": [1.05, 1.2, 1.5, 2.2, 3.0, 3.6, 3.9, 4.0],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

SPECS: dict[str, TinySpec] = {
    "qwen2": TinySpec("qwen2", seed=1, n_kv_heads=1, rope_theta=1e6, eps=1e-6, tied=True, pre="qwen2"),
    "qwen2-untied": TinySpec("qwen2", seed=2, vocab_size=400, n_layers=3, rope_theta=1e6, eps=1e-6, pre="qwen2"),
    "phi3": TinySpec("phi3", seed=3, d_model=96, head_dim=24, d_ff=128, sliding_window=8, tokenizer="llama"),
    "phi3-longrope": TinySpec(
        "phi3", seed=4, n_kv_heads=4, sliding_window=1 << 18, rope_scaling=_LONGROPE, tokenizer="llama"
    ),
    "llama": TinySpec("llama", seed=5, n_layers=3, d_ff=128, pre="smollm"),
    "llama-tied-rope3": TinySpec("llama", seed=6, tied=True, rope_scaling=_LLAMA3, pre="llama-bpe"),
    "llama-linear": TinySpec("llama", seed=7, rope_scaling={"rope_type": "linear", "factor": 2.0}, tokenizer="llama"),
    # Width no multiple of 32, an odd number of key/value heads, heads wider together than the model.
    "llama-odd": TinySpec("llama", seed=8, d_model=48, n_heads=6, n_kv_heads=3, head_dim=12, tokenizer="llama"),
    # Wide enough for the K-quants, whose blocks are 256 long.
    "llama-wide": TinySpec("llama", seed=9, d_model=256, n_layers=1, head_dim=64, d_ff=256),
}


def random_weights(spec: TinySpec) -> dict[str, np.ndarray]:
    """Random float32 weights under their HF names, the same with every NumPy.

    Scaled so that attention scores and logits have a standard deviation near 2: attention is far from uniform.
    """
    uniform = np.random.Generator(np.random.PCG64(spec.seed)).random  # its stream is guaranteed, normal()'s is not

    def draw(*shape: int, std: float, mean: float = 0.0) -> np.ndarray:
        return (mean + (2 * uniform(shape) - 1) * (std * math.sqrt(3))).astype(np.float32)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return draw(rows, columns, std=gain / math.sqrt(columns))

    d, f, h = spec.d_model, spec.d_ff, spec.head_dim
    weights = {"model.embed_tokens.weight": draw(spec.vocab_size, d, std=2 / math.sqrt(d) if spec.tied else 1.0)}
    for i in range(spec.n_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        q, k = matrix(spec.n_heads * h, d, gain=1.4), matrix(spec.n_kv_heads * h, d, gain=1.4)
        v = matrix(spec.n_kv_heads * h, d)
        gate, up = matrix(f, d, gain=1.4), matrix(f, d)
        if spec.architecture == "phi3":
            weights[f"{attention}.qkv_proj.weight"] = np.concatenate([q, k, v])
            weights[f"{mlp}.gate_up_proj.weight"] = np.concatenate([gate, up])
        else:
            weights |= {f"{attention}.{x}_proj.weight": w for x, w in (("q", q), ("k", k), ("v", v))}
            weights |= {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up}
        if spec.architecture == "qwen2":
            weights |= {f"{attention}.{x}_proj.bias": draw(len(w), std=0.5) for x, w in (("q", q), ("k", k), ("v", v))}
        weights[f"{attention}.o_proj.weight"] = matrix(d, spec.n_heads * h)
        weights[f"{mlp}.down_proj.weight"] = matrix(d, f)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = draw(d, std=0.2, mean=1.0)
    weights["model.norm.weight"] = draw(d, std=0.2, mean=1.0)
    if not spec.tied:
        weights["lm_head.weight"] = matrix(spec.vocab_size, d, gain=2.0)
    return weights


def checksum(weights: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of the weights in order: tells goldens that are out of date from a model that is wrong."""
    crc = 0
    for weight in weights.values():
        crc = zlib.crc32(weight.tobytes(), crc)
    return crc


# From HF to GGUF

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    """The GGUF name of a tensor, from its HF one."""
    stem, kind = hf_name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_NAMES[stem]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def interleave(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder each head's rows from halves (0, 1, … | H/2, …) to rotated pairs side by side (0, H/2, 1, …)."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(spec: TinySpec, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file: `weights` under their GGUF names, q and k interleaved for `llama`, RoPE divisors."""
    tensors = {}
    if spec.rope_type == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(spec)
    elif spec.rope_type == "longrope":
        assert spec.rope_scaling is not None
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(spec.rope_scaling[f"{kind}_factor"], np.float32)
    for hf_name, weight in weights.items():
        if spec.architecture == "llama" and hf_name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleave(weight, spec.n_heads if "q_proj" in hf_name else spec.n_kv_heads)
        tensors[gguf_name(hf_name)] = weight
    return tensors


def llama3_divisors(spec: TinySpec) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by, float32 [H / 2].

    Wavelengths within the original context / high_freq_factor stay, those beyond it / low_freq_factor are stretched
    by `factor`; between them the frequency goes linearly, in wave counts, from the one to the other.
    """
    assert spec.rope_scaling is not None
    low, high = spec.rope_scaling["low_freq_factor"], spec.rope_scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * spec.rope_theta ** (np.arange(0, spec.head_dim, 2) / spec.head_dim)
    waves = spec.rope_scaling["original_max_position_embeddings"] / wavelengths
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / spec.rope_scaling["factor"])).astype(np.float32)


def model_metadata(spec: TinySpec) -> dict[str, Any]:
    """The keys that describe the model, as the converter writes them for each architecture."""
    arch = spec.architecture
    keys: dict[str, Any] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "rope.freq_base": spec.rope_theta,
        "attention.layer_norm_rms_epsilon": spec.eps,
    }
    if arch == "llama":
        keys |= {"vocab_size": spec.vocab_size, "rope.dimension_count": spec.head_dim}
        if spec.head_dim * spec.n_heads != spec.d_model:
            keys |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    elif arch == "phi3":
        original = (spec.rope_scaling or {}).get("original_max_position_embeddings", spec.context_length)
        keys |= {"rope.dimension_count": spec.head_dim, "rope.scaling.original_context_length": original}
        keys["attention.sliding_window"] = spec.sliding_window or 0  # 0: no window, as in Phi-4
        if spec.rope_type == "longrope":
            stretch = math.log(spec.context_length / original) / math.log(original)
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
    if spec.rope_type == "linear":
        assert spec.rope_scaling is not None
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": spec.rope_scaling["factor"]}
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": f"Tiny {arch}",
        **{f"{arch}.{key}": value for key, value in keys.items()},
        "general.file_type": 0,
        "general.quantization_version": 2,
    }


# Tokenisers: both kinds know the same merges, of which a real vocabulary has tens of thousands.

_MERGE_RULES = (
    "Ġ+t h+e Ġ+a i+n r+e o+n Ġt+he e+r a+t Ġ+s e+n i+s o+r Ġ+w o+u n+d l+l Ġ+o in+g Ġa+nd e+s i+t Ġ+b Ġ+c Ġo+f Ġ+p "
    "l+e Ġ+h Ġt+o o+w w+or l+d wor+ld l+o he+ll Ġ+Ġ ĠĠ+ĠĠ 1+2 12+3 hell+o Ġ+in Ġ+is y+ou Ġ+you Ġ+m a+n"
)
_MERGES = [tuple(rule.split("+")) for rule in _MERGE_RULES.split()]
_GPT2_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_PHI3_SPECIALS = [
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
]  # fmt: skip
_GPT2_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_PHI3_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

_Vocabulary = list[tuple[str, TokenType, float]]  # token, type, score


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE: itself where it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def _gpt2_vocabulary() -> _Vocabulary:
    ordinary = byte_symbols() + ["".join(merge) for merge in _MERGES]
    return [(t, TokenType.NORMAL, 0.0) for t in ordinary] + [(t, TokenType.CONTROL, 0.0) for t in _GPT2_SPECIALS]


def _llama_vocabulary() -> _Vocabulary:
    # Order, types and scores as in Phi-3's own file, where even the padding is of the type UNKNOWN.
    merged = ["".join(merge).replace("Ġ", "▁") for merge in _MERGES]
    pieces = merged + list("▁etaoinshrdlcumwfgypbvkjxqz0123456789,.")  # other characters fall back to bytes
    return [
        *((t, TokenType.CONTROL, -1000.0) for t in ("<unk>", "<s>")),
        ("</s>", TokenType.USER_DEFINED, -1000.0),
        *((f"<0x{byte:02X}>", TokenType.BYTE, 0.0) for byte in range(256)),
        *((t, TokenType.NORMAL, -1.0 - rank) for rank, t in enumerate(pieces)),
        *((t, TokenType.CONTROL, -1000.0) for t in _PHI3_SPECIALS),
    ]


def known_tokens(spec: TinySpec) -> int:
    """Number of tokens that the tokeniser knows; ids from there on are padding."""
    return len(_gpt2_vocabulary() if spec.tokenizer == "gpt2" else _llama_vocabulary())


def tokenizer_metadata(spec: TinySpec) -> dict[str, Any]:
    """The keys of a byte-level BPE (`gpt2`) or SentencePiece (`llama`) tokeniser, padded to `vocab_size`."""
    is_gpt2 = spec.tokenizer == "gpt2"
    vocabulary = _gpt2_vocabulary() if is_gpt2 else _llama_vocabulary()
    padding = (TokenType.UNUSED, 0.0) if is_gpt2 else (TokenType.UNKNOWN, -10000.0)
    vocabulary += [(f"[PAD{i}]", *padding) for i in range(len(vocabulary), spec.vocab_size)]
    ids = {token: i for i, (token, _, _) in enumerate(vocabulary)}
    keys: dict[str, Any] = {
        "model": spec.tokenizer,
        "pre": spec.pre,
        "tokens": list(ids),
        "token_type": [int(token_type) for _, token_type, _ in vocabulary],
        "padding_token_id": ids["<|endoftext|>"],
        "add_bos_token": not is_gpt2,
    }
    if is_gpt2:
        keys |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
        keys["merges"] = [" ".join(merge) for merge in _MERGES]
    else:
        keys |= {"bos_token_id": ids["<s>"], "eos_token_id": ids["<|endoftext|>"], "unknown_token_id": ids["<unk>"]}
        keys |= {"scores": [score for _, _, score in vocabulary], "add_eos_token": False}
    return {
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
        "tokenizer.chat_template": _GPT2_TEMPLATE if is_gpt2 else _PHI3_TEMPLATE,
    }


# Files


def write_gguf(
    path: Path,
    spec: TinySpec,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    tensor_types: TensorTypes | None = None,
    metadata_overrides: Mapping[str, Any] | None = None,
    drop_keys: Collection[str] = (),
    drop_tensors: Collection[str] = (),
    parts: int = 1,
) -> Path:
    """Write a model to `path`; returns the path of the file, or of the first part (`NAME-00001-of-0000N.gguf`).

    Args:
      weights: HF names to float32 arrays; None: `random_weights(spec)`.
      tensor_types: the GGML type of each matrix: either patterns of GGUF names, of which the first that matches
        counts, or a function of name and shape. F32 where none matches, and vectors always. The K-quants, which
        the `gguf` package cannot make, hold `random_blocks` in place of the weights: read them with `read_gguf`.
      metadata_overrides: keys to set; the type in the file follows the Python type (int: uint32).
      drop_keys: keys to leave out.
      drop_tensors: GGUF names of tensors to leave out.
      parts: number of files.
    """
    metadata = model_metadata(spec) | tokenizer_metadata(spec) | dict(metadata_overrides or {})
    tensors = gguf_tensors(spec, random_weights(spec) if weights is None else weights)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop_tensors}

    writer = GGUFWriter(None, spec.architecture, split_max_tensors=0 if parts == 1 else -(-len(tensors) // parts))
    writer.kv_data[0].clear()  # the architecture is in `metadata`, where it can be overridden or dropped
    for key, value in metadata.items():
        if key not in drop_keys:
            is_count = isinstance(value, int) and not isinstance(value, bool)
            writer.add_key_value(key, value, GGUFValueType.UINT32 if is_count else GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        tensor_type = _tensor_type(name, tensor.shape, tensor_types)
        writer.add_tensor(name, _encode(name, tensor, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.format_shard_names(path)[0]


def read_gguf(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, dequantised to float32 by the `gguf` package."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def _tensor_type(name: str, shape: tuple[int, ...], types: TensorTypes | None) -> TensorType:
    if types is None or len(shape) == 1:
        return TensorType.F32
    if isinstance(types, Mapping):
        return next((t for pattern, t in types.items() if fnmatchcase(name, pattern)), TensorType.F32)
    return types(name, shape)


def _encode(name: str, tensor: np.ndarray, tensor_type: TensorType) -> np.ndarray:
    if tensor_type in _K_QUANTS:
        return random_blocks(tensor_type, tensor.shape, seed=zlib.crc32(name.encode()))
    return quants.quantize(tensor, tensor_type)


# Bytes of a block of 256, where its float16 scales lie, and, for random bytes in all other fields: the ratio of the
# two scales that makes the mean zero, and the standard deviation that a scale of 1 then gives.
_K_QUANTS: dict[TensorType, tuple[int, int, int | None, float, float]] = {
    TensorType.Q2_K: (84, 80, 82, 1.5, 14.0),
    TensorType.Q3_K: (110, 108, None, 0.0, 43.4),
    TensorType.Q4_K: (144, 0, 2, 7.5, 252.0),
    TensorType.Q5_K: (176, 0, 2, 15.5, 520.0),
    TensorType.Q6_K: (210, 208, None, 0.0, 1366.0),
}


def random_blocks(tensor_type: TensorType, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Valid random K-quant blocks for a matrix of `shape` [rows, columns]: uint8 [rows, bytes a row].

    All fields but the scales are random bytes; the scales make the weights' standard deviation near
    1 / sqrt(columns), and differ from block to block.
    """
    byte_shape = quants.quant_shape_to_byte_shape(shape, tensor_type)
    size, scale_at, minimum_at, ratio, std = _K_QUANTS[tensor_type]
    random = np.random.Generator(np.random.PCG64(seed)).random
    blocks = (256 * random((math.prod(byte_shape) // size, size))).astype(np.uint8)
    scale = (0.5 + random((len(blocks), 1))) / (std * math.sqrt(shape[-1]))
    blocks[:, scale_at : scale_at + 2] = scale.astype("<f2").view(np.uint8)
    if minimum_at is not None:
        blocks[:, minimum_at : minimum_at + 2] = (ratio * scale).astype("<f2").view(np.uint8)
    return blocks.reshape(byte_shape)
