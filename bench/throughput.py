"""How many tokens a second do many requests get together?

Over batch sizes: prompts of mixed length (8 to `--longest` tokens of prose; random tokens for random weights), in
batches as `generate` makes them, longest together; new tokens of all rows over the whole time, prefill included,
everything compiled beforehand. `--guide`: 100 prompts of 5 tokens, 20 new ones each, one after another and as one
call, as this project's first performance guide had it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import common
from orcd_jax.arguments import at_least
from orcd_jax.language_model import GREEDY, LanguageModel
from orcd_jax.probe import Ceilings, measure, measure_ceilings, settled
from orcd_jax.sampling import Sampling


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument(
        "--prompts", type=at_least(1), default=16, help="at least so many requests a batch size (%(default)s)"
    )
    parser.add_argument("--longest", type=at_least(9), default=384, help="tokens of the longest prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=at_least(2), default=64)
    parser.add_argument("--guide", action="store_true", help="the first performance guide's benchmark instead")
    parser.add_argument("--plot", type=Path, help="write a plot over batch sizes to this PNG")
    args = parser.parse_args()
    if args.guide and args.plot:
        parser.error("--plot is over batch sizes, which --guide has none of")
    if args.quick:
        args.batch, args.prompts, args.new_tokens, args.repeat = args.batch[:2], 2, 8, 1

    model = common.load(args)
    ceilings = measure_ceilings(model.device, model.config.activation_dtype)
    common.headline(model, ceilings)
    measured: dict[str, Any] = {}
    if args.guide:
        measured["guide"] = guide(model, 4 if args.quick else 100)
    else:
        measured["rows"] = list(by_batch(model, args, ceilings))
    if args.plot:
        plot(measured["rows"], args.plot, f"{model.config.name}: prompts of 8 to {args.longest} tokens")
    common.finish(
        model, ceilings, {"bench": "throughput", "repeat": args.repeat, "longest": args.longest, **measured}, args
    )


def by_batch(model: LanguageModel, args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One row for each batch size."""
    print(f"{'batch':>6}{'requests':>10}{'mean prompt':>13}{'together':>16}{'spread':>9}{'decoding':>16}{'ceiling':>11}"
          f"{'share':>7}")  # fmt: skip

    def run(batch: int, requests: list[list[int]]) -> float:
        """Tokens a second of decoding."""
        own = copy.copy(model)  # the same programs
        own._buckets = replace(model._buckets, batch=batch)  # more rows than a device's own limit, too
        return own.generate(requests, args.new_tokens, GREEDY, ignore_eos=True)[0].timings.decode_tok_s

    prompts = [mixed_prompts(model, args, max(batch, args.prompts)) for batch in args.batch]
    if model.device.platform == "gpu":
        calls = [partial(run, batch, requests) for batch, requests in zip(args.batch, prompts, strict=True)]
        list(common.compiled_together(model.device, calls))
    for batch, requests in zip(args.batch, prompts, strict=True):
        if not common.in_time(args):
            break
        rates: list[float] = []
        call = partial(measure, lambda b=batch, r=requests, rates=rates: rates.append(run(b, r)), args.repeat)
        seconds = settled(call, model.device)
        together = [args.new_tokens * len(requests) / s for s in seconds]
        held = round(float(np.mean([len(prompt) for prompt in requests]))) + args.new_tokens // 2
        ceiling = min(
            batch * ceilings.read_bytes_s / model.config.step_bytes(model.weights, batch, held),
            ceilings.matmul_flops_s / model.config.token_flops(held),
        )
        rate, decoding = common.spread(together), common.spread(rates[1:])
        print(f"{batch:>6}{len(requests):>10}{held - args.new_tokens // 2:>13}{rate['median']:>10.1f} tok/s"
              f"{common.per_cent(together):>9}{decoding['median']:>10.1f} tok/s{ceiling:>11.1f}"
              f"{decoding['median'] / ceiling:>7.1%}", flush=True)  # fmt: skip
        yield {
            "batch": batch, "requests": len(requests), "mean_prompt": held - args.new_tokens // 2,
            "new_tokens": args.new_tokens, "tok_s": rate, "decode_tok_s": decoding, "ceiling_tok_s": ceiling,
        }  # fmt: skip


def mixed_prompts(model: LanguageModel, args: argparse.Namespace, count: int) -> list[list[int]]:
    """Prompts of 8 to `--longest` tokens, short ones more often (their logarithms are uniform)."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(8), np.log(args.longest), count)).astype(int)
    text = common.token_stream(model, args, max(4096, 2 * args.longest))
    starts = random.integers(0, len(text) - args.longest, count)
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def guide(model: LanguageModel, count: int) -> dict[str, float]:
    """Prompts of 5 tokens and 20 new tokens each, temperature 1: one after another, and as one call."""
    prompts, sampling, rates = [[1, 2, 3, 4, 5]] * count, Sampling(temperature=1.0), {}

    def sequential() -> None:
        for prompt in prompts:
            model.generate([prompt], 20, sampling, seed=42, ignore_eos=True)

    def together() -> None:
        model.generate(prompts, 20, sampling, seed=42, ignore_eos=True)

    for name, call in (("sequential", sequential), ("together", together)):
        model.generate(prompts[:1] if name == "sequential" else prompts, 20, sampling, ignore_eos=True)
        start = time.perf_counter()
        call()
        rates[f"{name}_tok_s"] = 20 * count / (time.perf_counter() - start)
        print(f"{count} prompts x 20 tokens, {name}: {rates[f'{name}_tok_s']:.1f} tok/s", flush=True)
    return rates


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Tokens a second over the batch size, with the ceiling."""
    axes = common.axes("batch", "tokens a second", title)
    sizes = [row["batch"] for row in rows]
    axes.plot(sizes, [row["ceiling_tok_s"] for row in rows], "--", color="grey", label="ceiling of decoding")
    axes.plot(sizes, [row["decode_tok_s"]["median"] for row in rows], "o-", label="decoding")
    axes.plot(sizes, [row["tok_s"]["median"] for row in rows], "o-", label="whole requests")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    common.save(axes, path)


if __name__ == "__main__":
    common.run(main)
