"""How long does a request take, from the first token to the last?

Time to first token by prompt length, and tokens a second of greedy decoding as the caller gets them (on the host),
batch 1, compiled beforehand. Beside the rate stands its ceiling: the device's measured read bandwidth over the bytes
that a step must read (weights once, cache once).
"""

from __future__ import annotations

import numpy as np

from bench import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 128, 512], help="prompt lengths in tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    lengths = args.prompts[:1] if args.quick else args.prompts
    new_tokens, repeat = (16, 2) if args.quick else (args.new_tokens, args.repeat)

    model = common.load(args)
    bandwidth = common.read_bandwidth(model.device)
    environment = common.environment(model.device)
    print(f"{model.config.name}, weights {model.weights}, on {environment['device']}, jax {environment['jax']}")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, measured")
    print(f"{'prompt':>8}{'first token':>14}{'decode':>16}{'spread':>16}{'ceiling':>10}{'share':>7}")
    rows = []
    for length in lengths:
        prompt = np.random.default_rng(0).integers(0, 1000, length).tolist()
        runs = [model.generate([prompt], new_tokens, ignore_eos=True)[0].timings for _ in range(repeat + 1)][1:]
        rate = common.spread([run.decode_tok_s for run in runs])
        first = common.spread([run.ttft_s for run in runs])
        held = length + new_tokens // 2
        ceiling = bandwidth / model.config.step_bytes(model.weights, 1, held)
        rows.append({"prompt_tokens": length, "ttft_s": first, "decode_tok_s": rate, "ceiling_tok_s": ceiling})
        print(
            f"{length:>8}{first['median'] * 1e3:>11.1f} ms{rate['median']:>10.1f} tok/s"
            f"{rate['min']:>8.1f} -{rate['max']:>6.1f}{ceiling:>10.1f}{rate['median'] / ceiling:>7.0%}"
        )
    common.finish(
        {
            "bench": "latency", "model": model.config.name, "weights": model.weights, **environment,
            "read_bytes_s": bandwidth, "new_tokens": new_tokens, "repeat": repeat, "rows": rows,
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
