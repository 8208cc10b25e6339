"""Compiled programs on disk, found again without being traced.

JAX keeps compiled programs as well, but finds one by what it is compiled from. That has to be traced and lowered first,
and the kernels of a GPU take seconds of Python for it. Here a program is found by all that its tracing depends on.
Whoever can write to the folder can run code of theirs: so it is with JAX's programs, which lie there too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

import pallas_kernels
from orcd_jax import hub
from orcd_jax.files import whole


def _source() -> str:
    """A digest of the code and the tables that programs are made from."""
    digest = hashlib.sha256()
    for package in (__file__, pallas_kernels.__file__):
        for file in sorted(Path(package).parent.rglob("*")):
            if file.suffix in (".py", ".json"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


_SOURCE = _source()  # as it is imported: what is edited later is not what runs


def enable_caches() -> None:
    """Keep compiled programs between runs, unless the user has chosen a folder or switched this off."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(hub.programs_dir()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def kept(compile: Callable[[], jax.stages.Compiled], device: jax.Device, args: Any, *what: Any) -> jax.stages.Compiled:
    """The program that `compile` makes, or the same one as an earlier run has kept it.

    Args:
      compile: traces and compiles.
      device: where the program runs.
      args: what it takes; structure, shapes and dtypes count.
      what: all else that tells it from other programs, by their `repr`.
    """
    folder = _folder(device)
    if folder is None:
        return compile()
    path = folder / f"{_key(device, args, what)}.program"
    with contextlib.suppress(Exception):  # there is none, or it is damaged: it is made anew, with errors of its own
        binary, inputs, outputs = pickle.loads(path.read_bytes())
        return serialize_executable.deserialize_and_load(binary, inputs, outputs, device.client, [device])
    program = compile()
    with contextlib.suppress(Exception):  # such as a full disk; the program runs all the same
        data = pickle.dumps(serialize_executable.serialize(program))
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_bytes(data)
    return program


def _folder(device: jax.Device) -> Path | None:
    """Where programs are kept: beside JAX's, on a GPU. Those of a CPU are traced quickly, and fit its very model."""
    settings: Any = jax.config
    folder = settings.jax_compilation_cache_dir
    if device.platform == "cpu" or not settings.jax_enable_compilation_cache or not folder or "://" in folder:
        return None
    return Path(folder)


def _key(device: jax.Device, args: Any, what: tuple[Any, ...]) -> str:
    leaves, structure = jax.tree.flatten(args)
    settings = {  # XLA_PYTHON_CLIENT_...: how much memory a process takes, which changes no program
        name: value
        for name, value in os.environ.items()
        if name.startswith(("XLA_", "MOSAIC_")) and not name.startswith("XLA_PYTHON_CLIENT_")
    }
    parts = (
        _SOURCE,
        [(library.__name__, library.__version__) for library in (jax, jaxlib, flax)],
        sorted(jax.config.values.items()),
        sorted(settings.items()),
        (device.client.platform_version, device.device_kind, device.id),
        (structure, [(leaf.shape, leaf.dtype) for leaf in leaves]),
        what,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
