"""What the benchmarks share: their arguments, models, the device's measured ceilings, statistics, and the JSON line."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, TypeVar, get_args

import jax
import numpy as np

import orcd_jax
from orcd_jax.arguments import Parser, at_least
from orcd_jax.config import ModelConfig
from orcd_jax.device import select_device
from orcd_jax.errors import OrcdJaxError
from orcd_jax.language_model import Kernels, LanguageModel, choose_weights, configure
from orcd_jax.loader import random_params
from orcd_jax.probe import Ceilings, noise

Value = TypeVar("Value")
PROSE = Path(__file__).parent.parent / "tests" / "data" / "prose.txt"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark of a model takes."""
    result = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default=orcd_jax.hub.DEFAULT_MODEL, help="as for orcd_jax.generate (%(default)s)")
    result.add_argument("--preset", help="random weights of a preset's shapes (configs/) in place of a model")
    result.add_argument("--weights", choices=("auto", "int8", "bf16", "f32"), default="auto")
    result.add_argument("--device", choices=("cpu", "gpu"))
    result.add_argument("--kernels", choices=get_args(Kernels), default="auto", help="as for load (%(default)s)")
    result.add_argument(
        "--repeat",
        type=at_least(1),
        default=5,
        help="measured runs, after one to warm up; on a GPU up to four times as many while noisy (1 %%) (%(default)s)",
    )
    result.add_argument("--within", type=float, metavar="SECONDS", help="begin no further row after so long")
    result.add_argument("--quick", action="store_true", help="fewer and shorter runs: that it works, not how fast")
    result.add_argument("--note", metavar="TEXT", help="what the guide should say beside the figures")
    result.add_argument("--json", nargs="?", metavar="FILE", help="also write the last line, a JSON object, to a file")
    return result


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake in what was asked is one line on stderr and exit status 2."""
    try:
        main()
    except (OrcdJaxError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def in_time(args: argparse.Namespace) -> bool:
    """Whether the process has not yet run for longer than `--within`."""
    import psutil

    left = args.within is None or time.time() - psutil.Process().create_time() < args.within
    if not left:
        print("(no time for the rest)", flush=True)
    return left


def compiled_together(device: jax.Device, calls: Sequence[Callable[[], Value]]) -> Iterator[Value]:
    """The results of calls that compile programs: on a GPU, where that takes longer than all the rest, all calls at
    once; on a CPU each when it is asked for."""
    if device.platform == "cpu":
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(call) for call in calls]
    yield from (result.result() for result in results)


def load(args: argparse.Namespace) -> LanguageModel:
    """The model of `--model`, or one of `--preset`'s shapes with random weights and a made-up vocabulary."""
    if args.preset is None:
        return orcd_jax.load(args.model, weights=args.weights, device=args.device, kernels=args.kernels)
    device = select_device(args.device)
    config = ModelConfig.from_preset(args.preset)
    weights = choose_weights(args.weights, {"Q8_0"}, config, device)
    config = configure(config, weights, device)
    return LanguageModel(
        config, random_params(config, weights, device), vocabulary(config.vocab_size), None,
        context=config.context_length, weights=weights, device=device, kernels=args.kernels,
    )  # fmt: skip


def vocabulary(size: int) -> orcd_jax.Tokenizer:
    """A byte-level vocabulary of made-up words: it costs the host, token by token, what a real one does."""
    letters = (chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)))  # GPT-2's 256 bytes
    words = ("Ġ" + "".join(word) for length in (2, 3, 4) for word in product(ascii_lowercase, repeat=length))
    texts = [*letters, *islice(words, size - 256)]
    return orcd_jax.Tokenizer(
        {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.merges": [],
        }
    )  # fmt: skip


def token_stream(model: LanguageModel, args: argparse.Namespace, count: int) -> list[int]:
    """Tokens to make prompts from: of the tests' prose, repeated, or random ones for random weights."""
    if args.preset is not None:
        return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()
    ids = model.tokenizer.encode(PROSE.read_text(encoding="utf-8"))
    return (ids * -(-count // len(ids)))[:count]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, most, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


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


def per_cent(values: Sequence[float]) -> str:
    """How far apart measured values lie, but for the outer ones."""
    return f"±{noise(values):.1%}"


def axes(x: str, y: str, title: str, height: float = 4.5) -> Any:
    """An empty plot, 8 inches wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, result = plt.subplots(figsize=(8, height))
    result.set(xlabel=x, ylabel=y, title=title)
    result.grid(alpha=0.3)
    return result


def save(axes: Any, path: Path) -> None:
    """Write a plot to a PNG."""
    axes.figure.tight_layout()
    axes.figure.savefig(path, dpi=110, bbox_inches="tight")


def headline(model: LanguageModel, ceilings: Ceilings) -> None:
    """Say what is measured, where, and what the device can do."""
    where = environment(model.device)
    print(f"{model.config.name}, weights {model.weights}, on {where['device']}, jax {where['jax']}")
    print(ceilings, flush=True)


def finish(model: LanguageModel, ceilings: Ceilings | None, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a result on a model as the last line, one JSON object, and write it to `--json`'s file."""
    measured = asdict(ceilings) if ceilings is not None else {}
    config = model.config
    sizes = {"weights_bytes": config.weight_bytes(model.weights), "kv_bytes_per_token": config.cache_bytes(1, 1)}
    head = {"model": config.name, "weights": model.weights, **sizes, **environment(model.device), **measured}
    emit({"bench": result.pop("bench"), **head, **result}, args)


def emit(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a result as the last line, one JSON object, and write it to `--json`'s file."""
    result |= {"note": args.note} if args.note else {}
    print(json.dumps(result), flush=True)
    if args.json:
        write(result, Path(args.json))


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result to a file, one line of JSON."""
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
