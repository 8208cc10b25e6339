"""Measure the kernels' configurations on this GPU: `python -m pallas_kernels.tune` writes `tuned/<device>.json`.

For each op at the shapes of the models in configs/, every choice that its kernels make is tried in turn: candidates
are compiled side by side, checked against the first one's result, and timed by the profiler, with the weights and the
cache out of L2 before each run. What is at least 2 % faster than the heuristic's configuration becomes an entry.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.implementation import compiled, on_hopper
from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.tuning import Choice, deciding, device_slug, entries

TUNED = Path(__file__).with_name("tuned")
_RUNS = 6  # of each candidate
_FLUSH = 1 << 28  # bytes read between two runs: several times what L2 holds
_GAIN = 0.98  # of the heuristic's time that a configuration must not exceed
_TOLERANCE = 2e-2  # relative to the largest result, between two configurations in bfloat16


@dataclass(frozen=True)
class Problem:
    """An op at a shape."""

    name: str
    call: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--only", default="", help="problems whose name has this in it")
    add("--rows", type=int, nargs="*", default=[1, 8, 16, 32, 64, 128, 512, 2048], help="of activations (%(default)s)")
    add("--most", type=int, default=24, help="candidates of a choice, taken at random (%(default)s)")
    add("--within", type=float, metavar="SECONDS", help="begin no further problem after so long")
    add("--output", type=Path, default=TUNED, help="folder of the file (%(default)s)")
    args = parser.parse_args()
    if not on_hopper():
        parser.error("needs an NVIDIA Hopper GPU")
    found: dict[str, dict[str, Any]] = {op: dict(of) for op, of in entries(device_slug()).items()}
    began = time.monotonic()
    for problem in problems(args.rows):
        if args.only not in problem.name:
            continue
        if args.within is not None and time.monotonic() - began > args.within:
            print(f"(no time for {problem.name} and what follows)")
            break
        for choice, best in tune(problem, args.most):
            table = found.setdefault(choice.op, {})
            table.pop(choice.key, None)
            if best != choice.heuristic:
                table[choice.key] = asdict(best)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{device_slug()}.json"
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{sum(map(len, found.values()))} entries in {path}")


# The shapes


def problems(rows: list[int]) -> Iterator[Problem]:
    """Every op at the shapes of every model in configs/."""
    folder = resources.files("configs")
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name):
        model = tomllib.loads(file.read_text(encoding="utf-8"))
        d, f, v, width = (model[key] for key in ("d_model", "d_ff", "vocab_size", "head_dim"))
        n, k = model["n_heads"], model["n_kv_heads"]
        for m in rows:
            name = f"{model['name']} M={m}"
            yield Problem(f"qkv_rope {name}", partial(_qkv_rope, n, k), partial(_qkv_inputs, m, d, n, k, width))
            yield Problem(f"quant_matmul out {name}", _residual, partial(_matmul_inputs, m, d, n * width))
            yield Problem(f"gate_up and down {name}", _swiglu, partial(_swiglu_inputs, m, d, f))
            if m <= 128:
                yield Problem(f"quant_matmul head {name}", _head, partial(_matmul_inputs, m, v, d))
                if m > 8:  # fewer rows take the product itself
                    yield Problem(f"quant_matmul_argmax head {name}", _greatest, partial(_matmul_inputs, m, v, d))
                for slots in (512, 2048):
                    yield Problem(
                        f"flash_decode {name} S={slots}", _decode, partial(_decode_inputs, m, slots, n, k, width)
                    )


def _swiglu(x: Any, norm: Any, gate_up: Any, down: Any) -> Any:
    return pallas_kernels.swiglu(x, norm, gate_up, down, eps=1e-6, implementation="mosaic_gpu")


def _qkv_rope(n: int, k: int, *args: Any) -> Any:
    x, norm, weight, cos, sin = args
    return pallas_kernels.qkv_rope(
        x, norm, weight, None, cos, sin, n_heads=n, n_kv_heads=k, eps=1e-6, implementation="mosaic_gpu"
    )


def _residual(x: Any, weight: Any, residual: Any) -> Any:
    return pallas_kernels.quant_matmul(x, weight, None, residual, implementation="mosaic_gpu")


def _head(x: Any, weight: Any, _: Any) -> Any:
    return pallas_kernels.quant_matmul(x, weight, out_dtype=jnp.float32, implementation="mosaic_gpu")


def _greatest(x: Any, weight: Any, _: Any) -> Any:
    known = len(weight[0])
    return pallas_kernels.quant_matmul_argmax(x, weight, known=known, implementation="mosaic_gpu")


def _decode(q: Any, keys: Any, values: Any) -> Any:
    slots = keys.shape[2]
    positions = jnp.full((q.shape[0], 1), slots - 1, jnp.int32)
    key_positions = jnp.arange(slots, dtype=jnp.int32)[None]
    return pallas_kernels.flash_decode(
        q, keys, values, positions, key_positions, ordered=True, implementation="mosaic_gpu"
    )


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(math.prod(shape)), shape, jnp.bfloat16)


def random_weight(key: jax.Array, out: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Blocks [out, width] whose products with normal numbers are about normal."""
    values, scales = jax.random.split(key)
    scale = jax.random.uniform(scales, (out, width // BLOCK), jnp.float16, 0.5, 1.0) * (width**-0.5 / 64)
    return jax.random.randint(values, (out, width), -127, 128, jnp.int8), scale


def _weight(out: int, width: int) -> tuple[jax.Array, jax.Array]:
    return random_weight(jax.random.key(out), out, width)


def _matmul_inputs(m: int, out: int, width: int) -> tuple[Any, ...]:
    return _normal(m, width), _weight(out, width), _normal(m, out)


def _swiglu_inputs(m: int, d: int, f: int) -> tuple[Any, ...]:
    return _normal(m, d), jnp.ones(d, jnp.bfloat16), _weight(2 * f, d), _weight(d, f)


def _qkv_inputs(m: int, d: int, n: int, k: int, width: int) -> tuple[Any, ...]:
    angles = jax.random.uniform(jax.random.key(0), (m, 1, width // 2), maxval=6.0)
    weight = _weight((n + 2 * k) * width, d)
    return _normal(m, 1, d), jnp.ones(d, jnp.bfloat16), weight, jnp.cos(angles), jnp.sin(angles)


def _decode_inputs(m: int, slots: int, n: int, k: int, width: int) -> tuple[Any, ...]:
    return _normal(m, 1, n, width), _normal(m, k, slots, width), _normal(m, k, slots, width) + 1


# The search


def tune(problem: Problem, most: int) -> Iterator[tuple[Choice, Any]]:
    """Each choice that the problem's kernels make, in order, with the best configuration found."""
    inputs = problem.inputs()
    decided: dict[tuple[str, str], Any] = {}
    while True:
        choice = next(iter(_choices(problem, inputs, decided)), None)
        if choice is None:
            return
        others = [config for config in choice.space() if config != choice.heuristic]
        random.Random(0).shuffle(others)
        candidates = [choice.heuristic, *others[: most - 1]]
        times = measure(problem, inputs, [{**decided, (choice.op, choice.key): c} for c in candidates])
        best = min(range(len(candidates)), key=times.__getitem__)
        if times[best] > _GAIN * times[0]:
            best = 0
        decided[choice.op, choice.key] = candidates[best]
        measured = sum(map(math.isfinite, times))
        print(f"{problem.name}: {choice.op} {choice.key}: {times[0] * 1e6:.2f} us by {choice.heuristic}, "
              f"{times[best] * 1e6:.2f} by {candidates[best]}, of {measured} of {len(candidates)}",
              flush=True)  # fmt: skip
        yield choice, candidates[best]


def _choices(problem: Problem, inputs: tuple[Any, ...], decided: dict[tuple[str, str], Any]) -> list[Choice]:
    """What the problem's kernels still ask for where the others are decided."""
    asked = []

    def decide(choice: Choice) -> Any:
        if (choice.op, choice.key) not in decided:
            asked.append(choice)
        return decided.get((choice.op, choice.key), choice.heuristic)

    with deciding(decide):
        jax.eval_shape(lambda *args: problem.call(*args), *inputs)  # a new function, or JAX would know the answer
    return asked


def measure(problem: Problem, inputs: tuple[Any, ...], settings: list[dict[tuple[str, str], Any]]) -> list[float]:
    """Seconds that the problem's kernels take under each setting of the choices; infinity where they fail."""

    def build(number: int) -> Any:
        def candidate(*args: Any) -> Any:
            return problem.call(*args)

        candidate.__name__ = f"candidate_{number}"
        with deciding(lambda choice: settings[number].get((choice.op, choice.key), choice.heuristic)):
            return compiled(jax.jit(candidate), *inputs)

    def attempt(number: int) -> Any:
        try:
            return build(number)
        except Exception:  # too many registers, too much shared memory, and what else a compiler may refuse
            return None

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(attempt, range(len(settings))))
    right, usable = None, {}
    for number, program in enumerate(programs):
        if program is None:
            continue
        result = [np.asarray(x, np.float32) for x in jax.tree.leaves(program(*inputs))]
        right = result if right is None else right
        if all(np.abs(a - b).max() <= _TOLERANCE * np.abs(b).max() for a, b in zip(result, right, strict=True)):
            usable[number] = program
    busy = _profiled(inputs, usable)
    return [busy.get(number, math.inf) for number in range(len(settings))]


def _profiled(inputs: tuple[Any, ...], programs: dict[int, Any]) -> dict[int, float]:
    """Median seconds of device time of a run of each program."""
    other = jnp.zeros(_FLUSH // 4)
    flush = jax.jit(lambda x: x.sum()).lower(other).compile()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for program in programs.values():
                for _ in range(_RUNS):
                    flush(other)
                    jax.block_until_ready(program(*inputs))
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        spans: dict[int, list[tuple[float, float]]] = {number: [] for number in programs}
        devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
        for line in (line for plane in devices for line in plane.lines):
            for event in line.events:
                module = str(dict(event.stats).get("hlo_module", ""))
                if module.startswith("jit_candidate_"):
                    spans[int(module.removeprefix("jit_candidate_"))].append((event.start_ns, event.duration_ns))
    result = {}
    for number, found in spans.items():
        kernels, rest = divmod(len(found), _RUNS)
        if kernels and not rest:
            durations = [duration for _, duration in sorted(found)]
            runs = [sum(durations[i : i + kernels]) for i in range(0, len(durations), kernels)]
            result[number] = statistics.median(runs) * 1e-9
    return result


if __name__ == "__main__":
    main()
