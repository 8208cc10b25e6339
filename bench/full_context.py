"""Does a whole context run, in the memory that the formulas say?

Fills the context of a preset to its last token: one prompt in chunks, then decoding until it ends for want of context.
`--tiny` keeps the preset's context, window and positions but makes the model small enough for a CPU: one layer, two
query heads. Temporaries are XLA's plan, at half the context and at all of it: they may double, not quadruple.
"""

from __future__ import annotations

import time
from dataclasses import replace

import jax
import numpy as np

from bench import common
from orcd_jax.config import ModelConfig
from orcd_jax.device import peak_bytes, select_device
from orcd_jax.errors import RequestError
from orcd_jax.language_model import LanguageModel
from orcd_jax.loader import random_params
from orcd_jax.probe import program_memory

PRESETS = ("qwen2.5-0.5b", "phi-3-mini-4k")
NEW_TOKENS = 16


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="the preset's context with a tiny model")
    args = parser.parse_args()
    if args.preset is None:
        raise RequestError("full_context takes --preset, e.g. " + " or ".join(PRESETS))
    model = tiny_model(args.preset, select_device(args.device)) if args.tiny else common.load(args)
    config, context = model.config, model.context
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, context - NEW_TOKENS).tolist()
    start = time.perf_counter()
    (done,) = model.generate([prompt], 2 * NEW_TOKENS, ignore_eos=True)
    seconds = time.perf_counter() - start
    assert (done.finish_reason, len(done.token_ids)) == ("context", NEW_TOKENS)
    chunk = 512  # as in the guide's other tables
    plans = {length: program_memory(model, 1, length, prompt=chunk) for length in (context // 2, context)}
    temporaries = {length: plan.temp_size_in_bytes for length, plan in plans.items()}
    workspace, cache = model.workspace_bytes(1, chunk, context), config.cache_bytes(1, context)
    times = done.timings
    print(f"{config.name}{', tiny' if args.tiny else ''}: {len(prompt)} + {NEW_TOKENS} tokens in {seconds:.1f} s, "
          f"of which {times.compile_s:.1f} compiling, {times.ttft_s:.1f} to the first token")  # fmt: skip
    print(f"cache {cache:,} bytes; temporaries of a prefill of {chunk}: {temporaries[context // 2]:,} at half the "
          f"context, {temporaries[context]:,} at all of it, by the formula {workspace:,}")  # fmt: skip
    result = {
        "bench": "full_context", "tiny": args.tiny, "context": context, "seconds": seconds, "chunk": chunk,
        "compile_s": done.timings.compile_s, "ttft_s": done.timings.ttft_s, "cache_bytes": cache,
        "temporaries": list(temporaries.values()), "workspace_formula_bytes": workspace,
        "peak_bytes": peak_bytes(model.device),
    }  # fmt: skip
    common.finish(model, None, result, args)


def tiny_model(preset: str, device: jax.Device) -> LanguageModel:
    """The preset's context and window, with one layer, and heads in its proportion of queries to keys or nearly so."""
    config = ModelConfig.from_preset(preset)
    config = replace(
        config, vocab_size=512, known_tokens=512, d_model=32, n_layers=1, n_heads=2, head_dim=16, d_ff=32,
        n_kv_heads=1 if config.query_group > 1 else 2,
    )  # fmt: skip
    return LanguageModel(
        config, random_params(config, "f32", device), common.vocabulary(config.vocab_size), None,
        context=config.context_length, weights="f32", device=device,
    )  # fmt: skip


if __name__ == "__main__":
    common.run(main)
