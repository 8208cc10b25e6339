"""Kernel configurations found by measuring, kept in `tuned/<device>.json`: {op: {shape key: {field: value}}}.

A shape or device without an entry runs on the kernel's heuristic; so far there are no entries.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from importlib import resources
from typing import Any, TypeVar

import jax

Config = TypeVar("Config")


def choose(op: str, key: str, heuristic: Config) -> Config:
    """The tuned configuration of `op` for the shape `key` on JAX's default device, or else the heuristic's.

    Args:
      heuristic: a frozen dataclass; an entry replaces its fields.
    """
    entry: dict[str, Any] = _entries(device_slug()).get(op, {}).get(key, {})
    return replace(heuristic, **entry) if entry else heuristic  # type: ignore[type-var]


def device_slug() -> str:
    """The default device's name as a file name, e.g. `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())


@functools.cache
def _entries(slug: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = resources.files("pallas_kernels") / "tuned" / f"{slug}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
