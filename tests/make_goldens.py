"""Make the goldens again: what HF transformers computes for the tiny models and, with --models, for the real ones.

    python tests/make_goldens.py [--models FOLDER]

needs torch, transformers and accelerate, which the tests themselves do not. It also loads the files of `tiny_models`
and the real ones with HF's own GGUF loader, and stops where the two read a weight differently.

goldens/TINY.npz, for each tiny model. `checksum` is that of the weights; for each sequence n there are
  tokens_n  int32 [T]
  logits_n  float32 [T, V], computed in float64
  greedy_n  int32 [24], the greedy continuation: padding ids masked, stop ids ignored
  gaps_n    float32 [24], by how much the best logit leads the second best at each step
Of `phi3-longrope` the last sequence is beyond the original context and has the long divisors from its first token on;
the others stay within it, their continuations too, and have the short ones.

goldens/MODEL.json, for each real model, computed in float32: for each prompt its token ids, the greedy tokens up to a
stop id (which is kept) with their leads, and of the prompt's last position the 50 largest logits and the log of the
sum of the exponentials of all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from tiny_models import (
    SPECS,
    TinySpec,
    byte_symbols,
    checksum,
    gguf_name,
    interleave,
    known_tokens,
    random_weights,
    read_gguf,
    write_gguf,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    modeling_rope_utils,
)
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2

GOLDENS = Path(__file__).parent / "goldens"
TINY_STEPS = 24
CONFIGS = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen2": Qwen2Config}


# Tiny models


def hf_model(spec: TinySpec, weights: dict[str, np.ndarray]) -> PreTrainedModel:
    """The HF model of `spec` with `weights`, in the default dtype."""
    switches: dict[str, Any] = {}
    if spec.architecture == "llama":
        switches["head_dim"] = spec.head_dim
    elif spec.architecture == "phi3":
        switches["sliding_window"] = spec.sliding_window
        if spec.rope_scaling:
            # Phi3Config takes it from here, and not from the dictionary.
            original = spec.rope_scaling["original_max_position_embeddings"]
            switches["original_max_position_embeddings"] = original
    config = CONFIGS[spec.architecture](
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=spec.context_length,
        rms_norm_eps=spec.eps,
        tie_word_embeddings=spec.tied,
        rope_parameters={"rope_theta": spec.rope_theta, "rope_type": "default", **(spec.rope_scaling or {})},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **switches,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    if spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


@contextlib.contextmanager
def everything_float64() -> Iterator[None]:
    """Let HF's models run in float64 throughout: their norms, softmax and rotations name float32 themselves."""

    class Float64Torch:
        def __getattr__(self, name: str) -> Any:
            return torch.float64 if name in ("float", "float32") else getattr(torch, name)

    with contextlib.ExitStack() as stack:
        for module in (modeling_llama, modeling_phi3, modeling_qwen2, modeling_rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", Float64Torch()))
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, torch.float32)
        yield


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Logits of every position [T, V], without a cache."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()


def lead(logits: np.ndarray) -> tuple[int, float]:
    """The best token and by how much its logit exceeds the second best."""
    second, best = np.argsort(logits)[-2:]
    return int(best), float(logits[best] - logits[second])


def make_tiny(name: str, spec: TinySpec) -> None:
    """Write the goldens of one tiny model, and check HF in float32 and HF's reading of the GGUF file against them."""
    weights = random_weights(spec)
    random = np.random.Generator(np.random.PCG64([spec.seed, 1])).random
    lengths = (1, 7, 40, 100) if spec.rope_type == "longrope" else (1, 7, 40)
    sequences = [(random(length) * known_tokens(spec)).astype(np.int32) for length in lengths]

    with everything_float64():
        model = hf_model(spec, weights)
        arrays: dict[str, Any] = {"checksum": np.uint32(checksum(weights))}
        for n, tokens in enumerate(sequences):
            arrays[f"tokens_{n}"] = tokens
            arrays[f"logits_{n}"] = logits_of(model, tokens)
            assert arrays[f"logits_{n}"].dtype == np.float64
            sequence, gaps = list(tokens), []
            for _ in range(TINY_STEPS):
                best, gap = lead(logits_of(model, sequence)[-1, : known_tokens(spec)])
                sequence.append(best)
                gaps.append(gap)
            arrays[f"greedy_{n}"] = np.array(sequence[len(tokens) :], np.int32)
            arrays[f"gaps_{n}"] = np.array(gaps, np.float32)

    exact = [arrays[f"logits_{n}"] for n in range(len(sequences))]
    single = hf_model(spec, weights)
    error = max(np.abs(logits_of(single, s) - e).max() / np.abs(e).max() for s, e in zip(sequences, exact, strict=True))
    assert error < 1e-5, f"{name}: HF in float32 differs from HF in float64 by {error:.1e}"
    for n, logits in enumerate(exact):
        arrays[f"logits_{n}"] = logits.astype(np.float32)
    np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)

    with tempfile.TemporaryDirectory() as folder:
        loaded = load_gguf(write_gguf(Path(folder) / f"{name}.gguf", spec))
    state = loaded.state_dict()
    for hf_name, weight in weights.items():
        assert np.array_equal(state[hf_name].numpy(), weight), f"{name}: HF reads {hf_name} otherwise"
    # HF's loader leaves out the sliding window and all RoPE scaling, so only the others can have the same logits.
    comparable = spec.sliding_window is None and spec.rope_scaling is None
    if comparable:
        assert np.array_equal(logits_of(loaded, sequences[-1]), logits_of(single, sequences[-1])), name
    gap = min(arrays[f"gaps_{n}"].min() for n in range(len(sequences)))
    std = float(exact[-1].std())
    print(f"{name}: float32 within {error:.1e}, logits' deviation {std:.2f}, closest lead {gap:.4f}, ", end="")
    print("HF's GGUF loader: same weights" + (", same logits" if comparable else ""))


