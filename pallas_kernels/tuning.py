"""Kernel configurations found by measuring, kept in `tuned/<device>.json`: {op: {shape key: {field: value}}}.

A kernel asks `choose` for its configuration. A shape or device without an entry runs on the kernel's heuristic.
`python -m pallas_kernels.tune` measures and writes entries; it is told of each choice by `deciding`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, TypeVar

import jax

Config = TypeVar("Config")


@dataclass(frozen=True)
class Choice:
    """A configuration that a kernel asks for while it is traced."""

    op: str
    key: str
    heuristic: Any
    space: Callable[[], Iterable[Any]]  # the configurations worth measuring


_decide: ContextVar[Callable[[Choice], Any] | None] = ContextVar("decide", default=None)


@contextlib.contextmanager
def deciding(decide: Callable[[Choice], Any]) -> Iterator[None]:
    """Let `decide` make every choice that is traced inside the block."""
    token = _decide.set(decide)
    try:
        yield
    finally:
        _decide.reset(token)


def choose(op: str, key: str, heuristic: Config, space: Callable[[], Iterable[Config]]) -> Config:
    """The tuned configuration of `op` for the shape `key` on JAX's default device, or else the heuristic's.

    Args:
      heuristic: a frozen dataclass; an entry replaces its fields.
      space: gives the configurations worth measuring.
    """
    decide = _decide.get()
    if decide is not None:
        return decide(Choice(op, key, heuristic, space))
    entry = entries(device_slug()).get(op, {}).get(key, {})
    return replace(heuristic, **entry) if entry else heuristic  # type: ignore[type-var]


def device_slug() -> str:
    """The default device's name as a file name, e.g. `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())


@functools.cache
def entries(slug: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What was found for a device."""
    file = resources.files("pallas_kernels") / "tuned" / f"{slug}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
