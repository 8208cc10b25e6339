"""Write a GGUF file of a preset's exact shapes with random Q8_0 weights, for what needs a file: loading and start-up.

The tokeniser comes from another GGUF file of the same vocabulary (one that holds only a vocabulary will do).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from bench import common
from orcd_jax.arguments import Parser
from orcd_jax.config import ModelConfig
from orcd_jax.quantize import BLOCK

_NAMES = {
    "embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight",
    "attention.norm": "attn_norm.weight", "attention.out": "attn_output.weight", "swiglu.norm": "ffn_norm.weight",
    "swiglu.down": "ffn_down.weight",
}  # fmt: skip


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a model's tensors, in the layout of its architecture's converter."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {_NAMES[name]: shape for name, shape in config.outer_shapes().items()}
    for layer in range(config.n_layers):
        for module, parameters in config.layer_shapes().items():
            for name, shape in parameters.items():
                if f"{module}.{name}" in _NAMES:
                    parts = {_NAMES[f"{module}.{name}"]: shape}
                elif config.architecture == "phi3":
                    parts = {"attn_qkv.weight" if module == "attention" else "ffn_up.weight": shape}
                elif module == "attention":
                    kind = "bias" if name == "qkv_bias" else "weight"
                    parts = {
                        f"attn_{part}.{kind}": (rows, *shape[1:]) for part, rows in zip("qkv", (q, kv, kv), strict=True)
                    }
                else:
                    parts = {f"ffn_{part}.weight": (config.d_ff, *shape[1:]) for part in ("gate", "up")}
                shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def write(path: Path, config: ModelConfig, vocabulary: Path) -> None:
    """Write the file; its bytes are the same each time."""
    writer = GGUFWriter(path, config.architecture)
    writer.add_name(config.name)
    prefix = config.architecture
    numbers = {
        "context_length": config.context_length, "embedding_length": config.d_model, "block_count": config.n_layers,
        "feed_forward_length": config.d_ff, "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
    }  # fmt: skip
    if config.sliding_window is not None:
        numbers["attention.sliding_window"] = config.sliding_window
    for key, value in numbers.items():
        writer.add_uint32(f"{prefix}.{key}", value)
    writer.add_float32(f"{prefix}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{prefix}.rope.freq_base", config.rope_theta)
    for name, field in GGUFReader(vocabulary).fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            kind = GGUFValueType(field.types[0])
            writer.add_key_value(
                name, value, kind, GGUFValueType(field.types[1]) if kind == GGUFValueType.ARRAY else None
            )
    random = np.random.default_rng(0)
    for name, shape in tensors(config).items():
        if len(shape) == 1:
            value = np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, np.float32)
            writer.add_tensor(name, value)
            continue
        blocks = np.frombuffer(random.bytes(math.prod(shape) // BLOCK * 34), np.uint8).reshape(-1, 34).copy()
        blocks[:, :2] = np.array([(3 / shape[1]) ** 0.5 / 127], np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="GGUF")
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    write(args.path, ModelConfig.from_preset(args.preset), args.vocabulary)


if __name__ == "__main__":
    common.run(main)
