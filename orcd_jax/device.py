"""The device a model runs on, and how much memory it has."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import psutil

from orcd_jax.errors import CapacityError, RequestError


def wake() -> None:
    """Begin to start JAX's default device, in a thread; whoever asks for it waits.

    A GPU takes a second or two for it, half of them when something is first sent there, in which something else can be
    done. What goes wrong is told to who asks.
    """

    def start() -> None:
        with contextlib.suppress(Exception):
            jax.device_put(0).block_until_ready()

    threading.Thread(target=start, name="wake").start()


def select_device(platform: str | None = None) -> jax.Device:
    """Return the first device of "cpu" or "gpu", or JAX's default device for None.

    Raises:
      RequestError: if there is no such device.
    """
    if platform not in (None, "cpu", "gpu"):
        raise RequestError(f"unknown device {platform!r}; expected cpu or gpu")
    try:
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError):  # the latter for a JAX_PLATFORMS that is not installed
        hint = "; install orcd-jax with the extra cuda12 or cuda13" if platform == "gpu" else ""
        raise RequestError(f"JAX finds no {platform or 'usable'} device{hint}") from None


def available_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated: of the device's pool, or of the host's memory.

    Limits of the control group and of the process (`ulimit -v`) count as well.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", sys.maxsize) - stats.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - psutil.Process().memory_info().vms)
    return max(0, min(free, _group_bytes()))


_GROUP = Path("/sys/fs/cgroup")


def _group_bytes() -> int:
    """Bytes left to the process's control group. Cached files that it has not used lately give way."""
    try:
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        idle = re.search(r"^inactive_file (\d+)$", (_GROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return sys.maxsize
    return limit - used + (int(idle[1]) if idle else 0)


def peak_bytes(device: jax.Device) -> int:
    """Most bytes in use so far: of the device's pool, or of the process where the host's memory is the device's."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Bytes a second that a device's memory can deliver, by its name in JAX (vendors' data sheets).
PEAK_BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA L4": 0.3e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
    "NVIDIA GeForce RTX 3090": 0.936e12,
}


_SMALLER = "use a shorter context, fewer rows at a time, or int8 weights"


def peak_bandwidth(device: jax.Device) -> float | None:
    """Bytes a second of the device's memory at best, where that is known."""
    return PEAK_BANDWIDTH.get(device.device_kind)


def human_bytes(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


@contextlib.contextmanager
def memory_errors(device: jax.Device) -> Iterator[None]:
    """Turn running out of memory inside the block, on the device or the host, into the project's error.

    Raises:
      CapacityError: if memory ran out. What the block had allocated is free again for a smaller request.
    """
    try:
        yield
    except MemoryError:
        raise CapacityError(f"the host ran out of memory; {_SMALLER}") from None
    except jax.errors.JaxRuntimeError as reason:
        if not re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc", str(reason)):
            raise
        left = human_bytes(available_bytes(device))
        raise CapacityError(f"{device} ran out of memory ({left} are left now); {_SMALLER}") from None


def check_fits(required: int, device: jax.Device, what: str, advice: Callable[[int], str]) -> None:
    """Refuse an allocation before it is tried.

    Raises:
      CapacityError: with the bytes required and available, and `advice` on what would fit the latter.
    """
    available = available_bytes(device)
    if required > available:
        raise CapacityError(
            f"{what} needs {required:,} bytes ({human_bytes(required)}), but {available:,} ({human_bytes(available)}) "
            f"are available on {device}; {advice(available)}"
        )