def load_gguf(path: Path) -> PreTrainedModel:
    """Load a GGUF file with HF's own loader, dequantised to float32."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


# Real models


@dataclass(frozen=True)
class Prompt:
    """A prompt as plain text, or as messages of a chat."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def user(content: str) -> Prompt:
    return Prompt(messages=({"role": "user", "content": content},))


@dataclass(frozen=True)
class RealModel:
    """A real file, what HF's tokeniser for it splits text by, and the prompts."""

    file: str
    split: pre_tokenizers.PreTokenizer
    default_system: str
    stop_ids: tuple[int, ...]
    steps: int
    prompts: tuple[Prompt, ...]


REAL_MODELS = {
    "smollm2-135m-instruct": RealModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        split=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        stop_ids=(2, 0),
        steps=64,
        prompts=(
            Prompt("The capital of France is"),
            Prompt("Once upon a time, in a village by the sea, there lived a clockmaker who"),
            Prompt("Water boils at 100 degrees Celsius because"),
            user("What is the capital of Italy, and what is it known for?"),
            user("Write a short poem about the moon and the tide."),
            Prompt(
                messages=(
                    {"role": "system", "content": "You answer in one short sentence."},
                    {"role": "user", "content": "Why is the sky blue?"},
                )
            ),
        ),
    ),
    "qwen2.5-coder-0.5b-instruct": RealModel(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        split=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    behavior="isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        stop_ids=(151645, 151643),
        steps=48,
        prompts=(
            Prompt("def fibonacci(n: int) -> int:\n"),
            user("Write a Python function that reverses a string."),
            user("What is the difference between a list and a tuple in Python?"),
        ),
    ),
}


def render(prompt: Prompt, default_system: str) -> str:
    """The ChatML text of a prompt, written out here so that no template is involved."""
    if not prompt.messages:
        return prompt.text
    messages = list(prompt.messages)
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": default_system})
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def make_real(name: str, real: RealModel, folder: Path) -> None:
    """Write the goldens of one real model, after a check that HF holds every tensor of the file."""
    path = folder / real.file
    model = load_gguf(path)
    check_parameters(model, path)
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = real.split
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}

    prompts = []
    for prompt in real.prompts:
        text = render(prompt, real.default_system)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        first = logits_of(model, ids)[-1].astype(np.float64)
        top = np.argsort(first)[::-1][:50]
        greedy, gaps = continue_greedily(model, ids, real)
        answer = [token for token in greedy if token not in real.stop_ids]
        completion = bytes(symbols[c] for token in answer for c in tokens[token]).decode()
        prompts.append(
            {
                "messages": prompt.messages or None,
                "text": text,
                "tokens": ids,
                "greedy": greedy,
                "gaps": [round(gap, 5) for gap in gaps],
                "completion": completion,
                "top_ids": top.tolist(),
                "top_logits": [round(value, 5) for value in first[top].tolist()],
                "logsumexp": round(float(np.logaddexp.reduce(first)), 5),
            }
        )
        print(f"{name}: {len(ids)} -> {len(greedy)} tokens, closest lead {min(gaps):.4f}: {completion!r}")
    golden = {
        "file": real.file,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "stop_ids": real.stop_ids,
        "prompts": prompts,
    }
    text = re.sub(r"\n +(?=[-\d\]])", "", json.dumps(golden, ensure_ascii=False, indent=1))  # numbers in one line
    (GOLDENS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def check_parameters(model: PreTrainedModel, path: Path) -> None:
    """Stop unless the model's parameters are, bit for bit, the file's tensors as `gguf` dequantises them."""
    tensors = read_gguf(path)
    config = model.config
    assert config.tie_word_embeddings == ("output.weight" not in tensors)
    used = set()
    for hf_name, parameter in model.named_parameters():
        weight, name = parameter.detach().numpy(), gguf_name(hf_name)
        if config.model_type == "llama" and hf_name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in hf_name else config.num_key_value_heads
            weight = interleave(weight, heads)
        assert np.array_equal(weight, tensors[name]), f"HF reads {name} otherwise"
        used.add(name)
    assert used == set(tensors), f"HF leaves out {set(tensors) - used}"
    print(f"{path.name}: HF holds all {len(tensors)} tensors; {config.rope_parameters}, eps {config.rms_norm_eps}")


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, ids: list[int], real: RealModel) -> tuple[list[int], list[float]]:
    """The greedy tokens after `ids`, up to `steps` or the first stop id, and the lead of each."""
    greedy: list[int] = []
    gaps: list[float] = []
    cache, step = None, ids
    while len(greedy) < real.steps and not (greedy and greedy[-1] in real.stop_ids):
        output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best, gap = lead(output.logits[0, -1].numpy())
        greedy.append(best)
        gaps.append(gap)
        step = [best]
    return greedy, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens again, with HF transformers.")
    parser.add_argument("--models", type=Path, help="folder of the real GGUF files; without it only the tiny models")
    folder = parser.parse_args().models
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    GOLDENS.mkdir(exist_ok=True)
    for name, spec in SPECS.items():
        make_tiny(name, spec)
    if folder:
        for name, real in REAL_MODELS.items():
            make_real(name, real, folder)


if __name__ == "__main__":
    main()
