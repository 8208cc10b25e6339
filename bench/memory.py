"""How many bytes does a model take, and do they agree with the formulas?

Weights as held, the cache at several lengths, and each program's temporary memory as XLA has planned it, beside what
`ModelConfig`'s formulas say; the device's peak; and for a file, the time and the host's memory that loading takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

import orcd_jax
from bench import common
from orcd_jax.arguments import at_least
from orcd_jax.device import peak_bytes
from orcd_jax.language_model import LanguageModel
from orcd_jax.probe import program_memory


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument(
        "--lengths", type=at_least(1), nargs="*", default=[1000, 10000], help="cache lengths; always the full"
    )
    parser.add_argument("--chunk", type=at_least(1), default=512, help="tokens of a prefill program (%(default)s)")
    args = parser.parse_args()
    model = common.load(args)
    where = common.environment(model.device)
    print(f"{model.config.name}, weights {model.weights}, batch {args.batch}, on {where['device']}")
    held = model.memory()
    print(f"weights: {held['weights_bytes']:,} bytes, by the formula {held['weights_formula_bytes']:,}; "
          f"{held['packed_bytes']:,} more for the decode step's kernel")  # fmt: skip
    rows = list(by_length(model, args))
    result = {
        "bench": "memory", "batch": args.batch, "chunk": args.chunk, "weights_bytes": held["weights_bytes"],
        "weights_formula_bytes": held["weights_formula_bytes"], "packed_bytes": held["packed_bytes"],
        "kv_bytes_per_token": held["kv_bytes_per_token"],
        "rows": rows,
    }  # fmt: skip
    if args.preset is None and common.in_time(args):
        result["loading"] = loading(model, args)
    result["peak_bytes"] = peak_bytes(model.device)
    print(f"peak: {result['peak_bytes']:,} bytes {'of the process' if model.device.platform == 'cpu' else 'in use'}")
    common.finish(model, None, result, args)


def by_length(model: LanguageModel, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each cache length: the cache by its arrays and by the formula, and the programs' temporaries."""
    lengths = sorted({min(length, model.context) for length in args.lengths} | {model.context})
    print(f"{'cache':>7}{'bytes':>17}{'formula':>17}{'decode temp.':>15}{'prefill temp.':>16}{'formula':>16}")
    lengths = lengths[: 1 if args.quick else None]
    plans = [
        partial(program_memory, model, args.batch, length, prompt=prompt)
        for length in lengths for prompt in (None, min(args.chunk, length))
    ]  # fmt: skip
    planned = (plan.temp_size_in_bytes for plan in common.compiled_together(model.device, plans))
    for length in lengths:
        if not common.in_time(args):
            return
        cache = jax.eval_shape(lambda n=length: orcd_jax.init_cache(model.config, args.batch, n))
        arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
        formula = model.config.cache_bytes(args.batch, length)
        chunk = min(args.chunk, length)
        decode, prefill = next(planned), next(planned)
        expected = model.workspace_bytes(args.batch, chunk, length)
        print(f"{length:>7}{arrays:>17,}{formula:>17,}{decode:>15,}{prefill:>16,}{expected:>16,}", flush=True)
        yield {
            "cache_tokens": length, "cache_bytes": arrays, "cache_formula_bytes": formula, "decode_temporary": decode,
            "prefill_temporary": prefill, "workspace_formula_bytes": expected,
        }  # fmt: skip


def loading(model: LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """Load the file in processes of their own: seconds of all of it and, again, of its tensors alone; bytes of the file
    a second; the host's memory at most."""
    path = orcd_jax.hub.resolve(args.model)
    options = {"weights": model.weights, "device": args.device, "kernels": args.kernels}
    script = (
        "import json, orcd_jax, re, time; "
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        f"orcd_jax.device.select_device({args.device!r}); before = peak(); "
        f"m = orcd_jax.load({str(path)!r}, **{options!r}); grown = peak() - before; "
        f"file = orcd_jax.gguf_reader.GGUFFile.open({str(path)!r}); start = time.perf_counter(); "
        "orcd_jax.loader.load_params(file, m.config, m.weights, m.device); "
        "print(json.dumps([m.load_s, time.perf_counter() - start, grown]))"
    )
    command, environment = [sys.executable, "-c", script], os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    runs = [  # beside this process, which has taken most of a GPU's memory
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
        for _ in range(1 if args.quick else args.repeat)
    ]
    times, tensor_times, grown = zip(*runs, strict=True)
    size, seconds, tensors = path.stat().st_size, common.spread(times), common.spread(tensor_times)
    print(f"loading: {size:,} bytes of file in {seconds['median']:.2f} s ({common.per_cent(times)}), the tensors alone "
          f"in {tensors['median']:.2f} s, {size / tensors['median'] / 1e9:.2f} GB/s, {max(grown):,} bytes of the "
          "host's memory at most")  # fmt: skip
    return {
        "file_bytes": size, "load_s": seconds, "tensors_s": tensors, "bytes_s": size / tensors["median"],
        "host_bytes": max(grown),
    }  # fmt: skip


if __name__ == "__main__":
    common.run(main)
