"""Where does the time of a prefill and of a decode step go?

The component table of `python -m orcd_jax.profile`, for models and presets, with each component's least time by its
bytes and operations. Beside the sum stands the time without the profiler: of the median step in programs back to back.
"""

from __future__ import annotations

from dataclasses import asdict

from bench import common
from orcd_jax.arguments import at_least
from orcd_jax.probe import measure_ceilings
from orcd_jax.profile import STEPS, profile, table


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--prompt", type=at_least(0), default=512, help="tokens of the prefill; 0: none (%(default)s)")
    parser.add_argument("--cache", type=at_least(0), default=1024, help="tokens in the cache at decode (%(default)s)")
    args = parser.parse_args()
    model = common.load(args)
    ceilings = measure_ceilings(model.device, model.config.activation_dtype)
    common.headline(model, ceilings)
    prompt, held = (16, 32) if args.quick else (args.prompt, args.cache)
    prompt, held = min(prompt, model.context), min(held, model.context - STEPS)
    found = {}
    if prompt:
        found["prefill"] = profile(model, args.batch, 0, prompt, args.repeat)
        print(table(f"prefill of {args.batch} x {prompt} tokens", found["prefill"], ceilings), flush=True)
    found["decode"] = profile(model, args.batch, held, None, args.repeat)
    print(table(f"a decode step of {args.batch} after {held} tokens", found["decode"], ceilings))
    shapes = {"batch": args.batch, "prompt_tokens": prompt, "cache_tokens": held}
    result = {"bench": "breakdown", **shapes, **{phase: asdict(profiled) for phase, profiled in found.items()}}
    common.finish(model, ceilings, result, args)


if __name__ == "__main__":
    common.run(main)
