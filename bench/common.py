"""What the benchmarks share: their arguments, the device's measured ceiling, statistics, and the JSON line."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

import orcd_jax
from orcd_jax.config import ModelConfig
from orcd_jax.device import select_device
from orcd_jax.language_model import LanguageModel, choose_weights, configure
from orcd_jax.loader import random_params


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark of a model takes."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default=orcd_jax.hub.DEFAULT_MODEL, help="as for orcd_jax.generate (%(default)s)")
    result.add_argument("--preset", help="random weights of a preset's shapes (configs/) in place of a model")
    result.add_argument("--weights", choices=("auto", "int8", "bf16", "f32"), default="auto")
    result.add_argument("--device", choices=("cpu", "gpu"))
    result.add_argument("--repeat", type=int, default=5, help="measured runs, after one to warm up (%(default)s)")
    result.add_argument("--quick", action="store_true", help="fewer and shorter runs: that it works, not how fast")
    result.add_argument("--json", metavar="FILE", help="also write the JSON object to this file")
    return result


def load(args: argparse.Namespace) -> LanguageModel:
    """The model of `--model`, or one of `--preset`'s shapes with random weights and the default model's tokeniser."""
    if args.preset is None:
        return orcd_jax.load(args.model, weights=args.weights, device=args.device)
    device = select_device(args.device)
    config = ModelConfig.from_preset(args.preset)
    weights = choose_weights(args.weights, {"Q8_0"}, config, device)
    config = configure(config, weights, device)
    tokenizer = orcd_jax.Tokenizer.from_gguf(orcd_jax.hub.resolve(orcd_jax.hub.DEFAULT_MODEL))
    return LanguageModel(
        config, random_params(config, weights, device), tokenizer, None,
        context=config.context_length, weights=weights, device=device,
    )  # fmt: skip


def read_bandwidth(device: jax.Device, size: int = 1 << 29) -> float:
    """Bytes a second that a matrix-vector product of `size` bytes in float32 reads: the ceiling of decoding here."""
    width = 4096
    with jax.default_device(device):
        matrix = jnp.ones((size // 4 // width, width), jnp.float32)
        product = jax.jit(lambda m, v: jnp.einsum("oi,i->o", m, v))
        vector = jnp.ones(width, jnp.float32)
        return size / min(measure(lambda: jax.block_until_ready(product(matrix, vector)), 10))


def measure(call: Callable[[], Any], repeat: int) -> list[float]:
    """Seconds that each of `repeat` calls took, after one to warm up."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment(device: jax.Device) -> dict[str, str]:
    """Where and when figures were measured."""
    return {
        "device": device.device_kind if device.platform != "cpu" else f"CPU, {processor()}",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def processor() -> str:
    """The processor's name and its number of cores."""
    import psutil

    name = platform.processor()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name or platform.machine()}, {psutil.cpu_count()} cores"


def finish(result: dict[str, Any], path: str | None) -> None:
    """Print the result as the last line, one JSON object, and write it to `path` if there is one."""
    line = json.dumps(result)
    if path:
        with open(path, "w") as f:
            f.write(line + "\n")
    print(line)
