"""How does this project compare with others, on the same shapes and device, in one run?

Greedy decoding of one request and prefill of a long prompt: here; in llama.cpp, where `llama-bench` is on the PATH and
a file is given; and in Hugging Face transformers, where it is installed with torch (random weights of the same shapes
in bfloat16, on a CPU in float32, static cache; `--torch-compile` lets it compile). Where llama.cpp is not installed,
what it did on the same kind of device earlier is quoted, and marked so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
from typing import Any

import numpy as np

from bench import common
from orcd_jax import hub
from orcd_jax.arguments import at_least
from orcd_jax.config import ModelConfig
from orcd_jax.language_model import GREEDY, LanguageModel
from orcd_jax.probe import measure

# llama.cpp, CUDA, Q8_0, measured once on this device by this project's authors: tokens a second.
QUOTED = {
    ("NVIDIA H100 80GB HBM3", "Qwen2.5-0.5B"): {"decode_tok_s": 903.0, "prefill_tok_s": 49e3},
    ("NVIDIA H100 80GB HBM3", "Phi-3-mini-4k"): {"decode_tok_s": 279.0, "prefill_tok_s": 16.8e3},
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--prompt", type=at_least(1), default=2048, help="tokens of the prefill (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=at_least(2), default=128, help="tokens decoded after a short prompt (%(default)s)"
    )
    parser.add_argument("--torch-compile", action="store_true", help="let transformers compile its decode step")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.new_tokens, args.repeat = 16, 8, 1

    model = common.load(args)
    where = common.environment(model.device)
    print(f"{model.config.name} on {where['device']}: prefill of {args.prompt}, {args.new_tokens} new tokens, batch 1")
    print(f"{'':<44}{'prefill':>16}{'decode':>16}{'ratios':>16}")
    rows = [{"engine": f"orcd_jax {model.weights}", **ours(model, args)}]
    show(rows[0], rows[0])
    quoted = QUOTED.get((model.device.device_kind, model.config.name))
    cpp = llama_cpp(args, model)
    others = [("llama.cpp Q8_0, quoted from an earlier run", quoted)] if quoted and not cpp else [("llama.cpp", cpp)]
    others.append(("transformers", transformers(args, model) if common.in_time(args) else None))
    for engine, found in others:
        if found is not None:
            rows.append({"engine": engine, **found})
            show(rows[-1], rows[0])
        else:
            print(f"{engine:<44}{'not here':>16}")
    common.finish(model, None, {"bench": "compare", "prompt_tokens": args.prompt, "rows": rows}, args)


def show(row: dict[str, Any], first: dict[str, Any]) -> None:
    """A row, with how many times faster this project is."""
    ratios = " / ".join(f"{first[key] / row[key]:.2f}" for key in ("prefill_tok_s", "decode_tok_s"))
    print(f"{row['engine']:<44}{row['prefill_tok_s']:>10.0f} tok/s{row['decode_tok_s']:>10.1f} tok/s{ratios:>16}",
          flush=True)  # fmt: skip


def ours(model: LanguageModel, args: argparse.Namespace) -> dict[str, float]:
    """Medians here, as the caller gets them."""
    random = np.random.default_rng(0)

    def median(prompt: int, new: int, rate: str) -> float:
        ids = random.integers(0, model.config.vocab_size, prompt).tolist()
        runs = [model.generate([ids], new, GREEDY, ignore_eos=True)[0].timings for _ in range(args.repeat + 1)]
        return common.spread([getattr(run, rate) for run in runs[1:]])["median"]

    return {
        "prefill_tok_s": median(args.prompt, 1, "prefill_tok_s"),
        "decode_tok_s": median(16, args.new_tokens, "decode_tok_s"),
    }  # fmt: skip


def llama_cpp(args: argparse.Namespace, model: LanguageModel) -> dict[str, float] | None:
    """What llama-bench says of the same file."""
    if args.preset is not None or shutil.which("llama-bench") is None:
        return None
    layers = "0" if model.device.platform == "cpu" else "999"
    command = ["llama-bench", "-m", str(hub.resolve(args.model)), "-p", str(args.prompt), "-n", str(args.new_tokens),
               "-r", str(args.repeat), "-ngl", layers, "-o", "json"]  # fmt: skip
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "prefill_tok_s": next(row["avg_ts"] for row in found if row["n_gen"] == 0),
        "decode_tok_s": next(row["avg_ts"] for row in found if row["n_prompt"] == 0),
    }


def transformers(args: argparse.Namespace, model: LanguageModel) -> dict[str, float] | None:
    """What transformers does with random weights of the same shapes."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = model.device.platform == "gpu" and torch.cuda.is_available()
    if model.device.platform == "gpu" and not on_gpu:
        return None
    with torch.device("cuda" if on_gpu else "cpu"):
        other = AutoModelForCausalLM.from_config(
            hf_config(model.config), dtype=torch.bfloat16 if on_gpu else torch.float32
        ).eval()
    random = np.random.default_rng(0)

    def seconds(prompt: int, new: int) -> float:
        ids = torch.tensor(random.integers(0, model.config.vocab_size, (1, prompt)), device=other.device)

        def run() -> None:
            other.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                cache_implementation="static", disable_compile=not args.torch_compile, pad_token_id=0,
            )  # fmt: skip
            if on_gpu:
                torch.cuda.synchronize()

        return common.spread(measure(run, args.repeat))["median"]

    return {
        "prefill_tok_s": args.prompt / seconds(args.prompt, 1),
        "decode_tok_s": (args.new_tokens - 1) / (seconds(16, args.new_tokens) - seconds(16, 1)),
    }


def hf_config(config: ModelConfig) -> Any:
    """The transformers config of the same shapes."""
    from transformers import LlamaConfig, Phi3Config, Qwen2Config

    kind = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen2": Qwen2Config}[config.architecture]
    return kind(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_ff,
        head_dim=config.head_dim, max_position_embeddings=config.context_length, rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tied_head, sliding_window=config.sliding_window,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


if __name__ == "__main__":
    common.run(main)
