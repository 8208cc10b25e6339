"""Which implementation of an op runs: by argument, by `use(...)` while tracing, or the first that can.

"mosaic_gpu" kernels are for Hopper (compute capability 9: they use its wgmma and TMA units); "xla" runs anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

_log = logging.getLogger(__name__)
_preferred: ContextVar[str | None] = ContextVar("preferred_implementation", default=None)


_KERNELS_NEED = (0, 11, 2)  # of JAX: Mosaic GPU as the kernels use it
_lowering = threading.Lock()


def on_hopper() -> bool:
    """Whether JAX's default device is a GPU of compute capability 9, and this JAX can compile kernels for it."""
    if jax.version.__version_info__ < _KERNELS_NEED:
        return False
    settings: Any = jax.config
    device = settings.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform == "gpu" and str(device.compute_capability).startswith("9.")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Prefer the implementation `name` for every op that is traced inside the block.

    The device is not asked: this is how to compile for a GPU ahead of time, where there is none. An op without it, or
    whose arguments it cannot take, falls to the next implementation and logs that it did.
    """
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def compiled(function: Any, *args: Any) -> jax.stages.Compiled:
    """A jitted function compiled for arguments, in several threads at once if need be.

    They take turns in tracing and lowering, which is Python's work: threads that lower kernels at the same time have
    ended in segmentation faults, in jaxlib 0.11.2's Mosaic.
    """
    with _lowering:
        lowered = function.lower(*args)
    program: jax.stages.Compiled = lowered.compile()
    return program


def preferred() -> str | None:
    """The implementation that an enclosing `use` prefers; a cache of traces must depend on it."""
    return _preferred.get()


def dispatch(
    op: str, implementations: Mapping[str, Callable[..., Any]], name: str | None, *args: Any, **kwargs: Any
) -> Any:
    """Call the implementation `name`, or else the preferred one, or else the device's first that takes the arguments.

    Args:
      op: the op's name, for messages.
      implementations: name -> function, the default first; a function raises NotImplementedError for what it cannot do.
      name: the caller's choice. It is never replaced by another.

    Raises:
      NotImplementedError: if `name` does not exist or cannot take the arguments.
    """
    if name is not None:
        if name not in implementations:
            raise NotImplementedError(f"{op} has no implementation {name!r}; it has {', '.join(implementations)}")
        return _run(op, implementations, name, *args, **kwargs)
    first = preferred()
    if first is not None and first not in implementations:
        _log.warning("%s has no implementation %r; using the next", op, first)
    able = [i for i in implementations if i == first or i != "mosaic_gpu" or on_hopper()]
    order = sorted(able, key=lambda candidate: candidate != first)  # stable: the rest keep their order
    for candidate in order[:-1]:
        try:
            return _run(op, implementations, candidate, *args, **kwargs)
        except NotImplementedError as reason:
            level = logging.WARNING if candidate == first else logging.INFO  # only who asked for it must know
            _log.log(level, "%s: %s cannot run this (%s); using the next implementation", op, candidate, reason)
    return _run(op, implementations, order[-1], *args, **kwargs)


def _run(op: str, implementations: Mapping[str, Callable[..., Any]], name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "mosaic_gpu" and jax.version.__version_info__ < _KERNELS_NEED:
        needed = ".".join(map(str, _KERNELS_NEED))
        raise NotImplementedError(f"kernels need jax {needed} or newer, not {jax.__version__}")
    with jax.named_scope(op):  # by which a profile knows its kernels
        return implementations[name](*args, **kwargs)
