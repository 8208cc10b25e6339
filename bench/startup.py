"""How long is it from the command to its first token?

Runs `python -m orcd_jax.generate` as a process of its own: once with an empty compilation cache (a first start), then
again (later starts), and takes the time until the first byte on stdout. The model's file is fetched beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from bench import common
from orcd_jax import hub
from orcd_jax.device import select_device
from orcd_jax.errors import RequestError


def first_byte(command: list[str], environment: dict[str, str]) -> float:
    """Seconds until `command` writes to stdout."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RequestError(f"{' '.join(command)} printed nothing")
        return time.perf_counter() - start


def main() -> None:
    args = common.parser(__doc__).parse_args()
    if args.preset:
        raise RequestError("startup measures the command, which needs a model, not a preset")
    path = hub.resolve(args.model)
    repeat = 1 if args.quick else args.repeat
    command = [
        sys.executable, "-m", "orcd_jax.generate", "-m", str(path), "--weights", args.weights, "-p", "Hello.",
        "-n", "8", "--temperature", "0", "--ignore-eos", "--kernels", args.kernels,
        *(["--device", args.device] if args.device else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        first = first_byte(command, environment)
        later = common.spread([first_byte(command, environment) for _ in range(repeat)])
    where = common.environment(select_device(args.device))
    print(f"{path.name}, weights {args.weights}, on {where['device']}, jax {where['jax']}")
    print(f"first start, everything compiled: {first:.1f} s to the first token")
    print(f"later starts: {later['median']:.1f} s ({later['min']:.1f} - {later['max']:.1f}, {repeat} runs)")
    common.emit({"bench": "startup", "model": path.name, **where, "first_start_s": first, "later_start_s": later}, args)


if __name__ == "__main__":
    common.run(main)
