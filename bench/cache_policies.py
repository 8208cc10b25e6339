"""What does a cache policy cost in quality, and what does it save?

Perplexity of a long text by position under each policy, and the bytes that the cache holds at its end. The text is fed
chunk by chunk against the cache, so that each token sees exactly what it would see in generation.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bench import common
from orcd_jax.arguments import at_least
from orcd_jax.cache_policy import CachePolicy
from orcd_jax.errors import RequestError
from orcd_jax.language_model import LanguageModel


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--file", type=Path, default=common.PROSE, help="the text (default: the one of the tests)")
    parser.add_argument("--window", type=at_least(1), default=256)
    parser.add_argument("--plot", type=Path, help="write a plot of perplexity by position to this PNG")
    args = parser.parse_args()
    model = common.load(args)
    text = args.file.read_text(encoding="utf-8")[: model.context * model.tokenizer.longest]
    ids = model.encode_prompt(text)[: min(300 if args.quick else model.context, model.context)]
    window = min(args.window, len(ids) // 4)
    if not window:
        raise RequestError(f"{args.file} has {len(ids)} tokens; expected some hundred")
    policies = ["full", "int8", f"sliding:{window}:4", f"sliding:{window}:0", f"sliding:{window}:4+int8"]
    policies.append(f"compress:{window}")
    where = common.environment(model.device)
    print(f"{model.config.name}, weights {model.weights}, {len(ids)} tokens of {args.file.name}, on {where['device']}")
    print(f"{'policy':<20}{'perplexity':>12}{'of full':>10}{'last quarter':>14}{'bytes held':>14}")
    rows, curves = [], {}
    for name in policies:
        if not common.in_time(args):
            break
        config = dataclasses.replace(model.config, cache=CachePolicy.parse(name))
        other = LanguageModel(
            config, model.params, model.tokenizer, None,
            context=model.context, weights=model.weights, device=model.device, kernels=model.kernels,
        )  # fmt: skip
        losses = -other.token_logprobs(ids).astype(np.float64)
        curves[name] = losses
        overall, last = np.exp(losses.mean()), np.exp(losses[-len(losses) // 4 :].mean())
        held = config.cache_bytes(1, len(ids))
        rows.append({"policy": name, "perplexity": overall, "last_quarter": last, "bytes": held})
        print(f"{name:<20}{overall:>12.3f}{overall / rows[0]['perplexity'] - 1:>+10.2%}{last:>14.3f}{held:>14,}")
    if args.plot:
        plot(curves, args.plot, f"{model.config.name}, window {window}")
    common.finish(model, None, {"bench": "cache_policies", "tokens": len(ids), "rows": rows}, args)


def plot(curves: dict[str, np.ndarray], path: Path, title: str) -> None:
    """Perplexity over the 128 tokens around each position."""
    axes = common.axes("position", "perplexity (128 tokens around)", title)
    for name, losses in curves.items():
        smooth = np.convolve(losses, np.full(128, 1 / 128), "valid")
        axes.plot(np.arange(len(smooth)) + 64, np.exp(smooth), label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    common.save(axes, path)


if __name__ == "__main__":
    common.run(main)
