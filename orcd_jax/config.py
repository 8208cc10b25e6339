"""ModelConfig: everything static about a model, from GGUF metadata or a preset, and the byte and FLOP formulas.

Dimensions: B batch, T queries a row, S cache length, D model width, F feed-forward width, N query heads,
K key/value heads, G = N / K, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from orcd_jax.cache_policy import CachePolicy
from orcd_jax.errors import GGUFError, RequestError
from orcd_jax.gguf_reader import GGUFFile, brief
from orcd_jax.quantize import BLOCK

ARCHITECTURES = ("llama", "phi3", "qwen2")

WeightFormat = Literal["int8", "bf16", "f32"]

# Above any model of these families. They bound what a small file can make the loader and the compiler do: a thread's
# chunk of a tensor is at least one row, and every layer is compiled on its own.
_MAX_WIDTH = 1 << 18
_MAX_HEADS = _MAX_HEAD_DIM = 1 << 10
_MAX_LAYERS = 1 << 8
_MAX_CONTEXT = 1 << 24

# Microsoft's own Phi-3-mini-4k GGUF lacks the key; the model was trained with this window
# (huggingface.co/microsoft/Phi-3-mini-4k-instruct, config.json).
_PHI3_4K_WINDOW = 2047


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shapes and switches. Hashable: it is a static argument of every compiled program."""

    name: str
    architecture: str
    vocab_size: int  # V, rows of the embedding; ids from known_tokens on are padding and never sampled
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K
    head_dim: int  # H
    d_ff: int  # F
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int | None = None  # R, the rotated part of a head; None: all of it
    rope_divisors: tuple[float, ...] | None = None  # [R / 2], each frequency is divided by its own
    rope_magnitude: float = 1.0  # factor on cos and sin
    qkv_bias: bool = False
    tied_head: bool = False
    sliding_window: int | None = None
    known_tokens: int | None = None  # None: all V
    stop_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of activations and cache
    cache: CachePolicy = CachePolicy()  # noqa: RUF009 (frozen)

    @property
    def activation_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def query_group(self) -> int:
        """G, query heads for each key/value head."""
        return self.n_heads // self.n_kv_heads

    def rope_frequencies(self) -> np.ndarray:
        """Radians a position for each rotated pair, float32 [R / 2]: theta^(-2 i / R), divided by the divisors.

        Su et al. 2021, https://arxiv.org/abs/2104.09864; the divisors carry linear, Llama 3 and longrope scaling.
        """
        rotary = self.rotary_dim or self.head_dim
        frequencies = self.rope_theta ** (-np.arange(0, rotary, 2, dtype=np.float64) / rotary)
        if self.rope_divisors is not None:
            frequencies = frequencies / np.asarray(self.rope_divisors, np.float64)
        return frequencies.astype(np.float32)

    # Parameters

    def layer_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of one decoder block's parameters, by module and name."""
        d, f, h = self.d_model, self.d_ff, self.head_dim
        qkv = (self.n_heads + 2 * self.n_kv_heads) * h
        attention = {"norm": (d,), "qkv": (qkv, d), "out": (d, self.n_heads * h)}
        if self.qkv_bias:
            attention["qkv_bias"] = (qkv,)
        return {"attention": attention, "swiglu": {"norm": (d,), "gate_up": (2 * f, d), "down": (d, f)}}

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters outside the blocks."""
        shapes = {"embedding": (self.vocab_size, self.d_model), "norm": (self.d_model,)}
        return shapes if self.tied_head else {**shapes, "head": (self.vocab_size, self.d_model)}

    def param_count(self) -> int:
        """Number of weights, padding included."""
        layer = sum(math.prod(s) for module in self.layer_shapes().values() for s in module.values())
        return self.n_layers * layer + sum(math.prod(s) for s in self.outer_shapes().values())

    # Bytes and operations

    def weight_bytes(self, weights: WeightFormat) -> int:
        """Bytes of all parameters as stored on the device."""
        layer = sum(array_bytes(s, weights) for module in self.layer_shapes().values() for s in module.values())
        return self.n_layers * layer + sum(array_bytes(s, weights) for s in self.outer_shapes().values())

    def step_bytes(self, weights: WeightFormat, batch: int = 1, length: int = 0) -> int:
        """Bytes that one decode step must read: every weight but the embedding's unused rows, and the cache."""
        total = self.weight_bytes(weights) + self.cache_bytes(batch, length)
        if not self.tied_head:
            total -= array_bytes((self.vocab_size, self.d_model), weights)
        return total

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of a cache for `length` tokens a row by `cache`'s policy. Every layer has one of its own.

        Of a full cache: 2 L K H a token and row, of the activation dtype.
        """
        row = self.cache.row_bytes(self.head_dim, self.activation_dtype.itemsize, self.sliding_window, length)
        return batch * self.n_layers * self.n_kv_heads * row

    def workspace_bytes(self, batch: int, chunk: int, length: int, fused: bool = False) -> int:
        """Estimated bytes of temporaries when `chunk` tokens a row run against a cache of `length`.

        The larger of a block's activations and the head (logits in float32, sorted for sampling), beside the residual
        stream. Of attention: its scores in float32, twice, as plain XLA writes them; where it is `fused`, a kernel that
        keeps them to itself, no more than the keys and values that it reads, if they must be put together first.
        """
        item = self.activation_dtype.itemsize
        tokens = batch * chunk
        scores = 2 * 4 * tokens * self.n_heads * length
        attention = self.cache_bytes(batch, length) // self.n_layers if fused else scores
        block = attention + tokens * (3 * 4 * self.d_ff + 2 * item * self.d_model)
        head = 4 * 4 * batch * self.vocab_size
        return max(block, head) + tokens * self.d_model * item

    def token_flops(self, length: int = 0) -> int:
        """Floating-point operations of one token through every matrix and `length` cached positions."""
        matrices = sum(math.prod(s) for m in self.layer_shapes().values() for s in m.values() if len(s) == 2)
        attention = 2 * self.n_heads * self.head_dim * length
        return 2 * (self.n_layers * (matrices + attention) + self.vocab_size * self.d_model)

    # Where a config comes from

    @classmethod
    def from_preset(cls, name: str) -> ModelConfig:
        """Read `configs/NAME.toml`; the beginning of a name will do where only one begins so.

        Raises:
          RequestError: for an unknown name; it lists the known ones.
        """
        entries = [file for file in resources.files("configs").iterdir() if file.name.endswith(".toml")]
        files = {file.name.removesuffix(".toml"): file for file in entries}
        found = [known for known in files if known == name] or [known for known in files if known.startswith(name)]
        if len(found) != 1:
            raise RequestError(f"no preset {name!r}; there are {', '.join(sorted(files))}")
        return cls(**tomllib.loads(files[found[0]].read_text(encoding="utf-8")))

    @classmethod
    def from_gguf(cls, file: GGUFFile, context: int | None = None) -> ModelConfig:
        """Read a config from a file's metadata and tensor shapes.

        Args:
          file: the opened file, with its tensors.
          context: the context to be used, which decides between longrope's short and long factors; None: the model's.

        Raises:
          GGUFError: if the architecture is not supported, or a key is missing, of the wrong type, out of range, or
            contradicts a tensor's shape.
        """
        return _from_gguf(file, context)


def array_bytes(shape: tuple[int, ...], weights: WeightFormat) -> int:
    """Bytes of a parameter as stored: vectors in float32, matrices in the given format (see `loader`)."""
    if len(shape) == 1 or weights == "f32":
        return 4 * math.prod(shape)
    if weights == "bf16" or shape[-1] % BLOCK:
        return 2 * math.prod(shape)
    return math.prod(shape) + 2 * math.prod(shape) // BLOCK


class _Metadata:
    """Typed, range-checked access to a file's keys under its architecture's prefix."""

    def __init__(self, file: GGUFFile, prefix: str):
        self.file, self.prefix = file, prefix

    def __contains__(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata

    def fail(self, key: str, found: object, expected: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: {self.prefix}.{key} is {brief(found)}; expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise GGUFError(f"{self.file.path}: the key {self.prefix}.{key} is missing")
        return value

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _MAX_WIDTH) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value, f"an integer from {low} to {high}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number whose square, and whose product with a position, float32 can hold."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-12 <= value <= 1e12:
            raise self.fail(key, value, "a number from 1e-12 to 1e12")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, value, "a text")
        return value


def _from_gguf(file: GGUFFile, context: int | None) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise GGUFError(
            f"{file.path}: general.architecture is {brief(architecture)}; supported are {', '.join(ARCHITECTURES)}"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        what = "only a vocabulary, no weights" if not file.tensors else "no tensor 'token_embd.weight'"
        raise GGUFError(f"{file.path}: holds {what}")

    meta = _Metadata(file, architecture)
    if meta.integer("expert_count", default=0, low=0):
        raise GGUFError(f"{file.path}: is a mixture of experts, which is not supported")
    d_model = meta.integer("embedding_length")
    n_heads = meta.integer("attention.head_count", high=_MAX_HEADS)
    n_kv_heads = meta.integer("attention.head_count_kv", default=n_heads, high=_MAX_HEADS)
    if n_heads % n_kv_heads:
        raise meta.fail("attention.head_count_kv", n_kv_heads, f"a divisor of the {n_heads} heads")
    head_dim = meta.integer("attention.key_length", default=max(d_model // n_heads, 1), high=_MAX_HEAD_DIM)
    value_dim = meta.integer("attention.value_length", default=head_dim)
    if value_dim != head_dim:
        raise meta.fail("attention.value_length", value_dim, f"the key length {head_dim}")
    rotary_dim = meta.integer("rope.dimension_count", default=head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim or (architecture == "llama" and rotary_dim != head_dim):
        most = "" if architecture == "llama" else "at most "
        raise meta.fail("rope.dimension_count", rotary_dim, f"an even number, {most}the head width {head_dim}")
    if len(embedding.shape) != 2 or embedding.shape[1] != d_model:
        raise GGUFError(
            f"{file.path}: 'token_embd.weight' has the shape {list(embedding.shape)}; expected [vocabulary, {d_model}]"
        )
    vocab_size = embedding.shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise GGUFError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries; expected at most the {vocab_size} rows of "
            "'token_embd.weight'"
        )
    context_length = meta.integer("context_length", high=_MAX_CONTEXT)
    divisors, magnitude = _rope_scaling(file, meta, rotary_dim, context or context_length)
    name = file.metadata.get("general.name")
    return ModelConfig(
        name=name[:80] if isinstance(name, str) and name.isprintable() else file.path.stem,
        architecture=architecture,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=meta.integer("block_count", high=_MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=meta.integer("feed_forward_length"),
        context_length=context_length,
        rms_norm_eps=meta.real("attention.layer_norm_rms_epsilon"),
        rope_theta=meta.real("rope.freq_base", default=10000.0),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        rope_divisors=divisors,
        rope_magnitude=magnitude,
        qkv_bias=any(f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "k", "v", "qkv")),
        tied_head="output.weight" not in file.tensors,
        sliding_window=_sliding_window(meta, architecture, context_length),
    )


def _sliding_window(meta: _Metadata, architecture: str, context_length: int) -> int | None:
    if architecture == "phi3":
        silent = _PHI3_4K_WINDOW if context_length == 4096 else 0
        window = meta.integer("attention.sliding_window", default=silent, low=0, high=_MAX_CONTEXT)
        return window or None  # Phi-4's converter writes 0 for none
    if "attention.sliding_window" not in meta:
        return None
    return meta.integer("attention.sliding_window", high=_MAX_CONTEXT)


def _rope_scaling(
    file: GGUFFile, meta: _Metadata, rotary_dim: int, context: int
) -> tuple[tuple[float, ...] | None, float]:
    """Frequency divisors and magnitude of the file's RoPE scaling.

    Llama 3 (`rope_freqs.weight`) and linear scaling are divisors alone. Longrope (Ding et al. 2024,
    https://arxiv.org/abs/2402.13753) has two sets of divisors, for contexts up to the original one and beyond, and a
    magnitude sqrt(1 + ln(s) / ln(original)), s the ratio of the contexts.
    """
    # Older files have a factor, under either of two keys, and no type.
    factor = meta.real("rope.scaling.factor", meta.real("rope.scale_linear", 1.0))
    kind = meta.text("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if kind not in ("none", "linear", "longrope"):
        raise meta.fail("rope.scaling.type", kind, "none, linear or longrope; others are not supported")
    longrope = "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors
    llama3 = "rope_freqs.weight" in file.tensors
    linear = kind == "linear" and factor != 1.0
    if longrope + llama3 + linear > 1:
        raise GGUFError(f"{file.path}: has more than one kind of RoPE scaling, which is not supported")
    if longrope or kind == "longrope":
        trained = meta.integer("context_length", high=_MAX_CONTEXT)
        original = meta.integer("rope.scaling.original_context_length", high=_MAX_CONTEXT)
        which = "long" if context > original else "short"
        divisors = _divisors(file, f"rope_factors_{which}.weight", rotary_dim)
        ratio = trained / original
        magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 and original > 1 else 1.0
        return divisors, meta.real("rope.scaling.attn_factor", default=magnitude)
    if llama3:
        return _divisors(file, "rope_freqs.weight", rotary_dim), 1.0
    return ((factor,) * (rotary_dim // 2) if linear else None), 1.0


def _divisors(file: GGUFFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    info = file.tensors.get(name)
    if info is None:
        raise GGUFError(f"{file.path}: tensor {name!r} is missing")
    if info.shape != (rotary_dim // 2,) or info.type.name != "F32":
        raise GGUFError(
            f"{file.path}: tensor {name!r} is {info.type.name} {list(info.shape)}; expected F32 [{rotary_dim // 2}]"
        )
    values = info.data.view("<f4").ravel()
    if not ((values >= 1e-6) & (values <= 1e6)).all():
        raise GGUFError(f"{file.path}: tensor {name!r} has values outside the range from 1e-6 to 1e6")
    return tuple(values.tolist())
