"""How long does a request take, from the first token to the last?

Requests: time to first token and tokens a second of greedy decoding as the caller gets them (text on the host), by
batch and prompt length, compiled beforehand, on a GPU side by side. Steps: the decode program alone, back to back, on
caches that are filled already. Beside a rate stands its ceiling: the device's measured read bandwidth over the bytes
that a step must read (weights once, cache once); for prefill the measured matrix rate over the operations. `--guide`: 5
requests to warm up, then 100 of 10 tokens, temperature 1, as this project's first performance guide had it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench import common
from orcd_jax.arguments import at_least
from orcd_jax.errors import RequestError
from orcd_jax.language_model import GREEDY, LanguageModel, Timings
from orcd_jax.probe import Ceilings, Probe, measure_ceilings, settled
from orcd_jax.sampling import Sampling

_FULL = 1 << 40  # tokens: as many as fit


def main() -> None:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--prompts", type=prompt_length, nargs="*", help="prompt lengths at batch 1; full: all of the context but the "
        "new tokens (10 128 512 2048 and, on a GPU, full)")  # fmt: skip
    add("--batch", type=at_least(1), nargs="*", default=[8], help="batch sizes, with prompts of 128 tokens")
    add("--sampled", type=at_least(1), nargs="*", default=[1], help="batch sizes with default sampling too")
    add("--cache", type=at_least(0), nargs="*", default=[128, 1024, 4000], help="cache lengths of single decode steps")
    add("--new-tokens", type=at_least(2), default=128)
    add("--guide", action="store_true", help="the first performance guide's benchmark in place of the others")
    args = parser.parse_args()
    model = common.load(args)
    if args.prompts is None:
        args.prompts = [10, 128, 512, 2048, *([_FULL] if model.device.platform == "gpu" else [])]
    if args.quick:
        args.prompts, args.batch, args.cache = args.prompts[:1], args.batch[:1], args.cache[:1]
        args.new_tokens, args.repeat = 16, 2

    ceilings = measure_ceilings(model.device, model.config.activation_dtype)
    common.headline(model, ceilings)
    if args.guide:
        measured = {"guide": guide(model, args)}
    else:
        measured = {"requests": list(requests(model, args, ceilings)), "steps": list(steps(model, args, ceilings))}
    common.finish(model, ceilings, {"bench": "latency", "repeat": args.repeat, **measured}, args)


def prompt_length(text: str) -> int:
    """A type of `argparse`'s: a number of tokens, or "full"."""
    return _FULL if text == "full" else at_least(1)(text)


def requests(model: LanguageModel, args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One row for each kind of request."""
    print(f"{'batch':>6}{'prompt':>8}{'sampling':>10}{'first token':>14}{'prefill':>16}{'decode':>18}{'ceiling':>11}"
          f"{'share':>7}{'compile':>10}")  # fmt: skip
    most = model.context - args.new_tokens
    if most < 1:
        raise RequestError(f"a context of {model.context} has no room for {args.new_tokens} new tokens")
    kinds = [(1, length, GREEDY) for length in dict.fromkeys(min(length, most) for length in args.prompts)]
    kinds += [(batch, 128, GREEDY) for batch in args.batch]
    kinds += [(batch, 128, Sampling()) for batch in args.sampled]
    kinds = [(batch, min(length, most), sampling) for batch, length, sampling in kinds]

    def runs(batch: int, length: int, sampling: Sampling, count: int) -> list[Timings]:
        prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length)).tolist()
        return [model.generate(prompts, args.new_tokens, sampling, ignore_eos=True)[0].timings for _ in range(count)]

    first_runs = common.compiled_together(model.device, [partial(runs, *kind, 1) for kind in kinds])
    for batch, length, sampling in kinds:
        if not common.in_time(args):
            return
        (first,) = next(first_runs)
        measure = partial(runs, batch, length, sampling, args.repeat)
        rest = settled(measure, model.device, lambda run: run.decode_tok_s)
        rate = common.spread([run.decode_tok_s for run in rest])
        ttft = common.spread([run.ttft_s for run in rest])
        prefill = common.spread([run.prefill_tok_s for run in rest])
        bytes_a_step = model.config.step_bytes(model.weights, batch, length + args.new_tokens // 2)
        ceiling = batch * min(
            ceilings.read_bytes_s / bytes_a_step, ceilings.matmul_flops_s / batch / model.config.token_flops(length)
        )
        name = "greedy" if sampling is GREEDY else "default"
        print(f"{batch:>6}{length:>8}{name:>10}{ttft['median'] * 1e3:>11.2f} ms{prefill['median']:>10.0f} tok/s"
              f"{rate['median']:>12.1f} tok/s{ceiling:>11.1f}{rate['median'] / ceiling:>7.1%}"
              f"{first.compile_s:>8.1f} s", flush=True)  # fmt: skip
        yield {
            "batch": batch, "prompt_tokens": length, "new_tokens": args.new_tokens, "sampling": name, "ttft_s": ttft,
            "prefill_tok_s": prefill, "prefill_ceiling_tok_s": ceilings.matmul_flops_s / model.config.token_flops(),
            "decode_tok_s": rate, "ceiling_tok_s": ceiling, "compile_s": first.compile_s,
        }  # fmt: skip


def steps(model: LanguageModel, args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One row for each cache length of a decode step at batch 1."""
    count, chunks = (4, 1) if args.quick else (32, 4) if model.device.platform == "gpu" else (8, 1)
    print(f"{'cache':>6}{'a step':>12}{'spread':>9}{'ceiling':>12}{'share':>7}")
    lengths = list(dict.fromkeys(min(held, model.context - count) for held in args.cache))
    probes = common.compiled_together(model.device, [partial(Probe, model, 1, held, steps=count) for held in lengths])
    for held in lengths:
        if not common.in_time(args):
            return
        probe = next(probes)
        times = [seconds / count for seconds in settled(partial(probe.measure, args.repeat, chunks), model.device)]
        time = common.spread(times)
        least = model.config.step_bytes(model.weights, 1, held + count // 2) / ceilings.read_bytes_s
        print(f"{held:>6}{time['median'] * 1e3:>9.3f} ms{common.per_cent(times):>9}{least * 1e3:>9.3f} ms"
              f"{least / time['median']:>7.1%}", flush=True)  # fmt: skip
        yield {"cache_tokens": held, "step_s": time, "ceiling_s": least, "compile_s": probe.compile_s}


def guide(model: LanguageModel, args: argparse.Namespace) -> dict[str, float]:
    """Five requests to warm up, then 100 of 10 tokens after a prompt of 5."""

    def request() -> None:
        model.generate([[1, 2, 3, 4, 5]], 10, Sampling(temperature=1.0), seed=42, ignore_eos=True)

    for _ in range(5):
        request()
    iterations = 10 if args.quick else 100
    start = time.perf_counter()
    for _ in range(iterations):
        request()
    latency = (time.perf_counter() - start) / iterations
    print(f"average latency {latency * 1e3:.2f} ms, {1 / latency:.1f} requests/s, {10 / latency:.1f} tok/s")
    return {"iterations": iterations, "latency_s": latency, "requests_s": 1 / latency, "tok_s": 10 / latency}


if __name__ == "__main__":
    common.run(main)
